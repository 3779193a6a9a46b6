"""Corpora, instruction files and request logs as dialogues of sentences, whose acts are then told."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from soma.base.errors import UserError
from soma.data.acts.acts import Turn

CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
LETTER = re.compile(r"[^\W\d_]")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
BESIDE = ("attributes-", "dropped", "contamination")  # tables of a corpus folder that are not its rows
COLUMNS = (
    "messages", "prompt_messages", "chosen", "instruction", "input", "output", "prompt", "completion", "text",
)  # fmt: skip
KINDS = (".jsonl", ".json", ".gz", ".parquet", ".txt")


def read_turns(path: Path) -> Iterator[list[Turn]]:
    """The rows of a file or folder, each as its sentences in order; `speaker` is the role, or `text` in a document.

    A folder's `.parquet` and `.jsonl` files are read (a corpus, a service's request log). Rows hold `messages`
    (or `conversations`, `prompt_messages`, JSON in a string too), `instruction` with `output`, `prompt`,
    `completion`, or `text`. Code between fences is left out. Raises UserError where there is nothing to read.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl") and _own(file))
    if not files or not files[0].exists():
        raise UserError(f"{path}: no {' '.join(KINDS[:1] + KINDS[3:4])} file there")
    seen = False
    for file in files:
        for row in _rows(file):
            turns = [turn for speaker, text in said(row) for turn in sentences(speaker, text)]
            if turns:
                seen = True
                yield turns
    if not seen:
        raise UserError(f"{path}: no row with messages, instruction, prompt or text in it")


def said(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(speaker, text) of a row, whatever its shape."""
    for key in ("messages", "conversations", "prompt_messages", "prompt"):
        value = row.get(key)
        if isinstance(value, str) and value.startswith("["):
            with suppress(ValueError):  # a prompt may begin with a bracket and be no JSON
                value = json.loads(value)
        if isinstance(value, list):
            for message in value:
                if isinstance(message, Mapping):
                    role = str(message.get("role") or message.get("from") or "user")
                    yield ROLES.get(role, role), _plain(message.get("content") or message.get("value"))
            break
        if isinstance(value, str) and key == "prompt":
            yield "user", value
    if isinstance(row.get("instruction"), str):
        yield "user", "\n".join(filter(None, [row["instruction"], _plain(row.get("input"))]))
    for key in ("output", "completion", "chosen"):
        if isinstance(row.get(key), str) and (key != "output" or "instruction" in row):
            yield "assistant", row[key]
    if isinstance(row.get("text"), str) and "messages" not in row:
        yield "text", row["text"]


def sentences(speaker: str, text: str) -> list[Turn]:
    """The sentences of a text that have a letter in them, without fenced code."""
    found = (" ".join(part.split()) for part in SENTENCE.split(CODE.sub("\n", text)))
    return [Turn(speaker, part) for part in found if LETTER.search(part)]


def _plain(content: Any) -> str:
    """Text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _own(file: Path) -> bool:
    return not file.name.startswith(BESIDE) and not any(part.startswith(".") for part in file.parts)


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.ParquetFile(file)
            for batch in table.iter_batches(
                512, columns=[name for name in COLUMNS if name in table.schema_arrow.names]
            ):
                yield from batch.to_pylist()
            return
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            if file.suffix == ".json":
                yield from (row for row in json.load(lines) if isinstance(row, dict))
                return
            for number, line in enumerate(lines, 1):
                if file.suffix == ".txt":
                    yield {"text": line}
                elif line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{file}, line {number}: not valid JSON ({error})") from None
                    if isinstance(row, dict):
                        yield row
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
