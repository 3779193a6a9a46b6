"""`soma index`: files to chunks to vectors to the store, again and again.

A file's content hash says whether it is there already: then it is neither cut nor encoded nor written. A file that
changed gets its new chunks first and loses its old ones after, so a search always finds one of the two; a file that is
gone loses all. The last chunk of a file says that it is the last, so a file that a killed run wrote half is seen to be
incomplete and written again, to the same ids.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from soma.base import progress
from soma.base.artefact import json_hash
from soma.base.errors import UserError
from soma.base.secrets import identity_url
from soma.data.readers import Document, Dropped, read_item
from soma.data.sources import STDLIB, Item, Skipped, list_items
from soma.serve.retrieval.chunks import Chunk, cut
from soma.serve.retrieval.encoders import TextEncoder, check_same, describe, named
from soma.serve.retrieval.store import Description, Entry, Held, Store
from soma.serve.retrieval.words import document_weights

FORMAT = 1  # counts up when chunks of the same files come out differently
BATCH = 64  # chunks encoded and written at once
WORDS_PER_TOKEN = 0.6  # of a chunk that is cut to a budget: chunks are not quite full, words have 1.3 tokens or so
TITLE_KEYS = ("title", "meta.title", "metadata.title", "name")


@dataclass(frozen=True)
class Cutting:
    """How files are read and cut: the longest chunk and what of it the next one repeats, in tokens; the field of rows
    that has the text."""

    chunk_tokens: int = 256
    overlap: int = 32
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.chunk_tokens < 16:
            raise UserError(f"chunk-tokens is {self.chunk_tokens}; at least 16 make a passage")
        if not 0 <= self.overlap <= self.chunk_tokens // 2:
            raise UserError(f"overlap is {self.overlap}; expected 0 to {self.chunk_tokens // 2}, half a chunk")

    @property
    def key(self) -> str:
        return json_hash([FORMAT, self.chunk_tokens, self.overlap, self.text_field])


@dataclass
class Report:
    """What a run did, in files, chunks and tokens; `passed_over`: files of kinds that are not read from
    folders; `problems`: what else was not read, with the reason."""

    unchanged: int = 0
    written: int = 0
    removed: int = 0
    passed_over: int = 0
    chunks: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = (
            f"{self.written} files written ({self.chunks} chunks), {self.unchanged} unchanged, {self.removed} removed"
        )
        told += f", {self.passed_over} of other kinds passed over" if self.passed_over else ""
        return told + (f", {len(self.problems)} problems" if self.problems else "")


def open_index(store: Store, encoder: TextEncoder, shown: str, cutting: Cutting) -> Description:
    """What the index was made with; where it is not there it is made. Raises UserError: another encoder."""
    description = store.describe()
    if description is not None:
        check_same(description, encoder, shown)
        return description
    description = describe(encoder, WORDS_PER_TOKEN * cutting.chunk_tokens)
    store.create(description)
    progress.current().note(
        f"new index {shown}: encoder {encoder.reference}, {named(encoder.hash)}, {description.dimensions} dimensions"
    )
    return description


def index(store: Store, encoder: TextEncoder, sources: Sequence[str], shown: str, cutting: Cutting) -> Report:
    """Bring the index up to what `sources` hold now. Raises UserError: a source that does not exist, chunks longer
    than the encoder takes, another encoder; what is written by then stays, and the same command goes on."""
    if encoder.max_tokens is not None and cutting.chunk_tokens > encoder.max_tokens:
        raise UserError(f"chunk-tokens is {cutting.chunk_tokens}; the encoder {encoder.reference} takes at most "
                        f"{encoder.max_tokens} tokens")  # fmt: skip
    listed = [(origin_of(source), list(list_items([source]))) for source in sources]
    description = open_index(store, encoder, shown, cutting)
    run = Run(store, encoder, description, cutting, store.hashes())
    total = sum(len(items) for _, items in listed)
    with progress.current().task("index", total, "files") as task:
        for origin, items in listed:
            for item in items:
                run.take(origin, item)
                task.advance(1, chunks=run.report.chunks)
        run.flush()
    origins = {origin for origin, _ in listed}
    for origin, file in sorted(run.known.keys() - run.seen):
        if origin in origins:
            store.delete(origin, file)
            run.report.removed += 1
    return run.report


def forget(store: Store, sources: Sequence[str]) -> int:
    """Take out everything that came from `sources`; how many files. Raises UserError for what never came in."""
    known = store.hashes()
    origins = [origin_of(source) for source in sources]
    for source, origin in zip(sources, origins, strict=True):
        if all(each != origin for each, _ in known):
            have = ", ".join(sorted({each for each, _ in known})) or "nothing"
            raise UserError(f"{source}: nothing in the index came from there; it has {have}")
    gone = [(origin, file) for origin, file in known if origin in origins]
    for origin, file in gone:
        store.delete(origin, file)
    return len(gone)


def origin_of(source: str) -> str:
    """A source's name in the index: a path is made absolute, an address loses its secrets."""
    if source == STDLIB:
        return source
    return identity_url(source) if "://" in source else os.path.abspath(Path(source).expanduser())


class Run:
    """One pass over the sources."""

    def __init__(
        self, store: Store, encoder: TextEncoder, description: Description, cutting: Cutting,
        known: dict[tuple[str, str], dict[str, Held]],
    ) -> None:  # fmt: skip
        self.store, self.encoder, self.description, self.cutting = store, encoder, description, cutting
        self.known = known
        self.seen: set[tuple[str, str]] = set()
        self.report = Report()
        self.waiting: list[Chunk] = []
        self.done: list[tuple[str, str, str]] = []  # files whose chunks are all written or wait

    def take(self, origin: str, item: Item | Skipped) -> None:
        """One file."""
        if isinstance(item, Skipped):
            if item.reason == "unknown_kind":
                self.report.passed_over += 1
            else:
                self.report.problems.append(f"{item.name}: {item.reason}: {item.detail}")
            if item.reason == "unreadable":  # what the index has of it stays
                self.seen.add((origin, item.name))
            return
        if (origin, item.name) in self.seen:
            return
        self.seen.add((origin, item.name))
        content = item.content_hash()
        if content.startswith("unreadable"):
            self.report.problems.append(f"{item.name}: {content}")
            return
        hash_ = json_hash([content, self.cutting.key])
        held = self.known.get((origin, item.name), {})
        if hash_ in held and held[hash_].complete:
            self.report.unchanged += 1
            if len(held) > 1:  # a run was killed before it took the old ones out
                self.store.delete(origin, item.name, hash_)
            return
        self.report.written += 1
        for chunk in last_marked(self.chunks(origin, item, hash_)):
            self.waiting.append(chunk)
            if len(self.waiting) >= BATCH:
                self.flush()
        self.done.append((origin, item.name, hash_))

    def chunks(self, origin: str, item: Item, hash_: str) -> Iterator[Chunk]:
        """The chunks of a file, numbered."""
        for number, chunk in enumerate(self.documents(origin, item)):
            yield replace(chunk, number=number, hash=hash_)

    def documents(self, origin: str, item: Item) -> Iterator[Chunk]:
        before, last = 0, ""  # characters of the pieces that a large file was read in
        for document in read_item(item, self.cutting.text_field):
            if isinstance(document, Dropped):
                self.report.problems.append(f"{document.source}: {document.reason} {document.detail}".rstrip())
                continue
            before = before if document.source == last else 0
            last = document.source
            cutting = self.cutting
            for piece in cut(
                document.text, document.kind, title_of(document), self.encoder.count, cutting.chunk_tokens,
                cutting.overlap,
            ):  # fmt: skip
                yield Chunk(
                    origin, item.name, document.source, document.kind, piece.title,
                    document.text[piece.start : piece.end], before + piece.start, before + piece.end,
                    meta=document.meta,
                )  # fmt: skip
            before += len(document.text)

    def flush(self) -> None:
        """Encode and write what waits; then take out what these files were before."""
        if self.waiting:
            told = [chunk.told for chunk in self.waiting]
            vectors_CD = self.encoder.encode(told)
            average = self.description.average_words
            self.store.upsert([
                Entry(chunk, vector, document_weights(text, average))
                for chunk, vector, text in zip(self.waiting, vectors_CD, told, strict=True)
            ])  # fmt: skip
            self.report.chunks += len(self.waiting)
            self.waiting.clear()
        for origin, file, hash_ in self.done:
            if self.known.get((origin, file), {}).keys() - {hash_}:
                self.store.delete(origin, file, hash_)
        self.done.clear()


def title_of(document: Document) -> str:
    """What a row calls itself; files have the titles that their headings give them."""
    found = (document.meta.get(key) for key in TITLE_KEYS)
    return next((value.strip() for value in found if isinstance(value, str) and value.strip()), "")


def last_marked(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same with `last` set on the last one."""
    before: Chunk | None = None
    for chunk in chunks:
        if before is not None:
            yield before
        before = chunk
    if before is not None:
        yield replace(before, last=True)
