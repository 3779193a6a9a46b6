"""From a file to documents. What cannot be read is set aside with file, line and reason; nothing here is fatal."""

import codecs
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from soma.data.compression import BombError
from soma.data.compression import decompress as decompress
from soma.data.html import html_to_text
from soma.data.sources import Item

PIECE_BYTES = 32 << 20  # plain text longer than this is read in pieces, so that a huge file needs little memory
LINE_BYTES = 64 << 20  # a longer line of JSON is set aside
HTML_BYTES = 64 << 20
ARRAY_BYTES = 256 << 20  # a larger file that is one JSON array is set aside
OTHER_TEXT_FIELDS = ("content", "raw_content")  # OSCAR's, and RedPajama's second version
META_FIELDS = ("meta", "metadata", "warc_headers")  # of The Pile and RedPajama; of Dolma and OSCAR; of OSCAR
EXCERPT_CHARS = 200
META_CHARS = 200
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What opening, decompressing and reading raise: truncated and corrupt files, network trouble.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


@dataclass(slots=True)
class Document:
    """A text and where it comes from. `source` is the file's name, with `#line` for rows."""

    text: str
    source: str
    kind: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Dropped:
    """What was set aside: `reason` one word, `detail` for the person who looks into it, an excerpt of the text."""

    source: str
    reason: str
    detail: str = ""
    excerpt: str = ""


def read_item(item: Item, text_field: str, main_only: bool = False) -> Iterator[Document | Dropped]:
    """The documents of one file, in order; problems as `Dropped`. `main_only`: of HTML files only the main text."""
    try:
        with item.open() as raw:
            file = raw if item.kind == "warc" else decompress(raw, item.compression)
            for found in _read(item, file, text_field, main_only):
                yield _checked(found) if isinstance(found, Document) else found
    except READ_ERRORS as error:
        reason = "truncated" if isinstance(error, EOFError) else "corrupt" if item.compression else "unreadable"
        reason = "bomb" if isinstance(error, BombError) else reason
        yield Dropped(item.name, reason, f"{type(error).__name__}: {error}")


def _read(item: Item, file: IO[bytes], text_field: str, main_only: bool) -> Iterator[Document | Dropped]:
    if reader := _special(item.kind):
        yield from reader(item, file)
    elif item.kind == "jsonl":
        yield from _read_json(item, file, text_field)
    elif item.kind == "parquet":
        yield from _read_parquet(item, file, text_field)
    elif item.kind == "html":
        html = file.read(HTML_BYTES + 1)
        if len(html) > HTML_BYTES:
            yield Dropped(item.name, "too_large", f"an HTML page of more than {HTML_BYTES >> 20} MiB")
            return
        yield _read_html(item, html, main_only)
    else:
        yield from _read_text(item, file)


def _special(kind: str | None) -> Callable[[Item, IO[bytes]], Iterator[Document | Dropped]] | None:
    """The reader of a kind that has a module of its own."""
    if kind == "warc":
        from soma.data.archives import read_archive

        return read_archive
    if kind == "pdf":
        from soma.data.pdf import read_pdf

        return read_pdf
    if kind in ("wikipedia", "wikitext"):
        from soma.data.wikipedia import read_dump, read_wikitext

        return read_dump if kind == "wikipedia" else read_wikitext
    return None


def _read_html(item: Item, html: bytes, main_only: bool) -> Document | Dropped:
    if main_only:
        from soma.data.extract import main_text

        text = main_text(html)
        return Document(text, item.name, "html") if text else Dropped(item.name, "no_main_text", "", _excerpt(html))
    found = _decode(item, html, _decoder(item, html))
    return Document(html_to_text(found), item.name, "html") if isinstance(found, str) else found


def _read_text(item: Item, file: IO[bytes]) -> Iterator[Document | Dropped]:
    """Plain text, whole or in pieces of `PIECE_BYTES` that end at a line end where there is one.

    Of a piece that is no text the rest up to a line end is passed over, too; reading goes on with the next line.
    """
    decoder, line, lost = None, item.first_line, False
    while data := file.read(PIECE_BYTES):
        last = len(data) < PIECE_BYTES
        if not last:
            data += file.readline(PIECE_BYTES)
        whole = last and decoder is None and not item.ranged
        # What follows the first line has no byte order mark: there it is a character.
        decoder = decoder or (_decoder(item, data) if line == 1 else _Decoder("utf-8"))
        if not lost:
            found = _decode(item, data, decoder, line, last)
            if isinstance(found, Dropped):
                yield found
                if decoder.encoding == "utf-16":
                    return  # where its next character begins is not known
                lost = True
            else:
                yield Document(found, item.name, item.kind or "text", {} if whole else {"line": line})
        if lost and data.endswith(b"\n"):
            decoder, lost = decoder.again(), False
        line += data.count(b"\n")
    if decoder is None:
        yield Dropped(item.name, "empty", "the file has no content")


@dataclass
class _Decoder:
    encoding: str

    def __post_init__(self) -> None:
        self.decode = codecs.getincrementaldecoder(self.encoding)("strict").decode

    def again(self) -> "_Decoder":
        """A decoder for what follows later in the file, where no byte order mark is expected."""
        return _Decoder(self.encoding.removesuffix("-sig"))


def _decoder(item: Item, data: bytes) -> _Decoder:
    """By the byte order mark, for Python by its coding cookie, else UTF-8."""
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return _Decoder(encoding)
    if item.kind == "python":
        try:
            return _Decoder(tokenize.detect_encoding(io.BytesIO(data).readline)[0])
        except SyntaxError:
            return _Decoder("utf-8")
    return _Decoder("utf-8")


def _decode(item: Item, data: bytes, decoder: _Decoder, first_line: int = 1, last: bool = True) -> str | Dropped:
    if b"\0" in data and decoder.encoding != "utf-16":
        line = first_line + data.count(b"\n", 0, data.index(b"\0"))
        return Dropped(item.name, "nul_bytes", f"line {line}: NUL byte, this is not text", _excerpt(data))
    try:
        return decoder.decode(data, last)
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        detail = f"line {line}: not {decoder.encoding.removesuffix('-sig')} ({error.reason})"
        return Dropped(item.name, "undecodable", detail, _excerpt(data[error.start :]))


def _excerpt(data: bytes) -> str:
    return data[:EXCERPT_CHARS].decode("utf-8", "backslashreplace").replace("\0", "\\0")


def _checked(document: Document) -> Document | Dropped:
    """The document, unless its text cannot be stored as UTF-8 or holds NUL characters (JSON escapes can)."""
    if "\0" in document.text:
        return Dropped(
            document.source,
            "nul_bytes",
            "NUL character in the text",
            document.text[:EXCERPT_CHARS].replace("\0", "\\0"),
        )
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        return Dropped(document.source, "lone_surrogate", f"character {error.start} is half of a UTF-16 pair")
    return document


# --- Rows ---


def _read_json(item: Item, file: IO[bytes], text_field: str) -> Iterator[Document | Dropped]:
    """One JSON object a line; also a file that is one JSON array of objects."""
    for line, row in json_rows(item, file):
        source = f"{item.name}#{line}"
        if isinstance(row, Dropped):
            yield row
        elif not isinstance(row, dict):
            yield Dropped(
                source,
                "not_an_object",
                f"a row must be an object, this is {_json_kind(row)}",
                repr(row)[:EXCERPT_CHARS],
            )
        else:
            name = _field_of(row, text_field)
            if isinstance(row.get(name), str):
                yield Document(row[name], source, "jsonl", _meta(row, name))
            else:
                yield _no_text(source, row, name)


def json_rows(item: Item, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(line or index from 1, value) for every row; a `Dropped` as value where a line is not JSON."""
    number = item.first_line - 1
    while data := file.readline(LINE_BYTES):
        number += 1
        too_long = len(data) == LINE_BYTES and not data.endswith(b"\n")
        if number == 1:
            if is_array(item, data):
                yield from _read_array(item, data, file)
                return
            data = data.removeprefix(codecs.BOM_UTF8)
        if too_long:
            while (rest := file.readline(LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, Dropped(f"{item.name}#{number}", "too_large", f"a line of more than {LINE_BYTES >> 20} MiB")
        elif data.strip():
            try:
                yield number, json.loads(data)
            except (ValueError, RecursionError) as error:
                yield number, Dropped(f"{item.name}#{number}", "bad_json", str(error), _excerpt(data))
    if number == 0:
        yield 0, Dropped(item.name, "empty", "the file has no content")


def is_array(item: Item, first: bytes) -> bool:
    """Whether a file with this first line is one JSON array."""
    start = first.removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"[") and item.name.split(".")[-1] not in ("jsonl", "ndjson")


def _read_array(item: Item, first: bytes, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    rest = file.read(ARRAY_BYTES + 1)
    if len(rest) > ARRAY_BYTES:
        detail = f"a JSON array of more than {ARRAY_BYTES >> 20} MiB; use JSONL"
        yield 0, Dropped(item.name, "too_large", detail)
        return
    data = first.removeprefix(codecs.BOM_UTF8) + rest
    try:
        yield from enumerate(json.loads(data), start=1)
    except (ValueError, RecursionError) as error:
        yield 0, Dropped(item.name, "bad_json", str(error), _excerpt(data))


def _no_text(source: str, row: dict[str, Any], text_field: str) -> Dropped:
    if row.get(text_field) is None:
        return Dropped(
            source, "no_text_field", f"no {text_field!r}; the row has {', '.join(map(repr, row)) or 'nothing'}"
        )
    return Dropped(
        source,
        "text_not_string",
        f"{text_field!r} is {_json_kind(row[text_field])}",
        repr(row[text_field])[:EXCERPT_CHARS],
    )


def _json_kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _field_of(row: dict[str, Any], text_field: str) -> str:
    """`text_field`, or where that is the usual one and the row lacks it, the field of another known corpus."""
    if text_field == "text" and "text" not in row:
        return next((name for name in OTHER_TEXT_FIELDS if isinstance(row.get(name), str)), text_field)
    return text_field


def _meta(row: dict[str, Any], text_field: str) -> dict[str, Any]:
    """The row's other short scalar fields, and those of its objects of metadata as `meta.pile_set_name`."""
    fields = {key: value for key, value in row.items() if key != text_field}
    for name in META_FIELDS:
        if isinstance(inner := row.get(name), dict):
            fields |= {f"{name}.{key}": value for key, value in inner.items()}
    return {
        key: value for key, value in fields.items()
        if isinstance(value, str | int | float | bool) and len(str(value)) <= META_CHARS
    }  # fmt: skip


def _read_parquet(item: Item, file: IO[bytes], text_field: str) -> Iterator[Document | Dropped]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(file.read()) if item.compression else file)
        names = table.schema_arrow.names
        if text_field not in names:
            yield Dropped(item.name, "no_text_field", f"no column {text_field!r}; the file has {', '.join(names[:12])}")
            return
        row = 0
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                row += 1
                yield _parquet_row(f"{item.name}#{row}", fields, text_field)
        if row == 0:
            yield Dropped(item.name, "empty", "the table has no rows")
    except (pyarrow.ArrowException, OSError) as error:
        yield Dropped(item.name, "corrupt", f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _parquet_row(source: str, fields: dict[str, Any], text_field: str) -> Document | Dropped:
    text = fields[text_field]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return Dropped(source, "undecodable", f"byte {error.start} is not UTF-8")
    if not isinstance(text, str):
        return _no_text(source, fields, text_field)
    return Document(text, source, "parquet", _meta(fields, text_field))
