"""Offsets in code points, in UTF-8 bytes and in UTF-16 units.

Python, doccano and spaCy count code points; JavaScript and Java count UTF-16 units, of which an emoji takes two; Rust,
Go and many services count bytes.
"""

from typing import Literal

from soma.data.annotation.record import Record

Unit = Literal["codepoints", "utf16", "utf8"]
UNITS = ("codepoints", "utf16", "utf8")


def boundaries(text: str, unit: Unit) -> list[int]:
    """Where each code point starts in `unit`, and the text's length in it: one more entry than code points."""
    found, place = [0], 0
    for character in text:
        code = ord(character)
        if unit == "utf16":
            place += 1 + (code > 0xFFFF)
        elif unit == "utf8":
            place += 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)
        else:
            place += 1
        found.append(place)
    return found


def to_codepoints(record: Record, unit: Unit) -> Record:
    """The record with spans that were counted in `unit`. Raises ValueError for an offset inside of a character."""
    if unit == "codepoints":
        return record
    places = {place: index for index, place in enumerate(boundaries(record.text, unit))}
    return _moved(record, places, f"of {unit} lies inside of a character or after the text")


def from_codepoints(record: Record, unit: Unit) -> Record:
    """The record with spans counted in `unit`. Raises ValueError for an offset after the text."""
    if unit == "codepoints":
        return record
    return _moved(record, dict(enumerate(boundaries(record.text, unit))), "lies after the text")


def _moved(record: Record, places: dict[int, int], wrong: str) -> Record:
    spans = []
    for span in record.spans:
        for offset in (span.start, span.end):
            if offset not in places:
                raise ValueError(f"offset {offset} {wrong}")
        spans.append(span.model_copy(update={"start": places[span.start], "end": places[span.end]}))
    return record.model_copy(update={"spans": spans})
