"""Web archives: WARC with pages, WET with text. A broken record is set aside; reading goes on at the next one.

WARC 1.1 (ISO 28500:2017), plain, gzip or lz4 by record; fastwarc reads it.
"""

from collections.abc import Iterator
from typing import IO, Any

from soma.data.extract import main_text
from soma.data.readers import EXCERPT_CHARS, Document, Dropped
from soma.data.sources import Item

PAGE_BYTES = 16 << 20
SCAN_BYTES = 1 << 20
MAGICS = (b"\x1f\x8b\x08", b"WARC/1.")  # where a record may begin after a broken one
HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_archive(item: Item, file: IO[bytes]) -> Iterator[Document | Dropped]:
    """The pages (main text) and texts of an archive, in order. `file` is the file as it lies there."""
    # Files made by hand end lines with LF alone; read so, broken records of other files would go by unseen.
    first = file.read(64)
    quirks = first.startswith(b"WARC/") and b"\r" not in first.split(b"\n")[0]
    number, start = 0, 0
    while start is not None:
        last = start
        try:
            file.seek(start)
            for record in _records(file, quirks):
                number += 1
                last = start + record.stream_pos
                found = _read_record(item, record, number)
                if found is not None:
                    yield found
            break
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            detail = f"after record {number}, byte {last}: {type(error).__name__}: {error}"
            yield Dropped(f"{item.name}#{number + 1}", "broken_record", detail)
            start = _next_record(file, last + 1)  # type: ignore[assignment]
    if number == 0:
        yield Dropped(item.name, "empty", "no record in the archive")


def _records(file: IO[bytes], quirks: bool) -> Iterator[Any]:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    yield from ArchiveIterator(file, record_types=wanted, quirks_mode=quirks, auto_decode="all")


def _next_record(file: IO[bytes], start: int) -> int | None:
    """The first byte at or after `start` where a record may begin, None where there is none."""
    file.seek(start)
    before = b""
    while data := file.read(SCAN_BYTES):
        window = before + data
        places = [place for magic in MAGICS if (place := window.find(magic)) >= 0]
        if places:
            return start - len(before) + min(places)
        before, start = window[-8:], start + len(data)
    return None


def _read_record(item: Item, record: Any, number: int) -> Document | Dropped | None:
    """The document of a record, None where it holds none by its nature."""
    source = f"{item.name}#{number}"
    headers = record.headers
    meta = {
        key: value for key, name in (("url", "WARC-Target-URI"), ("date", "WARC-Date"))
        if (value := headers.get(name))
    }  # fmt: skip
    kind = (record.http_content_type if record.is_http else headers.get("Content-Type")) or ""
    kind = kind.split(";")[0].strip().lower()
    if record.is_http and record.http_headers is not None:
        status = record.http_headers.status_code
        if status is not None and status != 200:
            return Dropped(source, "http_status", f"{status} {meta.get('url', '')}")
    if kind and kind != "text/plain" and kind not in HTML_TYPES:
        return Dropped(source, "not_a_page", f"{kind} {meta.get('url', '')}")
    data = record.reader.read(PAGE_BYTES + 1)
    if not kind and not data.lstrip().startswith(b"<"):
        return Dropped(source, "not_a_page", f"no content type {meta.get('url', '')}")
    if len(data) > PAGE_BYTES:
        return Dropped(source, "too_large", f"a page of more than {PAGE_BYTES >> 20} MiB")
    charset = record.http_charset if record.is_http else "utf-8"
    if kind == "text/plain":
        return _plain(source, data, charset, meta)
    text = main_text(data, charset)
    if not text:
        excerpt = data[:EXCERPT_CHARS].decode("utf-8", "backslashreplace").replace("\0", "\\0")
        return Dropped(source, "no_main_text", meta.get("url", ""), excerpt)
    return Document(text, source, "web", meta)


def _plain(source: str, data: bytes, charset: str | None, meta: dict[str, Any]) -> Document | Dropped:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    text = bytes_to_str(data, charset or detect_encoding(data) or "utf-8")
    return Document(text, source, "web", meta) if text.strip() else Dropped(source, "empty", meta.get("url", ""))
