"""Chat completions whose answers may hold tool calls, whole and in chunks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from soma.engine.params import SamplingParams
from soma.engine.request import Request, TokenEvent
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat
from soma.serve.prompts import TokenNames
from soma.serve.tool_parser import Delta, ToolParser
from soma.serve.tools import ToolUse


def with_calls(params: SamplingParams, use: ToolUse | None) -> SamplingParams:
    """The parameters of an answer that must be calls, if it must. Raises ApiError if it must also be something else."""
    if use is None or use.guided is None:
        return params
    if params.guided is not None:
        raise ApiError(400, f"{params.guided.param} does not go together with a tool_choice that demands a call",
                       params.guided.param)  # fmt: skip
    return replace(params, guided=use.guided)


class ToolChatFormat(ChatFormat):
    """chat.completion and its chunks, with the calls taken out of the text."""

    def __init__(self, names: TokenNames, model: str, use: ToolUse, *, logprobs: bool) -> None:
        super().__init__(names, model, logprobs=logprobs)
        self.use = use
        self.parsers: dict[int, ToolParser] = {}  # of the choices that are streamed

    def chunk(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        logprobs = self.logprobs([event])
        parser = self.parsers.setdefault(index, self.use.parser())
        delta = self._delta(read(parser, event))
        if not delta and not (logprobs and logprobs["content"]):
            return None
        return self._chunk(index, delta, logprobs, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, self._reason(reason, self.parsers[index]))

    def choice(self, index: int, events: Sequence[TokenEvent], request: Request) -> dict[str, Any]:
        parser = self.use.parser()
        deltas = [delta for event in events for delta in read(parser, event)]
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.name:
                function = {"name": delta.name, "arguments": ""}
                calls.append({"id": delta.id, "type": "function", "function": function})
            elif delta.index is not None:
                calls[delta.index]["function"]["arguments"] += delta.arguments
        content = "".join(delta.content for delta in deltas)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        reason = self._reason(events[-1].finish_reason, parser)
        return {"index": index, "message": message, "logprobs": self.logprobs(events), "finish_reason": reason}

    @staticmethod
    def _reason(reason: str | None, parser: ToolParser) -> str | None:
        return "tool_calls" if reason == "stop" and parser.calls else reason

    @staticmethod
    def _delta(deltas: Sequence[Delta]) -> dict[str, Any]:
        """What one event adds, as a chunk says it."""
        said: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.name:
                function = {"name": delta.name, "arguments": ""}
                calls.append({"index": delta.index, "id": delta.id, "type": "function", "function": function})
            elif delta.index is not None and calls and calls[-1]["index"] == delta.index:
                calls[-1]["function"]["arguments"] += delta.arguments
            elif delta.index is not None:
                calls.append({"index": delta.index, "function": {"arguments": delta.arguments}})
            else:
                said["content"] = said.get("content", "") + delta.content
        return said | ({"tool_calls": calls} if calls else {})


def read(parser: ToolParser, event: TokenEvent) -> list[Delta]:
    """What an event adds to an answer; after the last one nothing is held back."""
    deltas = parser.push(event.text, event.id)
    return deltas if event.finish_reason is None else [*deltas, *parser.end()]
