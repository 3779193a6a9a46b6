"""Six schemas of instruction data and one record between them; what a schema cannot hold is kept in `soma_kept`.

* `alpaca`: instruction, input, output; system; history, a list of [question, answer] (as LLaMA-Factory reads it).
* `alpaca_text`: `text`, that is an Alpaca row in its published prompt (`### Instruction:` …).
* `messages`: OpenAI's, with `tools`, `tool_calls` and results of tools.
* `sharegpt`: conversations of {from, value} (from: system, human, gpt, function_call, observation), system, tools.
* `preference`: prompt, chosen, rejected, texts or messages (DPO); `kto`: prompt, completion, label.
* `seeds`: Self-Instruct's tasks: instruction, instances of {input, output}, is_classification.

The record has `messages` and where there are such: `tools`, `rejected` (messages), `answer` (where the answer begins,
if that is not after the last message of another), `label`, `input` (the part of the question that Alpaca keeps apart),
`instances` (more of them), `form` (how prompt and answers were written), `more` (fields that no schema knows) and
`kept`: by schema, the patch that makes the row of what the record says. A row's `soma_kept` is the patch that makes the
record of what the row says. So every way through any schemas ends where it began, and an edit of a row's own fields
stays.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

from soma.data.instruct import alpaca, conversations, pairs
from soma.data.instruct.checks import RowError
from soma.data.instruct.patch import PatchError, apply, difference

Schema = Literal["alpaca", "alpaca_text", "messages", "sharegpt", "preference", "kto", "seeds"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
Row = dict[str, Any]
Record = dict[str, Any]
KEPT = "soma_kept"
FIELDS: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "alpaca_text": ("text",),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "kto": ("prompt", "completion", "label", "tools"),
    "seeds": ("instruction", "instances", "is_classification"),
}
KNOWN = {KEPT, *(field for fields in FIELDS.values() for field in fields)}


def schema_of(row: Row) -> Schema:
    """The schema that a row's fields tell. Raises RowError where none fits."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if "completion" in row and "prompt" in row:
        return "kto"
    if "instruction" in row:
        return "seeds" if "instances" in row else "alpaca"
    for field, schema in (("messages", "messages"), ("conversations", "sharegpt")):
        if field in row:
            return schema  # type: ignore[return-value]
    if isinstance(row.get("text"), str) and alpaca.parse(row["text"]) is not None:
        return "alpaca_text"
    raise RowError(
        ", ".join(row) or "(empty row)",
        "no known shape; expected `messages`, `conversations`, `instruction` and `output` (or `instances`), `prompt`, "
        "`chosen` and `rejected`, `prompt`, `completion` and `label`, or `text` with `### Instruction:`",
    )


def to_record(row: Row, schema: Schema) -> Record:
    """The record of a row. Raises RowError that names the field."""
    kept = row.get(KEPT)
    own = {key: value for key, value in row.items() if key != KEPT}
    # A row that holds less than the record may lack what is asked of others: a question, say.
    record = _read(own, schema, loose=KEPT in row)
    return _patched(record, kept, f"take {KEPT} out to go on with what the row says") if kept else record


def from_record(record: Record, schema: Schema) -> Row:
    """The row of a record, with what it cannot hold in `soma_kept`."""
    row = _plainly(record, schema)
    if patch := record.get("kept", {}).get(schema):
        row = _patched(row, patch, f"take the {schema} part of {KEPT} out to go on without it")
    kept = difference(_read(row, schema, loose=True), record)
    return row | {KEPT: kept} if kept or not _is_whole(row, schema) else row


def convert(row: Row, source: Schema, target: Schema) -> Row:
    """A row of one schema as one row of another."""
    return from_record(to_record(row, source), target)


def _is_whole(row: Row, schema: Schema) -> bool:
    """Whether the row holds all that is asked of rows that no conversion wrote."""
    try:
        _read(row, schema, loose=False)
    except RowError:
        return False
    return True


def _read(row: Row, schema: Schema, loose: bool) -> Record:
    """The record of a row without `soma_kept`; `loose`: fields may be blank."""
    record = READERS[schema](row, loose)
    if more := {key: value for key, value in row.items() if key not in KNOWN}:
        record["more"] = more
    if patch := difference(_plainly(record, schema), row):
        record["kept"] = {schema: patch}
    return record


def _plainly(record: Record, schema: Schema) -> Row:
    """The row that the record alone gives."""
    return WRITERS[schema](record) | record.get("more", {})


def _patched(value: Any, patch: Any, remedy: str) -> Any:
    try:
        return apply(patch, value)
    except PatchError as error:
        raise RowError(KEPT, f"the row was edited since it was converted ({error}); {remedy}") from None
    except (TypeError, KeyError, AttributeError):
        raise RowError(KEPT, "not what a conversion writes there") from None


READERS: dict[Schema, Callable[[Row, bool], Record]] = {
    "alpaca": conversations.read_alpaca, "alpaca_text": conversations.read_alpaca_text,
    "messages": conversations.read_messages, "sharegpt": conversations.read_sharegpt,
    "preference": pairs.read_preference, "kto": pairs.read_kto, "seeds": conversations.read_seeds,
}  # fmt: skip
WRITERS: dict[Schema, Callable[[Record], Row]] = {
    "alpaca": conversations.write_alpaca, "alpaca_text": conversations.write_alpaca_text,
    "messages": conversations.write_messages, "sharegpt": conversations.write_sharegpt,
    "preference": pairs.write_preference, "kto": pairs.write_kto, "seeds": conversations.write_seeds,
}  # fmt: skip
