"""/v1/responses: OpenAI's newer shape over the same engine. Nothing is stored, so `previous_response_id` is refused: a
client sends the calls that it got, and what its functions returned, as items of the next input.
"""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from soma.engine.params import SamplingParams
from soma.engine.request import Request as EngineRequest
from soma.engine.request import TokenEvent
from soma.serve import errors
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat
from soma.serve.generation import Generation, check
from soma.serve.prompts import TokenNames
from soma.serve.protocol import Message, Sampling
from soma.serve.response_items import Items
from soma.serve.tools import Tool, ToolUse

if TYPE_CHECKING:
    from soma.serve.app import Service

PARTS = ("input_text", "output_text", "text")
FORMATS = ("text", "json_object", "json_schema")


class ResponsesRequest(Sampling):
    """Body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # Taken and left alone: they change nothing about the answer here.
    include: list[str] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: int | None = None

    def params(self) -> SamplingParams:
        """As the engine takes it. Raises ApiError for what is not there."""
        if self.previous_response_id is not None:
            raise ApiError(400, "responses are not stored here: send the whole conversation as input",
                           "previous_response_id", "unsupported_parameter")  # fmt: skip
        if self.n not in (None, 1):
            raise ApiError(400, "n: a response has one answer", "n", "unsupported_parameter")
        form = (self.text or {}).get("format")
        if form is not None:
            if not isinstance(form, dict) or form.get("type") not in FORMATS:
                raise ApiError(400, f"text.format.type: expected one of {', '.join(FORMATS)}", "text")
            self.response_format = form
            if form["type"] == "json_schema":
                self.response_format = {
                    "type": "json_schema",
                    "json_schema": {k: v for k, v in form.items() if k != "type"},
                }
        more = {} if self.max_output_tokens is None else {"max_tokens": self.max_output_tokens}
        return self.sampling(**more)

    @property
    def functions(self) -> list[Tool]:
        """The tools, in the form of chat completions. Raises ApiError for those that are no functions."""
        found = []
        for place, tool in enumerate(self.tools or ()):
            where = f"tools.{place}"
            if tool.get("type") != "function":
                raise ApiError(400, f"{where}: only tools of type function are supported, got {tool.get('type')!r}",
                               "tools", "unsupported_parameter")  # fmt: skip
            given = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
            try:
                found.append(Tool.model_validate({"type": "function", "function": given}))
            except ValidationError as error:
                wrong = error.errors(include_url=False, include_context=False)[0]
                place_in = ".".join(map(str, wrong["loc"][1:]))
                raise ApiError(400, f"{where}.{place_in}: {wrong['msg'].lower()}", "tools") from None
        return found

    @property
    def chosen(self) -> str | dict[str, Any] | None:
        """`tool_choice` in the form of chat completions."""
        match self.tool_choice:
            case {"type": "function", "name": str(name)}:
                return {"type": "function", "function": {"name": name}}
        return self.tool_choice

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the chat template gets: calls that follow each other are one turn of the assistant. Raises ApiError for
        items that are neither messages of text, nor calls, nor what came of them."""
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        for place, item in enumerate(given):
            where, kind = f"input.{place}", item.get("type", "message")
            if kind == "function_call":
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": ""})
                turns[-1].setdefault("tool_calls", []).append(call_of(item, where))
            elif kind == "function_call_output" and isinstance(item.get("call_id"), str):
                content = text_of(item.get("output"), f"{where}.output")
                turns.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
            elif kind == "message" and isinstance(item.get("role"), str):
                turns.append({"role": item["role"], "content": text_of(item.get("content"), f"{where}.content")})
            else:
                raise ApiError(400, f"{where}: only messages, function_call and function_call_output are supported, "
                               f"got {kind!r}", "input")  # fmt: skip
        if not turns:
            raise ApiError(400, "input is an empty list", "input")
        return [Message(**turn).for_template(place) for place, turn in enumerate(turns)]


def text_of(content: Any, where: str) -> str:
    """A text, or parts of text as one. Raises ApiError."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)
                   for part in content):  # fmt: skip
            raise ApiError(400, f"{where}: only parts of text are supported", "input")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}: expected text", "input")
    return content


def call_of(item: dict[str, Any], where: str) -> dict[str, Any]:
    """An earlier call in the form of chat completions. Raises ApiError."""
    call_id, name, arguments = (item.get(key) for key in ("call_id", "name", "arguments"))
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
        raise ApiError(400, f"{where}: a function_call has a call_id, a name and arguments", "input")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class ResponsesFormat(ChatFormat):
    """response, whole and as events."""

    whole_object, prefix = "response", "resp"

    def __init__(self, names: TokenNames, model: str, body: ResponsesRequest, use: ToolUse | None) -> None:
        super().__init__(names, model, logprobs=False)
        self.body, self.use = body, use
        self.id = f"resp_{uuid.uuid4().hex}"

    def items(self) -> Items:
        """For a new answer."""
        return Items(None if self.use is None else self.use.parser())

    def response(
        self, status: str, output: Sequence[dict[str, Any]] = (), usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The object. An answer that is incomplete was cut short at max_output_tokens."""
        body = self.body
        told: dict[str, Any] | None = usage and {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "output": list(output),
            "previous_response_id": None, "store": False, "temperature": body.temperature, "top_p": body.top_p,
            "tool_choice": body.tool_choice or "auto", "tools": [shown(tool) for tool in body.tools or ()],
            "text": body.text or {"format": {"type": "text"}}, "truncation": "disabled", "usage": told,
            "user": body.user, "metadata": {},
        }  # fmt: skip

    def choice(self, index: int, events: "list[TokenEvent]", request: EngineRequest) -> dict[str, Any]:  # type: ignore[override]
        items = self.items()
        for event in events:
            items.take(event)
        status = status_of(events[-1].finish_reason)
        items.end(status)
        return {"status": status, "output": items.items}

    def envelope(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self.response(choices[0]["status"], choices[0]["output"], more["usage"])


def shown(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI tells it back."""
    return {"strict": None, "parameters": None, "description": None, **tool}


def status_of(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


async def stream(service: "Service", generation: Generation, shape: ResponsesFormat) -> AsyncIterator[bytes]:
    """The events of a response, in OpenAI's order and with their numbers."""
    number = 0

    def say(kind: str, **more: Any) -> bytes:
        nonlocal number
        value = {"type": kind, "sequence_number": number, **more}
        number += 1
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    yield say("response.created", response=shape.response("in_progress"))
    yield say("response.in_progress", response=shape.response("in_progress"))
    items, reason = shape.items(), None
    try:
        async for _, event in generation:
            check(service.engine, event)
            reason = event.finish_reason
            if said := b"".join(say(kind, **more) for kind, more in items.take(event)):
                yield said
        status = status_of(reason)
        yield b"".join(say(kind, **more) for kind, more in items.end(status))
        yield say(f"response.{status}", response=shape.response(status, items.items, generation.usage))
    except Exception as error:  # noqa: BLE001  (the status line is gone: an event is all that can still be said)
        errors.log_unknown(error)
        known = errors.as_api_error(error)
        told = {"code": known.code or "server_error", "message": known.message}
        yield say("response.failed", response=shape.response("failed", items.items, error=told))
