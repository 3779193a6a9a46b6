"""Cleaning of one document's text, and cutting of long ones."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial

import ftfy

from soma.data.config import CleanConfig
from soma.data.signals.web import c4_text, refinedweb_text

# C0 and C1 controls except tab and newline; bidirectional overrides; the byte order mark; non-characters; the
# replacement character stays in the text, but counts as damage.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
LINE_ENDS = re.compile("\r\n?|\x0b|\x0c|\x85|\u2028|\u2029")
TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{4,}")
REMOVERS: dict[str, Callable[[str], str]] = {
    "c4": c4_text, "c4_any": partial(c4_text, terminal=False), "refinedweb": refinedweb_text,
}  # fmt: skip


def clean_text(text: str, config: CleanConfig) -> tuple[str, str | None]:
    """The cleaned text and, when the document is to be dropped, the reason (`binary`, `empty`, `too_short`).

    Mojibake is repaired where asked for (ftfy). Line ends become `\\n`, the text is brought to the configured Unicode
    normal form, control characters and byte order marks go, spaces at line ends go, more than three line ends in a
    row become three. Line ends at both ends of the text go. `remove_lines` takes out lines before that is done.
    """
    if config.mojibake and not text.isascii():
        text = ftfy.fix_encoding(text)
    text = LINE_ENDS.sub("\n", text)
    if config.unicode != "none" and not text.isascii():
        text = unicodedata.normalize(config.unicode, text)
    cleaned, controls = CONTROL.subn("", text)
    damage = controls - text.count("\ufeff") + text.count("\ufffd")
    if damage > config.max_control_fraction * max(1, len(text)):
        return cleaned, "binary"
    cleaned = TRAILING.sub("", cleaned)
    for rules in config.remove_lines:
        cleaned = REMOVERS[rules](cleaned)
    cleaned = BLANK_LINES.sub("\n\n\n", cleaned).strip("\n")
    if not cleaned.strip():
        return cleaned, "empty"
    if len(cleaned) < config.min_chars:
        return cleaned, "too_short"
    return cleaned, None


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, cut at a blank line if there is one in the last half, else at a line end, a
    space, or anywhere. The parts joined give the text less the white space at the cuts."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + limit // 2, end)
            if found > start:
                end = found
                break
        if part := text[start:end].strip("\n"):
            yield part
        start = end
    if rest := text[start:].strip("\n"):
        yield rest
