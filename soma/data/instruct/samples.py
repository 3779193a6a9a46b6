"""What a row teaches: a conversation, or a prompt with a better and a worse answer."""

import json
from dataclasses import dataclass
from typing import Any

from soma.data.instruct.checks import Message, RowError, text_of
from soma.data.instruct.pairs import answer_start
from soma.data.instruct.parts import split
from soma.data.instruct.patch import same
from soma.data.instruct.schemas import FIELDS, Record, Row, Schema, to_record


@dataclass(frozen=True)
class Sample:
    """A conversation, or with `rejected` a preference pair whose answers are left out of `messages`. `tools`: the
    definitions that the conversation was led with."""

    messages: list[Message]
    chosen: str | None = None
    rejected: str | None = None
    tools: list[dict[str, Any]] | None = None


def read_samples(row: Row, schema: Schema, system: str | None) -> list[Sample]:
    """The samples of a row: one; for a seed task one an instance; none where the answer is not to be learned (`label`
    false). `system`: a system message for conversations that have none. Raises RowError that names the field.
    """
    record = to_record(row, schema)
    require_whole(record, schema)
    if schema == "preference":
        start = answer_start(record)
        prompt = [_message(message, "prompt") for message in record["messages"][:start]]
        chosen, rejected = _answer(record["messages"][start:], "chosen"), _answer(record["rejected"], "rejected")
        return [Sample(_with_system(prompt, system), chosen, rejected, record.get("tools"))]
    if record.get("label") is False:
        return []
    place = FIELDS[schema][0]
    return [
        Sample(_with_system([_message(message, place) for message in part["messages"]], system),
               tools=part.get("tools"))
        for part in split(record, "messages")
    ]  # fmt: skip


def require_whole(record: Record, schema: Schema) -> None:
    """Raises RowError where there is nothing to learn: no answer, or no other answer to prefer it to."""
    if not any(message["role"] == "assistant" for message in record["messages"]):
        raise RowError(FIELDS[schema][0], "no message of the assistant, nothing to learn")
    if schema == "preference":
        if "rejected" not in record:
            raise RowError("rejected", "an answer to reject expected, there is none yet")
        if same(record["messages"][answer_start(record) :], record["rejected"]):
            raise RowError("rejected", "the same as chosen, nothing to prefer")


def _answer(messages: list[Message], field: str) -> str:
    if len(messages) != 1 or messages[0].get("tool_calls"):
        raise RowError(field, "one message of the assistant, without tool calls, can be preferred")
    return str(_message(messages[0], field)["content"])


def _message(message: Message, field: str) -> Message:
    """A message as chat templates take it: text for content, a call's arguments as an object."""
    content = message.get("content")
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        raise RowError(field, "only text can be learned from, a message has parts of other types")
    bare = {key: value for key, value in message.items() if key != "tool_calls"}
    found: Message = {"role": "system" if message["role"] == "developer" else message["role"], "content": text_of(bare)}
    if message.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return found | {key: message[key] for key in ("tool_call_id", "name", "weight") if message.get(key) is not None}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.loads(function["arguments"])}}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages
