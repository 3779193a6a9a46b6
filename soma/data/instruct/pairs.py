"""Readers and writers of preference pairs (DPO) and of judged answers (KTO): row ↔ record (see `schemas.py`)."""

from typing import Any

from soma.data.instruct.checks import Message, RowError, check_messages, check_tools, text
from soma.data.instruct.patch import difference

Row = dict[str, Any]
Record = dict[str, Any]


def answer_start(record: Record) -> int:
    """Where the answer begins: after the last message that is not the assistant's, unless the record says another."""
    if "answer" in record:
        return int(record["answer"])
    return _last_other(record["messages"])


def _last_other(messages: list[Message]) -> int:
    return max((index + 1 for index, message in enumerate(messages) if message["role"] != "assistant"), default=0)


def _read_pair(row: Row, loose: bool, sides: tuple[str, ...]) -> Record:
    """A prompt and its answers, in the fields `sides` of which the first is the good one."""
    prompt, prompt_form = _read_prompt(row, loose)
    answers: dict[str, list[Message]] = {}
    forms = []
    for side in sides:
        if side == "rejected" and side in row and row[side] is None:
            continue  # none is known yet
        if not isinstance(row.get(side), list):
            answers[side] = [{"role": "assistant", "content": text(row, side, empty=loose)}]
            forms.append("text")
            continue
        messages = check_messages(row, side, loose)
        if not loose and messages[-1]["role"] != "assistant":
            raise RowError(f"{side}[{len(messages) - 1}].role", "the last message must be the assistant's")
        answers[side] = messages
        forms.append("messages")
    if prompt is None and set(forms) == {"messages"}:
        prompt, prompt_form = _shared_start(list(answers.values())), "whole"
    if prompt is None or (not prompt and not loose):
        raise RowError("prompt", "missing")
    size = len(prompt)
    for side, messages in answers.items():
        if size and difference({"": messages[:size]}, {"": prompt}) == []:
            answers[side] = messages[size:]
            prompt_form = f"{prompt_form}+whole" if prompt_form in ("text", "messages") else prompt_form
        elif not loose and any(message["role"] in ("user", "system") for message in messages):
            raise RowError(side, "its messages do not start with the prompt that the other fields give")
    record: Record = {"messages": [*prompt, *answers[sides[0]]]}
    if "rejected" in answers:
        record["rejected"] = answers["rejected"]
    if size != _last_other(record["messages"]):
        record["answer"] = size
    form = prompt_form if "whole" in prompt_form else f"{prompt_form}+{forms[0]}"
    return record | ({} if form == _usual_form(record) else {"form": form})


def _read_prompt(row: Row, loose: bool) -> tuple[list[Message] | None, str]:
    if isinstance(row.get("prompt"), list):
        return check_messages(row, "prompt", loose), "messages"
    if "prompt" in row:
        return [{"role": "user", "content": text(row, "prompt", empty=loose)}], "text"
    return None, ""


def _shared_start(answers: list[list[Message]]) -> list[Message]:
    """The messages that both answers begin with, or all of one before the assistant's last."""
    if len(answers) == 1:
        return answers[0][: _last_other(answers[0])]
    size = 0
    while size < min(map(len, answers)) - 1 and not difference({"": answers[0][size]}, {"": answers[1][size]}):
        size += 1
    return answers[0][:size]


def _usual_form(record: Record) -> str:
    """Texts where nothing is lost by that, else messages."""
    start = answer_start(record)
    prompt, answers = record["messages"][:start], [record["messages"][start:]]
    answers += [record["rejected"]] if "rejected" in record else []
    simple = _bare(prompt, "user") and all(_bare(answer, "assistant") for answer in answers)
    return "text+text" if simple else "messages+messages"


def _bare(messages: list[Message], role: str) -> bool:
    """Whether a text says all of these messages."""
    return (
        len(messages) == 1
        and set(messages[0]) == {"role", "content"}
        and messages[0]["role"] == role
        and isinstance(messages[0]["content"], str)
    )


def _write_pair(record: Record, sides: tuple[str, ...]) -> Row:
    start = answer_start(record)
    prompt = record["messages"][:start]
    answers = {sides[0]: record["messages"][start:]}
    if "rejected" in sides and "rejected" in record:
        answers["rejected"] = record["rejected"]
    form = record.get("form", _usual_form(record))
    if "text" in form.split("+")[0] and not _bare(prompt, "user"):
        form = "messages+messages"
    if form.endswith("text") and not all(_bare(answer, "assistant") for answer in answers.values()):
        form = "messages+messages"
    if form == "whole" and "rejected" not in sides:
        form = "messages+messages"
    row: Row = {}
    if form != "whole":
        row["prompt"] = prompt[0]["content"] if form.startswith("text") else prompt
    for side, messages in answers.items():
        whole = [*prompt, *messages] if form.endswith("whole") else messages
        row[side] = messages[0]["content"] if form.endswith("text") else whole
    if "rejected" in sides:
        row.setdefault("rejected", None)
    return row | ({"tools": record["tools"]} if "tools" in record else {})


def read_preference(row: Row, loose: bool) -> Record:
    return _read_pair(row, loose, ("chosen", "rejected")) | _tools(row)


def write_preference(record: Record) -> Row:
    return _write_pair(record, ("chosen", "rejected"))


def read_kto(row: Row, loose: bool) -> Record:
    if not isinstance(row.get("label"), bool):
        problem = f"true or false expected, this is {type(row['label']).__name__}" if "label" in row else "missing"
        raise RowError("label", problem)
    return _read_pair(row, loose, ("completion",)) | {"label": row["label"]} | _tools(row)


def write_kto(record: Record) -> Row:
    return _write_pair(record, ("completion",)) | {"label": record.get("label", True)}


def _tools(row: Row) -> Record:
    return {} if row.get("tools") is None else {"tools": check_tools(row["tools"], "tools")}
