"""Readers and writers of the schemas of conversations: row ↔ record (see `schemas.py`).

A reader raises RowError for what does not fit; `loose`: blank texts are accepted. A writer gives what its schema holds.
"""

import itertools
import json
from typing import Any

from soma.data.instruct import alpaca
from soma.data.instruct.checks import (
    Message,
    RowError,
    check_messages,
    check_tools,
    checked_text,
    listed,
    objects,
    text,
    text_of,
)

Row = dict[str, Any]
Record = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


# --- Alpaca ---


def _question(instruction: str, extra: str) -> Message:
    return {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}


def read_alpaca(row: Row, loose: bool) -> Record:
    instruction, extra = text(row, "instruction", empty=loose), text(row, "input", optional=True)
    messages = []
    if system := text(row, "system", optional=True):
        messages.append({"role": "system", "content": system})
    for number, pair in enumerate(listed(row, "history", "pair", empty=True) if row.get("history") is not None else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{number}]", "a list of a question and its answer expected")
        for side, role in enumerate(("user", "assistant")):
            said = checked_text(pair[side], f"history[{number}][{side}]", empty=loose)
            messages.append({"role": role, "content": said})
    answer = {"role": "assistant", "content": text(row, "output", empty=loose)}
    record: Record = {"messages": [*messages, _question(instruction, extra), answer]}
    return record | ({"input": extra} if extra else {})


def write_alpaca(record: Record) -> Row:
    system, body = _without_system(record["messages"])
    output = text_of(body.pop()) if body and body[-1]["role"] == "assistant" else ""
    asked = next((message for message in reversed(body) if message["role"] == "user"), None)
    body = body[:-1] if body and body[-1] is asked else body
    question = text_of(asked) if asked else ""
    instruction, extra = _parted(question, record.get("input", ""))
    row: Row = {"instruction": instruction, "input": extra, "output": output}
    if system:
        row["system"] = system
    if body and [message["role"] for message in body] == ["user", "assistant"] * (len(body) // 2):
        said = [text_of(message) for message in body]
        row["history"] = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
    return row


def _without_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """The text of a first system message, and a list of the others."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return text_of(messages[0]), messages[1:]
    return "", list(messages)


def _parted(question: str, extra: str) -> tuple[str, str]:
    """The instruction and the input of a question, where it still ends with that input."""
    if extra and question.endswith(f"\n\n{extra}"):
        return question.removesuffix(f"\n\n{extra}"), extra
    return question, ""


def read_alpaca_text(row: Row, loose: bool) -> Record:
    fields = alpaca.parse(text(row, "text"))
    if fields is None:
        raise RowError("text", "the Alpaca prompt expected, with `### Instruction:` and `### Response:`")
    for name in ("instruction", "output"):
        if not loose and not fields[name].strip():
            raise RowError("text", f"its {name} is empty")
    return read_alpaca(fields | {"system": fields.pop("preamble")}, loose)


def write_alpaca_text(record: Record) -> Row:
    row = write_alpaca(record)
    return {"text": alpaca.render(row["instruction"], row["input"], row["output"], row.get("system", ""))}


# --- Messages and ShareGPT ---


def read_messages(row: Row, loose: bool) -> Record:
    record: Record = {"messages": check_messages(row, "messages", loose)}
    if row.get("tools") is not None:
        record["tools"] = check_tools(row["tools"], "tools")
    return record


def write_messages(record: Record) -> Row:
    return {key: record[key] for key in ("messages", "tools") if key in record}


def read_sharegpt(row: Row, loose: bool) -> Record:
    waiting: list[str] = []
    calls = itertools.count()

    def read(turn: dict[str, Any], at: str) -> Message:
        speaker = turn.get("from")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"{at}.from", f"{speaker!r} is not one of {', '.join(SHAREGPT_ROLES)}")
        said = text(turn, "value", empty=loose or SHAREGPT_ROLES[speaker] == "tool", at=f"{at}.")
        if speaker == "function_call":
            found = [_call(call, f"call_{next(calls)}", f"{at}.value") for call in _calls(said, f"{at}.value")]
            waiting[:] = [call["id"] for call in found]
            return {"role": "assistant", "content": None, "tool_calls": found}
        message: Message = {"role": SHAREGPT_ROLES[speaker], "content": said}
        if message["role"] == "tool":
            if not waiting and not loose:
                raise RowError(f"{at}.from", f"{speaker!r} answers no function_call before it")
            message["tool_call_id"] = waiting.pop(0) if waiting else "call_?"
        return message

    record: Record = {"messages": objects(row, "conversations", "from and value", read, loose)}
    system = text(row, "system", optional=True)
    if system and record["messages"][:1] and record["messages"][0]["role"] != "system":
        record["messages"].insert(0, {"role": "system", "content": system})
        record["system_field"] = True
    if row.get("tools"):
        record["tools"] = _sharegpt_tools(row["tools"])
    return record


def _calls(said: str, at: str) -> list[Any]:
    try:
        value = json.loads(said)
    except ValueError:
        raise RowError(at, "a call as JSON expected: {name, arguments}, or a list of such") from None
    return value if isinstance(value, list) else [value]


def _call(call: Any, id: str, at: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError(at, "a call as JSON expected: {name, arguments}, or a list of such")
    arguments = call.get("arguments", {})
    said = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": call["name"], "arguments": said}}


def _sharegpt_tools(value: Any) -> list[dict[str, Any]]:
    """Tools, as a list or its JSON, of OpenAI's definitions or of bare functions."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("tools", "a list of tools, or its JSON, expected") from None
    if isinstance(value, list):
        value = [
            {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
            for tool in value
        ]
    return check_tools(value, "tools")


def write_sharegpt(record: Record) -> Row:
    system, messages = _without_system(record["messages"])
    field = bool(system and record.get("system_field") and messages)
    turns = [_turn(message) for message in (messages if field else record["messages"])]
    row: Row = {"conversations": turns}
    if field:
        row["system"] = system
    if "tools" in record:
        row["tools"] = json.dumps([tool["function"] for tool in record["tools"]], ensure_ascii=False)
    return row


def _turn(message: Message) -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation", "developer": "system"}
    if not message.get("tool_calls"):
        return {"from": speakers.get(message["role"], message["role"]), "value": text_of(message)}
    calls = []
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        calls.append({"name": call["function"]["name"], "arguments": arguments})
    return {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)}


# --- Self-Instruct's seeds ---


def read_seeds(row: Row, loose: bool) -> Record:
    instruction = text(row, "instruction", empty=loose)

    def read(value: dict[str, Any], at: str) -> Row:
        given = text(value, "input", optional=True, at=f"{at}.")
        return {"input": given, "output": text(value, "output", empty=loose, at=f"{at}.")}

    first, *others = objects(row, "instances", "input and output", read)
    record = read_alpaca({"instruction": instruction, **first}, loose)
    kind = row.get("is_classification")
    if kind is not None:
        if not isinstance(kind, bool):
            raise RowError("is_classification", f"true or false expected, this is {type(kind).__name__}")
        record["is_classification"] = kind
    return record | ({"instances": others} if others else {})


def write_seeds(record: Record) -> Row:
    row = write_alpaca(record)
    instances = [{"input": row["input"], "output": row["output"]}, *record.get("instances", [])]
    found: Row = {"instruction": row["instruction"], "instances": instances}
    if "is_classification" in record:
        found["is_classification"] = record["is_classification"]
    return found
