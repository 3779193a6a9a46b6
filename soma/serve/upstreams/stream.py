"""What is read of an upstream's answer as it passes: its usage, whether it is whole. Bytes go on as they came."""

import json
import re
from typing import Any

from soma.serve.calls import Usage

HAS_USAGE = re.compile(rb'"usage"\s*:\s*\{')
NO_USAGE = re.compile(rb',\s*"usage"\s*:\s*null')
IS_ERROR = re.compile(rb'^data: ?\{\s*"error"', re.MULTILINE)
ENDS = (b"[DONE]", b"response.completed", b"response.incomplete", b"response.failed")
MOST_HELD = 4 << 20  # bytes of one event


class BadStreamError(Exception):
    """What came is no stream of events."""


class EventReader:
    """Passes whole server-sent events on. The upstream was asked for usage; a client that was not does not see it."""

    def __init__(self, wants_usage: bool) -> None:
        self.wants_usage = wants_usage
        self.held = b""
        self.events = 0  # that carried something
        self.usage: dict[str, Any] | None = None
        self.is_done = self.has_failed = False

    def feed(self, data: bytes) -> bytes:
        """What of it the client gets now. Raises BadStreamError."""
        data = self.held + data if self.held else data
        if b"\r\n" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            if len(data) > MOST_HELD:
                raise BadStreamError
            self.held = data
            return b""
        data, self.held = data[:end], data[end:]
        self.events += data.count(b"data: {") + data.count(b"data:{")
        self.is_done = self.is_done or any(mark in data for mark in ENDS)
        if b'"error"' in data and IS_ERROR.search(data):
            self.has_failed = True
        if b'"usage"' in data:
            if HAS_USAGE.search(data):
                data = b"".join(map(self._event, data.split(b"\n\n")[:-1]))
            elif not self.wants_usage:
                data = NO_USAGE.sub(b"", data)
        return data

    def _event(self, event: bytes) -> bytes:
        """An event with its usage taken note of, and taken out where nobody asked for it."""
        _, mark, text = event.partition(b"data:")
        try:
            value = json.loads(text) if mark and HAS_USAGE.search(text) else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            return (event if self.wants_usage else NO_USAGE.sub(b"", event)) + b"\n\n"
        if isinstance(value.get("response"), dict):  # of the responses API, which always tells
            self.usage = value["response"].get("usage") or self.usage
            return event + b"\n\n"
        if not isinstance(value.get("usage"), dict):
            return event + b"\n\n"
        self.usage = value.pop("usage")
        if not value.get("choices"):
            self.events -= 1
        if self.wants_usage:
            return event + b"\n\n"
        return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" if value.get("choices") else b""


def usage_of(told: Any, outcome: str, prompt_tokens: int, seen: int) -> Usage:
    """What the gates are told. Without the upstream's own words: what the prompt was thought to have, and a token for
    each event that was seen, marked as an estimate."""
    if isinstance(told, dict):
        prompt = told.get("prompt_tokens", told.get("input_tokens"))
        made = told.get("completion_tokens", told.get("output_tokens", 0))
        details = told.get("prompt_tokens_details") or told.get("input_tokens_details") or {}
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        numbers = (prompt, made, cached or 0)
        if all(isinstance(each, int) and 0 <= each < 2**40 for each in numbers):
            return Usage(numbers[0], numbers[1], numbers[2], outcome=outcome)  # type: ignore[arg-type]
    return Usage(prompt_tokens, seen, outcome=outcome, estimated=True)
