"""The body of /v1/responses, and what of it the chat template and the engine get."""

from typing import Any, Literal

from pydantic import ValidationError

from soma.engine.params import SamplingParams
from soma.serve.errors import ApiError
from soma.serve.protocol import Message, Sampling
from soma.serve.tools import Tool

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
