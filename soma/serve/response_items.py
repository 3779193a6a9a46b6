"""The items of a response, as an answer comes: a message of text, calls of functions; and the events that tell them."""

import uuid
from typing import Any

from soma.engine.request import TokenEvent
from soma.serve.tool_calls import read
from soma.serve.tool_parser import Delta, ToolParser

Events = list[tuple[str, dict[str, Any]]]  # the type of an event, and what else is in it


def part(text: str) -> dict[str, Any]:
    """The one piece of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Items:
    """Takes an answer's tokens; `items` are whole at the end, and each step returns the events in OpenAI's order.

    parser: reads the calls out of the text; None: all of it is text.
    """

    def __init__(self, parser: ToolParser | None) -> None:
        self.parser = parser
        self.items: list[dict[str, Any]] = []
        self.is_open = False  # the last of them

    def take(self, event: TokenEvent) -> Events:
        """What a token adds."""
        deltas = read(self.parser, event) if self.parser is not None else [Delta(event.text)] * bool(event.text)
        said: Events = []
        for delta in deltas:
            if delta.name:
                said += self._close("completed") + self._begin_call(delta)
            elif delta.index is not None:
                self.items[-1]["arguments"] += delta.arguments
                said.append(("response.function_call_arguments.delta", {**self._where, "delta": delta.arguments}))
            else:
                said += self._text(delta.content)
        return said

    def end(self, status: str) -> Events:
        """The answer is over. One without anything is an empty message."""
        said = [] if self.items else self._begin_message()
        return said + self._close(status)

    @property
    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _begin(self, item: dict[str, Any]) -> Events:
        self.items.append(item)
        self.is_open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        return [("response.output_item.added", {"output_index": len(self.items) - 1, "item": shown})]

    def _begin_message(self) -> Events:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
        said = self._begin({**item, "content": [part("")]})
        return [*said, ("response.content_part.added", {**self._where, "content_index": 0, "part": part("")})]

    def _begin_call(self, delta: Delta) -> Events:
        item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": delta.id, "name": delta.name}
        return self._begin({**item, "arguments": "", "status": "in_progress"})

    def _text(self, text: str) -> Events:
        said: Events = []
        if not self.is_open or "content" not in self.items[-1]:
            said = self._close("completed") + self._begin_message()
        self.items[-1]["content"][0]["text"] += text
        where = {**self._where, "content_index": 0}
        return [*said, ("response.output_text.delta", {**where, "delta": text, "logprobs": []})]

    def _close(self, status: str) -> Events:
        if not self.is_open:
            return []
        self.is_open = False
        item, where = self.items[-1], self._where
        item["status"] = status
        if "content" in item:
            piece, where = item["content"][0], {**where, "content_index": 0}
            said: Events = [("response.output_text.done", {**where, "text": piece["text"], "logprobs": []}),
                            ("response.content_part.done", {**where, "part": piece})]  # fmt: skip
        else:
            told = {**where, "name": item["name"], "arguments": item["arguments"]}
            said = [("response.function_call_arguments.done", told)]
        return [*said, ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]
