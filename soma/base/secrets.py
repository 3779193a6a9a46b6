"""Keep secrets out of what is shown and recorded."""

import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

SECRET_NAME = re.compile(
    r"(?i)token|secret|passw|pwd|signature|credential|auth|session|api.?key|access.?key|^sig$|^key$|^x-amz-|^x-goog-"
)
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
HIDDEN = "***"


def split_url(url: str) -> tuple[str, str | None]:
    """A URL without its fragment, and the fragment's sha256 if it has one."""
    plain, _, fragment = url.partition("#")
    return plain, fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None


def redact_url(url: str) -> str:
    """The URL as it may be shown: no user and password, no value of any query parameter.

    Which parameters are secret cannot be known for every service, so all their values are hidden.
    """
    parts = urlsplit(url.partition("#")[0])
    query = "&".join(f"{name}={HIDDEN}" for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def identity_url(url: str) -> str:
    """The URL by which a cached copy is found again: a fresh signature or token names the same thing."""
    parts = urlsplit(url.partition("#")[0])
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in pairs if not SECRET_NAME.search(name)]
    return urlunsplit((parts.scheme.lower(), parts.netloc.rpartition("@")[2], parts.path, urlencode(kept), ""))


def scrub(text: str, url: str) -> str:
    """`text` (another library's error message, say) without the secrets that `url` carries."""
    parts = urlsplit(url)
    login = [parts.password or "", parts.username or ""]
    values = [value for _, value in parse_qsl(parts.query)] + [unquote(value) for value in login]
    raw = [pair.partition("=")[2] for pair in parts.query.split("&")] + login
    text = text.replace(url, redact_url(url) if parts.scheme else url)
    for value in sorted({*values, *raw}, key=len, reverse=True):
        if len(value) >= 3:
            text = text.replace(value, HIDDEN)
    return text


def redact(value: Any) -> Any:
    """A JSON value (a recipe, say) with every URL in it as it may be shown."""
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_url(value) if isinstance(value, str) and URL.match(value) else value
