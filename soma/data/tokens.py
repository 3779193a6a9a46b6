"""Token shards: written by the tokenize stages, read memory-mapped by the loader.

`<split>-00000.bin` holds ids (uint16 or uint32, little endian) of documents one after the other, `.offsets.bin` where
each starts (uint64, one more than there are documents), `.mask.bin` one byte per token for chat data (1: loss on
predicting it). A document never crosses shards. Preference data has the splits `train.chosen`, `train.rejected`,
`validation.chosen`, `validation.rejected`; document i of the one belongs to document i of the other, both starting
with the same prompt.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import numpy as np

from soma.base import progress
from soma.base.artefact import write_json
from soma.base.errors import UserError
from soma.data.corpus import SPLITS, read_corpus
from soma.data.store import FORMAT, VERSION
from soma.data.words import DocumentEncoder
from soma.model.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27
BATCH_ROWS, BATCH_BYTES = 1024, 4 << 20
ROLES = ("ids", "offsets", "mask")

X = TypeVar("X")
Y = TypeVar("Y")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32; little endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_file(split: str, shard: int, role: str) -> str:
    """`train-00000.bin`, `train-00000.offsets.bin`, `train-00000.mask.bin`."""
    return f"{split}-{shard:05d}{'' if role == 'ids' else '.' + role}.bin"


class _ShardFile:
    """One growing file and the hash of what went into it."""

    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115
        self.digest = sha256()

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self.file.write(data)
        self.digest.update(data)

    def close(self) -> str:
        self.file.close()
        return self.digest.hexdigest()


class SplitWriter:
    """Writes the shards of one split. `with SplitWriter(...) as writer: writer.add(ids); entry = writer.entry()`."""

    def __init__(self, out: Path, split: str, vocab_size: int, masked: bool, shard_tokens: int = SHARD_TOKENS) -> None:
        self.out, self.split, self.masked, self.shard_tokens = out, split, masked, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.shards: list[dict[str, Any]] = []
        self.text_bytes = 0
        self._open()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, ids: Sequence[int] | np.ndarray, mask: Sequence[int] | None = None, text_bytes: int = 0) -> None:
        """Append one document: its ids as they are stored, and for masked data its mask of the same length."""
        assert (mask is not None) == self.masked
        assert mask is None or len(mask) == len(ids)
        if self.ends[-1] and self.ends[-1] + len(ids) > self.shard_tokens:
            self._close()
            self._open()
        self.files["ids"].write(np.asarray(ids, self.dtype))
        if mask is not None:
            self.files["mask"].write(np.asarray(mask, np.uint8))
        self.ends.append(self.ends[-1] + len(ids))
        self.text_bytes += text_bytes

    def entry(self) -> dict[str, Any]:
        """The split's part of index.json. Call it after the `with` block."""
        return {
            "shards": self.shards, "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": sum(shard["documents"] for shard in self.shards), "bytes": self.text_bytes,
        }  # fmt: skip

    def _open(self) -> None:
        roles = ROLES if self.masked else ROLES[:2]
        self.files = {role: _ShardFile(self.out / shard_file(self.split, len(self.shards), role)) for role in roles}
        self.ends = [0]

    def _close(self) -> None:
        self.files["offsets"].write(np.asarray(self.ends, "<u8"))
        hashes = {role: file.close() for role, file in self.files.items()}
        shard = {
            "file": shard_file(self.split, len(self.shards), "ids"), "tokens": self.ends[-1], "documents":
            len(self.ends) - 1, "sha256": hashes["ids"], "offsets_sha256": hashes["offsets"],
        }  # fmt: skip
        if self.masked:
            shard["mask_sha256"] = hashes["mask"]
        self.shards.append(shard)


def write_index(
    out: Path, vocab_size: int, tokenizer_hash: str, eos_id: int, masked: bool, splits: dict[str, Any], **more: Any
) -> None:
    """`index.json`, written last: a folder without it is not whole."""
    write_json(
        out / "index.json",
        {
            "format": FORMAT, "version": VERSION, "dtype": token_dtype(vocab_size).name, "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash, "eos_id": eos_id, "masked": masked, "splits": splits, **more,
        },
    )  # fmt: skip


# --- Stages ---


def tokenize_corpus(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Fill `out` with the token shards of a corpus: each document's ids, then the end-of-text id.

    The names of special tokens inside a text are encoded as the plain characters that they are.
    """
    runtime, eos_id = _load(tokenizer)
    encode = partial(_encode_rows, DocumentEncoder(runtime, eos_id, token_dtype(runtime.vocab_size)))
    splits = {}
    with progress.current().task("tokenize", unit="bytes") as task:
        for split in SPLITS:
            with SplitWriter(out, split, runtime.vocab_size, masked=False) as writer:
                batches = _batches(read_corpus(corpus, split, ["text", "n_bytes"]))
                for rows, documents in one_ahead(encode, batches):
                    for row, ids in zip(rows, documents, strict=True):
                        writer.add(ids, text_bytes=row["n_bytes"])
                    task.advance(sum(row["n_bytes"] for row in rows))
            splits[split] = writer.entry()
    write_index(out, runtime.vocab_size, runtime.hash, eos_id, masked=False, splits=splits)


def tokenize_instruct(corpus: Path, tokenizer: Path, out: Path, max_tokens: int | None = None) -> None:
    """Fill `out` with masked token shards of conversations (`messages`) or preference pairs, by the tokenizer's chat
    template.

    Left out and counted in index.json as `left_out`: samples of more than `max_tokens` tokens (`too_long`; the loader
    leaves out what is longer than its sequences besides), without any token to learn (`no_answer`). The names of
    special tokens in a message are encoded as characters; only the template's own are special.
    """
    runtime, eos_id = _load(tokenizer)
    if not runtime.has_chat_template:
        raise UserError(f"{tokenizer}: no chat template in its tokenizer_config.json; conversations cannot be rendered")
    preference = "chosen" in _columns(corpus)
    sides = ("chosen", "rejected") if preference else ("messages",)
    splits: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    with progress.current().task("tokenize", unit="samples") as task:
        for split in SPLITS:
            with ExitStack() as stack:
                writers = {
                    side: stack.enter_context(
                        SplitWriter(out, f"{split}.{side}" if preference else split, runtime.vocab_size, masked=True)
                    )
                    for side in sides
                }
                for row in read_corpus(corpus, split):
                    task.advance(1)
                    conversations = _conversations(row, preference)
                    tools = json.loads(row.get("tools") or "null") or None
                    try:
                        encoded = _encode(runtime, conversations, tools, max_tokens)
                    except UserError as error:
                        raise UserError(f"{tokenizer}, with {row['source']}: {error}") from None
                    if isinstance(encoded, str):
                        left_out[encoded] += 1
                        continue
                    for side, (ids, mask), messages in zip(sides, encoded, conversations, strict=True):
                        size = sum(len(message["content"].encode()) for message in messages)
                        writers[side].add(ids, mask, text_bytes=size)
            splits |= {writer.split: writer.entry() for writer in writers.values()}
    for reason, count in sorted(left_out.items()):
        progress.current().note(f"{count} samples left out: {reason}")
    more = {"left_out": dict(left_out), "preference": preference}
    write_index(out, runtime.vocab_size, runtime.hash, eos_id, masked=True, splits=splits, **more)


def _encode_rows(encoder: DocumentEncoder, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return encoder.encode([row["text"] for row in rows])


def one_ahead(function: Callable[[X], Y], items: Iterable[X]) -> Iterator[tuple[X, Y]]:
    """(item, its result), in order; the next result is computed in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[X, Future[Y]] | None = None
        for item in items:
            ready, waiting = waiting, (item, pool.submit(function, item))
            if ready is not None:
                yield ready[0], ready[1].result()
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _load(tokenizer: Path) -> tuple[Tokenizer, int]:
    runtime = Tokenizer.load(tokenizer)
    if not runtime.eos_ids:
        raise UserError(f"{tokenizer}: the tokenizer has no eos_token; documents cannot be told apart")
    return runtime, runtime.eos_ids[0]


def _columns(corpus: Path) -> set[str]:
    import pyarrow.parquet as pq

    for path in sorted(corpus.glob("train-[0-9]*.parquet")):
        return set(pq.read_schema(path).names)
    return set()


def _conversations(row: dict[str, Any], preference: bool) -> list[list[dict[str, Any]]]:
    """The sample's conversations: one, or prompt + chosen and prompt + rejected."""
    if not preference:
        if "messages" not in row:
            raise UserError(
                "this corpus has no column `messages`; make instruction pairs first (`instruct` in the recipe)"
            )
        return [json.loads(row["messages"])]
    prompt = json.loads(row["prompt_messages"])
    return [[*prompt, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]


def _encode(
    runtime: Tokenizer,
    conversations: list[list[dict[str, Any]]],
    tools: list[dict[str, Any]] | None,
    max_tokens: int | None,
) -> list[tuple[list[int], list[int]]] | str:
    """Ids and masks of each conversation, or the reason why the sample is left out."""
    encoded = [runtime.encode_chat_masked(messages, tools) for messages in conversations]
    if max_tokens is not None and any(len(ids) > max_tokens for ids, _ in encoded):
        return "too_long"
    if not all(any(mask[1:]) for _, mask in encoded):
        return "no_answer"
    return encoded


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most `BATCH_ROWS` rows and about `BATCH_BYTES` of text."""
    found: list[dict[str, Any]] = []
    total = 0
    for row in rows:
        found.append(row)
        total += row["n_bytes"]
        if len(found) == BATCH_ROWS or total >= BATCH_BYTES:
            yield found
            found, total = [], 0
    if found:
        yield found
