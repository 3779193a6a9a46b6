"""Rows of other people's instruction and preference files, checked and brought to one form.

* alpaca: `instruction`, optional `input`, `output`, optional `system`.
* messages: `messages`, a list of {role: system | user | assistant, content}.
* sharegpt: `conversations`, a list of {from: system | human | gpt (or user | assistant), value}, optional `system`.
* preference: `prompt` (text or messages), `chosen`, `rejected` (text, or messages of which the last is the answer).
"""

from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["alpaca", "messages", "sharegpt", "preference"]
Message = dict[str, str]
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(ValueError):
    """What is wrong with a row: `field` as a path (`messages[2].role`) and the sentence."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class Sample:
    """A conversation, or with `rejected` a preference pair whose answers are left out of `messages`."""

    messages: list[Message]
    chosen: str | None = None
    rejected: str | None = None


def shape_of(row: dict[str, Any]) -> Shape:
    """The shape that a row's fields tell. Raises RowError where none fits."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    for field, shape in (("messages", "messages"), ("conversations", "sharegpt"), ("instruction", "alpaca")):
        if field in row:
            return shape  # type: ignore[return-value]
    raise RowError(
        ", ".join(row) or "(empty row)",
        "no known shape; expected `messages`, `conversations`, `instruction` and `output`, or `prompt`, `chosen` and "
        "`rejected`",
    )


def read_row(row: dict[str, Any], shape: Shape, system: str | None) -> Sample:
    """The sample of a row. Raises RowError that names the field."""
    if shape == "preference":
        return _preference(row, system)
    if shape == "alpaca":
        question = _text(row, "instruction")
        extra = _text(row, "input", optional=True)
        messages = [
            {"role": "user", "content": f"{question}\n\n{extra}" if extra else question},
            {"role": "assistant", "content": _text(row, "output")},
        ]
    elif shape == "messages":
        messages = _messages(row, "messages", "role", "content", {role: role for role in ROLES})
    else:
        messages = _messages(row, "conversations", "from", "value", SHAREGPT_ROLES)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(
            "conversations" if shape == "sharegpt" else shape, "no message of the assistant, nothing to learn"
        )
    own = _text(row, "system", optional=True) if shape in ("alpaca", "sharegpt") else ""
    return Sample(_with_system(messages, own or system))


def _preference(row: dict[str, Any], system: str | None) -> Sample:
    prompt: list[Message] | None = None
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row, "prompt", "role", "content", {role: role for role in ROLES})
    elif "prompt" in row:
        prompt = [{"role": "user", "content": _text(row, "prompt")}]
    answers = {}
    for field in ("chosen", "rejected"):
        if isinstance(row.get(field), list):
            messages = _messages(row, field, "role", "content", {role: role for role in ROLES})
            if messages[-1]["role"] != "assistant":
                raise RowError(f"{field}[{len(messages) - 1}].role", "the last message must be the assistant's")
            before = messages[:-1]
            if prompt is not None and before and before != prompt:
                raise RowError(field, "its messages do not start with the prompt that the other fields give")
            prompt, answers[field] = prompt or before, messages[-1]["content"]
        else:
            answers[field] = _text(row, field)
    if not prompt:
        raise RowError("prompt", "missing")
    if answers["chosen"] == answers["rejected"]:
        raise RowError("rejected", "the same as chosen, nothing to prefer")
    return Sample(_with_system(prompt, system), answers["chosen"], answers["rejected"])


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _text(row: dict[str, Any], field: str, optional: bool = False) -> str:
    value = row.get(field)
    if value is None and optional:
        return ""
    if field not in row:
        raise RowError(field, "missing")
    return _checked(value, field, optional)


def _checked(value: Any, field: str, optional: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"text expected, this is {type(value).__name__}")
    if not value.strip() and not optional:
        raise RowError(field, "empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(field, "holds half of a UTF-16 pair") from None
    return value


def _messages(row: dict[str, Any], field: str, role_key: str, content_key: str, roles: dict[str, str]) -> list[Message]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise RowError(field, "missing" if field not in row else "a list with at least one message expected")
    found = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise RowError(place, f"an object with {role_key} and {content_key} expected")
        role = message.get(role_key)
        if role not in roles:
            raise RowError(f"{place}.{role_key}", f"{role!r} is not one of {', '.join(roles)}")
        if content_key not in message:
            raise RowError(f"{place}.{content_key}", "missing")
        found.append({"role": roles[role], "content": _checked(message[content_key], f"{place}.{content_key}")})
    return found
