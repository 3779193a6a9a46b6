"""/v1/responses: OpenAI's newer shape over the same engine. Nothing is stored, so `previous_response_id` is refused;
tools go through /v1/chat/completions.
"""

import json
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from soma.engine.params import SamplingParams
from soma.engine.request import Request as EngineRequest
from soma.engine.request import TokenEvent
from soma.serve import errors
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat
from soma.serve.generation import Generation, check
from soma.serve.prompts import TokenNames
from soma.serve.protocol import Message, Sampling

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
    tools: list[dict[str, Any]] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    # Taken and left alone: they change nothing about the answer here.
    parallel_tool_calls: bool | None = None
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
    def messages(self) -> list[dict[str, Any]]:
        """What the chat template gets. Raises ApiError for items that are no messages of text."""
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        turns = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        for place, item in enumerate(given):
            where = f"input.{place}"
            if item.get("type", "message") != "message" or not isinstance(item.get("role"), str):
                raise ApiError(400, f"{where}: only messages are supported, got {item.get('type')!r}", "input")
            content = item.get("content")
            if isinstance(content, list):
                if not all(isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)
                           for part in content):  # fmt: skip
                    raise ApiError(400, f"{where}.content: only parts of text are supported", "input")
                content = "".join(part["text"] for part in content)
            if not isinstance(content, str):
                raise ApiError(400, f"{where}.content: expected text", "input")
            turns.append({"role": item["role"], "content": content})
        if not turns:
            raise ApiError(400, "input is an empty list", "input")
        return [Message(**turn).for_template(place) for place, turn in enumerate(turns)]


class ResponsesFormat(ChatFormat):
    """response, whole and as events."""

    whole_object, prefix = "response", "resp"

    def __init__(self, names: TokenNames, model: str, body: ResponsesRequest) -> None:
        super().__init__(names, model, logprobs=False)
        self.body = body
        self.id, self.message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"

    def part(self, text: str) -> dict[str, Any]:
        """A piece of an answer."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def message(self, text: str | None, status: str) -> dict[str, Any]:
        """The one item of an answer."""
        content = [] if text is None else [self.part(text)]
        return {"type": "message", "id": self.message_id, "status": status, "role": "assistant", "content": content}

    def response(
        self, status: str, text: str | None = None, usage: dict[str, Any] | None = None, reason: str | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The object."""
        body = self.body
        told: dict[str, Any] | None = usage and {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": error,
            "incomplete_details": None if reason is None else {"reason": reason}, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "model": self.model, "parallel_tool_calls": False,
            "output": [] if text is None else [self.message(text, status)], "previous_response_id": None,
            "store": False, "temperature": body.temperature, "top_p": body.top_p, "tool_choice": "none", "tools": [],
            "text": body.text or {"format": {"type": "text"}}, "truncation": "disabled", "usage": told,
            "user": body.user, "metadata": {},
        }  # fmt: skip

    def ended(self, text: str, finish_reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        """The object at the end: cut short at max_output_tokens it is incomplete."""
        if finish_reason == "length":
            return self.response("incomplete", text, usage, "max_output_tokens")
        return self.response("completed", text, usage)

    def choice(self, index: int, events: "list[TokenEvent]", request: EngineRequest) -> dict[str, Any]:  # type: ignore[override]
        return {"text": "".join(event.text for event in events), "finish_reason": events[-1].finish_reason}

    def envelope(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self.ended(choices[0]["text"], choices[0]["finish_reason"], more["usage"])


async def stream(service: "Service", generation: Generation, shape: ResponsesFormat) -> AsyncIterator[bytes]:
    """The events of a response, in OpenAI's order and with their numbers."""
    number = 0

    def say(kind: str, **more: Any) -> bytes:
        nonlocal number
        value = {"type": kind, "sequence_number": number, **more}
        number += 1
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    where = {"item_id": shape.message_id, "output_index": 0, "content_index": 0}
    yield say("response.created", response=shape.response("in_progress"))
    yield say("response.in_progress", response=shape.response("in_progress"))
    yield say("response.output_item.added", output_index=0, item=shape.message(None, "in_progress"))
    yield say("response.content_part.added", **where, part=shape.part(""))
    text, reason = "", None
    try:
        async for _, event in generation:
            check(service.engine, event)
            reason = event.finish_reason
            if event.text:
                text += event.text
                yield say("response.output_text.delta", **where, delta=event.text, logprobs=[])
        whole = shape.ended(text, reason, generation.usage)
        yield say("response.output_text.done", **where, text=text, logprobs=[])
        yield say("response.content_part.done", **where, part=shape.part(text))
        yield say("response.output_item.done", output_index=0, item=whole["output"][0])
        yield say(f"response.{whole['status']}", response=whole)
    except Exception as error:  # noqa: BLE001  (the status line is gone: an event is all that can still be said)
        errors.log_unknown(error)
        known = errors.as_api_error(error)
        told = {"code": known.code or "server_error", "message": known.message}
        yield say("response.failed", response=shape.response("failed", text or None, error=told))
