"""/v1/responses: OpenAI's newer shape over the same engine. Nothing is stored, so `previous_response_id` is refused: a
client sends the calls that it got, and what its functions returned, as items of the next input.
"""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from soma.engine.request import Request as EngineRequest
from soma.engine.request import TokenEvent
from soma.serve import errors
from soma.serve.formats import ChatFormat
from soma.serve.generation import Generation, check
from soma.serve.prompts import TokenNames
from soma.serve.response_items import Items
from soma.serve.response_request import ResponsesRequest
from soma.serve.tools import ToolUse

if TYPE_CHECKING:
    from soma.serve.service import Service


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
