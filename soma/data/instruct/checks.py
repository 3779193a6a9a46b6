"""What is asked of the fields of a row. A RowError names the field and says what was expected."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with a row: `field` as a path (`messages[2].role`) and the sentence."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


def text_of(message: Message) -> str:
    """What a message says as one text: the texts of its parts, `[image_url]` for a part of another type, and its tool
    calls as JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts]
    if calls := message.get("tool_calls"):
        texts.append(json.dumps([call["function"] for call in calls], ensure_ascii=False))
    return "\n".join(text for text in texts if text)


def text(row: Mapping[str, Any], field: str, *, optional: bool = False, empty: bool = False, at: str = "") -> str:
    """The text in a field. `optional`: it may be missing or null, `empty`: blank; `at`: the path before it."""
    value = row.get(field)
    if value is None and optional:
        return ""
    if field not in row:
        raise RowError(at + field, "missing")
    return checked_text(value, at + field, empty or optional)


def checked_text(value: Any, field: str, empty: bool = False) -> str:
    """`value`, if it is text that can be stored as UTF-8, and not blank unless `empty`."""
    if not isinstance(value, str):
        raise RowError(field, f"text expected, this is {type(value).__name__}")
    if not value.strip() and not empty:
        raise RowError(field, "empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(field, "holds half of a UTF-16 pair") from None
    return value


def listed(row: Mapping[str, Any], field: str, what: str = "message", empty: bool = False) -> list[Any]:
    """The list in a field, with something in it unless `empty`."""
    value = row.get(field)
    if not isinstance(value, list) or not (value or empty):
        raise RowError(field, "missing" if field not in row else f"a list with at least one {what} expected")
    return value


def objects(
    row: Mapping[str, Any], field: str, keys: str, read: Callable[[dict[str, Any], str], Message], empty: bool = False
) -> list[Message]:
    """The objects of a list, each read by `read(object, path)`; `keys`: what an object is expected to have."""
    found = []
    for number, value in enumerate(listed(row, field, empty=empty)):
        if not isinstance(value, dict):
            raise RowError(f"{field}[{number}]", f"an object with {keys} expected")
        found.append(read(value, f"{field}[{number}]"))
    return found


# --- OpenAI's messages ---

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(row: Mapping[str, Any], field: str, empty: bool = False) -> list[Message]:
    """The messages of a field in OpenAI's form, as they are; `empty`: a blank content or no message is accepted.

    Every tool result must answer a call of the assistant's that came before it.
    """
    calls: set[str] = set()

    def read(message: dict[str, Any], at: str) -> Message:
        role = message.get("role")
        if role not in ROLES:
            raise RowError(f"{at}.role", f"{role!r} is not one of {', '.join(ROLES)}")
        if "tool_calls" in message and message["tool_calls"] is not None:
            if role != "assistant":
                raise RowError(f"{at}.tool_calls", "only the assistant calls tools")
            calls.update(call["id"] for call in check_calls(message, at))
        if role == "tool":
            id = text(message, "tool_call_id", at=f"{at}.")
            if id not in calls:
                raise RowError(f"{at}.tool_call_id", f"{id!r} answers no call before it")
        _check_content(message, at, empty or role == "tool" or bool(message.get("tool_calls")))
        return message

    return objects(row, field, "role and content", read, empty)


def _check_content(message: Message, at: str, empty: bool) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(listed(message, "content", "part")):
            place = f"{at}.content[{number}]"
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise RowError(place, "an object with type expected")
            if part["type"] == "text":
                text(part, "text", empty=empty, at=f"{place}.")
        return
    text(message, "content", optional=bool(message.get("tool_calls")), empty=empty, at=f"{at}.")


def check_calls(message: Message, at: str) -> list[dict[str, Any]]:
    """The tool calls of a message: id, type `function`, function {name, arguments: the text of a JSON object}."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not calls:
        raise RowError(f"{at}.tool_calls", "a list with at least one call expected")
    for number, call in enumerate(calls):
        place = f"{at}.tool_calls[{number}]"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise RowError(place, "an object with id and function expected")
        text(call, "id", at=f"{place}.")
        text(call["function"], "name", at=f"{place}.function.")
        arguments = text(call["function"], "arguments", at=f"{place}.function.")
        if not isinstance(_json(arguments), dict):
            raise RowError(f"{place}.function.arguments", "the text of a JSON object expected")
    return calls


def check_tools(value: Any, field: str) -> list[dict[str, Any]]:
    """Tool definitions: {type: function, function: {name, description, parameters: JSON schema}}."""
    if not isinstance(value, list):
        raise RowError(field, f"a list of tool definitions expected, this is {type(value).__name__}")
    for number, tool in enumerate(value):
        place = f"{field}[{number}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise RowError(place, "an object with type and function expected")
        text(function, "name", at=f"{place}.function.")
        if not isinstance(function.get("parameters", {}), dict):
            raise RowError(f"{place}.function.parameters", "a JSON schema (an object) expected")
    return value


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return None
