"""Offline batch: a file of prompts in, a file of answers out. What `soma generate` runs.

Answers go, as they come, to `OUT.partial` (JSON lines: a head, then one object per row). When all rows are there the
output is written in the order of the rows and the partial file goes. Started again after it was interrupted, the same
command reads the partial file and makes what is missing.
"""

import dataclasses
import hashlib
import json
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.params import MASK64, SamplingParams
from soma.engine.request import Request, TokenEvent
from soma.model.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".parquet")
COLUMNS = ("row", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error")
BATCH_ROWS = 1024  # of a Parquet file in memory at a time

Row = dict[str, Any]


@dataclass
class Summary:
    """What a batch came to. `failed`: row numbers (from 1) and why."""

    rows: int = 0
    reused: int = 0  # rows that an earlier, interrupted run had made
    completion_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)


def generate_file(
    engine: Engine, tokenizer: Tokenizer, source: Path, out: Path, params: SamplingParams,
    encode: Callable[[Tokenizer, str], list[int]], identity: str = "", adapter: str | None = None,
) -> Summary:  # fmt: skip
    """Answer every row of `source` (JSONL or Parquet) into `out` (JSONL or Parquet, by its suffix).

    A row has `prompt` (text) or `messages` (a list of {role, content}, or such a list as JSON text, for the chat
    template). Output rows have the columns `COLUMNS`; a row that cannot be answered has only `row` and `error`, and
    stops nobody else. With a seed row r draws from seed + r. `encode` gives a plain prompt's ids; `identity` says which
    model this is, for the check that an interrupted run goes on with the same one. `adapter`: name of a loaded one.
    Raises UserError: no such file, unknown suffix, output already there, partial output of another run.
    """
    for path in (source, out):
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or write to another file")
    partial = out.with_name(out.name + ".partial")
    head = {"source": file_hash(source), "model": identity, "params": dataclasses.asdict(params)}
    done = read_partial(partial, head)
    summary = Summary(reused=len(done))
    reporter = progress.current()
    if done:
        reporter.note(f"{out}: going on after {len(done)} rows that are there already")
    with open(partial, "a", encoding="utf-8") as file, reporter.task("generate", count_rows(source), "rows") as task:
        task.skip(len(done))
        if file.tell() == 0:
            write_line(file, head)
        todo = ((number, row) for number, row in enumerate(read_rows(source), start=1) if number not in done)
        for result in run_rows(engine, tokenizer, todo, params, encode, adapter):
            write_line(file, result)
            done[result["row"]] = result
            task.advance()
    results = [done[number] for number in sorted(done)]
    write_results(results, out)
    partial.unlink()
    summary.rows = len(results)
    for result in results:
        summary.completion_tokens += result.get("completion_tokens") or 0
        if result.get("error") is not None:
            summary.failed[result["row"]] = result["error"]
    report(reporter, summary)
    return summary


def run_rows(
    engine: Engine, tokenizer: Tokenizer, rows: Iterator[tuple[int, Row | str]], params: SamplingParams,
    encode: Callable[[Tokenizer, str], list[int]], adapter: str | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Results in the order in which they are ready; the engine always has as many rows as it can take."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    events: dict[int, list[TokenEvent]] = {}
    requests: dict[int, Request] = {}
    most = engine.max_running + engine.max_waiting

    def listener(number: int) -> Callable[[TokenEvent], None]:
        def deliver(event: TokenEvent) -> None:
            events[number].append(event)
            if event.finish_reason is not None:
                ended.put(number)

        return deliver

    def collect() -> Row:
        number = ended.get()
        made, request = events.pop(number), requests.pop(number)
        if made[-1].finish_reason in ("error", "abort"):
            return {"row": number, "error": made[-1].error or "the engine stopped"}
        return {
            "row": number, "text": "".join(event.text for event in made), "finish_reason": made[-1].finish_reason,
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": sum(event.id is not None for event in made),
        }  # fmt: skip

    try:
        for number, row in rows:
            try:
                ids = row_ids(tokenizer, row, encode)
                one = params if params.seed is None else replace(params, seed=(params.seed + number) & MASK64)
                engine.check(ids, one)
            except UserError as error:
                yield {"row": number, "error": str(error)}
                continue
            while len(events) >= most:
                yield collect()
            events[number] = []
            requests[number] = engine.submit(ids, one, listener(number), adapter=adapter)
        while events:
            yield collect()
    finally:  # interrupted: leave nothing running
        for request in requests.values():
            request.cancel()
        while requests:
            del requests[ended.get()]


def row_ids(tokenizer: Tokenizer, row: Row | str, encode: Callable[[Tokenizer, str], list[int]]) -> list[int]:
    """Ids of a row's prompt or conversation. Raises UserError."""
    if isinstance(row, str):
        raise UserError(row)
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise UserError("the row needs either prompt or messages")
    if messages is None:
        if not isinstance(prompt, str):
            raise UserError(f"prompt must be text, got {type(prompt).__name__}")
        return encode(tokenizer, prompt)
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise UserError(f"messages is not valid JSON: {error}") from None
    good = isinstance(messages, list) and messages and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in messages
    )  # fmt: skip
    if not good:
        raise UserError("messages must be a list of objects with role and content, both text")
    return tokenizer.encode_chat(messages, True)


def read_rows(source: Path) -> Iterator[Row | str]:
    """Rows of a file; a line that is no JSON object comes as a text that says so. Empty lines are no rows."""
    if source.suffix == ".parquet":
        for batch in parquet().ParquetFile(source).iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()
        return
    with open(source, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"not valid JSON: {error}"
                continue
            yield row if isinstance(row, dict) else "the row must be a JSON object"


def count_rows(source: Path) -> int:
    """How many rows `read_rows` gives."""
    if source.suffix == ".parquet":
        try:
            return int(parquet().ParquetFile(source).metadata.num_rows)
        except ValueError as error:  # pyarrow's errors about broken files
            raise UserError(f"{source}: not a Parquet file ({error})") from None
    with open(source, "rb") as file:
        return sum(1 for line in file if line.strip())


def read_partial(partial: Path, head: dict[str, Any]) -> dict[int, Row]:
    """Rows that an interrupted run of the same work has made, by number; half a line at the end is cut off."""
    if not partial.is_file():
        return {}
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        partial.unlink()
        return {}
    if json.loads(lines[0]) != json.loads(json.dumps(head, default=list)):
        raise UserError(f"{partial}: was made from another input, model or settings; remove it, or write elsewhere")
    if len(whole) < len(data):
        os.truncate(partial, len(whole))
    rows = [json.loads(line) for line in lines[1:]]
    return {row["row"]: row for row in rows}


def write_line(file: TextIO, value: dict[str, Any]) -> None:
    """One line, at once in the operating system's hands: it survives this process's end."""
    file.write(json.dumps(value, ensure_ascii=False, default=list) + "\n")
    file.flush()


def write_results(results: Sequence[Row], out: Path) -> None:
    """The output file, whole or not at all. Columns that no row has are null."""
    made = out.with_name(out.name + ".new")
    rows = [{column: result.get(column) for column in COLUMNS} for result in results]
    if out.suffix == ".parquet":
        import pyarrow

        kinds = {"row": pyarrow.int64(), "prompt_tokens": pyarrow.int64(), "completion_tokens": pyarrow.int64()}
        schema = pyarrow.schema([(column, kinds.get(column, pyarrow.string())) for column in COLUMNS])
        parquet().write_table(pyarrow.Table.from_pylist(rows, schema), made)
    else:
        with open(made, "w", encoding="utf-8") as file:
            for row in rows:
                write_line(file, row)
    os.replace(made, out)


def parquet() -> Any:
    """pyarrow's Parquet module. UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'somacube[data]', or use .jsonl") from None
    return pyarrow.parquet


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report(reporter: progress.Reporter, summary: Summary) -> None:
    """Say how many rows failed, which, and why the first did."""
    if not summary.failed:
        return
    numbers = sorted(summary.failed)
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    reporter.note(
        f"{len(numbers)} of {summary.rows} rows could not be answered: {shown} "
        f"(row {numbers[0]}: {summary.failed[numbers[0]]})"
    )
