"""Reading a remote file from any offset: HTTP by the standard library, every other store by fsspec.

HTTP is not read through fsspec because that neither resumes safely (no If-Range) nor tells "absent" from "unreachable".
"""

import http.client
import io
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from soma.base.errors import UserError
from soma.base.secrets import redact_url, scrub

TIMEOUT = 30.0  # seconds that a connection or one read may take
CHUNK = 1 << 20


class Unreachable(Exception):  # noqa: N818
    """The network, the server or its answer broke off; trying again later may work. The text carries no secret."""


class Absent(UserError):  # noqa: N818
    """The server answered that there is no such thing."""


@dataclass
class Answer:
    """What the remote side gave: chunks from `offset` on, or nothing if the known copy is `unchanged`."""

    unchanged: bool
    offset: int
    size: int | None  # bytes of the whole file, None where the server does not say
    validator: str | None  # ETag, date or key that changes when the content does
    chunks: Iterator[bytes]


def is_http(url: str) -> bool:
    """Whether the URL is read by HTTP."""
    return urlsplit(url).scheme.lower() in ("http", "https")


@contextmanager
def reading(url: str, *, known: str | None = None, offset: int = 0, partial: str | None = None) -> Iterator[Answer]:
    """Open a URL.

    known: validator of a whole copy that is here; if it still holds, the answer is `unchanged`.
    offset, partial: resume from there if the content is still the one with this validator, else start at 0.
    Raises Absent, Unreachable, UserError (access refused, no such protocol).
    """
    if is_http(url):
        with _http(url, known, offset, partial) as answer:
            yield answer
    else:
        with _fsspec(url, known, offset, partial) as answer:
            yield answer


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but do not carry a password to another host or out of TLS."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


@contextmanager
def _http(url: str, known: str | None, offset: int, partial: str | None) -> Iterator[Answer]:
    parts = urlsplit(url)
    headers = {"User-Agent": "soma", "Accept-Encoding": "identity"}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + b64encode(login.encode()).decode()
    if known:
        headers["If-None-Match" if known.startswith(('"', "W/")) else "If-Modified-Since"] = known
    if offset and partial and not partial.startswith("W/"):
        headers |= {"Range": f"bytes={offset}-", "If-Range": partial}
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit((parts.scheme, host, parts.path, parts.query, "")), headers=headers)
    with _http_errors(url):
        try:
            response = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 304:
                raise _http_error(url, error.code) from None
            response = None
    if response is None:
        yield Answer(True, 0, None, known, iter(()))
        return
    with response:
        answer = _http_answer(response)
        answer.chunks = _guarded(answer.chunks, lambda: _http_errors(url))
        yield answer


@contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.URLError as error:
        raise Unreachable(scrub(str(error.reason), url)) from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(scrub(str(error) or type(error).__name__, url)) from None


def _guarded(chunks: Iterator[bytes], errors: Callable[[], AbstractContextManager[None]]) -> Iterator[bytes]:
    """The chunks, with the remote side's errors translated; errors of who takes the chunks stay their own."""
    while True:
        with errors():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _http_answer(response: Any) -> Answer:
    length = response.headers.get("Content-Length")
    size = int(length) if length and length.isdigit() else None
    offset = 0
    if response.status == 206:  # Content-Range: bytes 100-199/200
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        offset = int(span.partition("-")[0])
        size = int(total) if total.isdigit() else None
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return Answer(False, offset, size, validator, iter(lambda: response.read(CHUNK), b""))


def _http_error(url: str, code: int) -> Exception:
    shown = redact_url(url)
    if code in (404, 410):
        return Absent(f"{shown}: the server has no such file (HTTP {code})")
    if code in (401, 403, 407):
        return UserError(f"{shown}: access refused (HTTP {code}); check the token or signature (expired?)")
    if code == 416:
        return Unreachable("the server refused to resume (HTTP 416)")
    return Unreachable(f"HTTP {code}")


def open_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it."""
    import fsspec

    scheme = urlsplit(url).scheme
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError(f"{redact_url(url)}: {scheme}:// needs another package: pip install somacube[cloud]") from None
    except ValueError:
        raise UserError(f"{redact_url(url)}: unknown protocol {scheme!r}; known are https, s3, gs and hf") from None


def list_store(url: str) -> list[str]:
    """Names of the files directly in a folder of an object store."""
    with store_errors(url):
        store, path = open_store(url)
        if not store.exists(path):
            raise Absent(f"{redact_url(url)}: no such folder")
        return sorted(found.rstrip("/").rpartition("/")[2] for found in store.find(path, maxdepth=1))


@contextmanager
def _fsspec(url: str, known: str | None, offset: int, partial: str | None) -> Iterator[Answer]:
    with store_errors(url):
        store, path = open_store(url)
        info = store.info(path)
        if info.get("type") == "directory":
            raise UserError(f"{redact_url(url)}: is a folder, not a file")
        validator = str(store.ukey(path))
        file = store.open(path, "rb")
    with file:
        if known and validator == known:
            yield Answer(True, 0, info.get("size"), validator, iter(()))
            return
        start = offset if partial == validator else 0
        file.seek(start)
        chunks = iter(lambda: file.read(CHUNK), b"")
        yield Answer(False, start, info.get("size"), validator, _guarded(chunks, lambda: store_errors(url)))


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """What a store's library raises, as Absent, UserError (access refused) or Unreachable."""
    shown = redact_url(url)
    try:
        yield
    except (UserError, Unreachable):
        raise
    except FileNotFoundError:
        raise Absent(f"{shown}: no such file") from None
    except PermissionError as error:
        raise UserError(f"{shown}: access refused ({scrub(str(error), url)}); check the store's credentials") from None
    except Exception as error:  # noqa: BLE001  every store's library has its own errors; all mean that it did not answer
        raise Unreachable(scrub(f"{type(error).__name__}: {error}", url)) from None


class StoreFile(io.RawIOBase):
    """A file of an object store, read where it lies. What breaks off is a UserError: it says nothing about the file."""

    def __init__(self, store: Any, name: str, url: str) -> None:
        self.url = url
        with self._told():
            self.file = store.open(name, "rb")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with store_errors(self.url):
                yield
        except Unreachable as error:
            raise UserError(f"{redact_url(self.url)}: reading broke off ({error}); run this again") from None

    def readinto(self, buffer: Any) -> int:
        with self._told():
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()
