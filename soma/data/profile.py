"""What is in a corpus, counted: the figures of `report.json`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soma.data.readers import EXCERPT_CHARS, Document, Dropped

TOP_SOURCES = 20
EXAMPLES = 3
BINS = 24  # lengths are counted in powers of two; the last bin holds what is longer

# First code point of each block of characters beyond ASCII, and what it is called in the report.
BLOCKS = [
    (0x80, "latin"), (0x250, "symbols"), (0x370, "greek"), (0x400, "cyrillic"), (0x530, "other"), (0x590, "hebrew"),
    (0x600, "arabic"), (0x780, "other"), (0x900, "indic"), (0xE00, "southeast_asian"), (0x1100, "hangul"), (0x1200,
    "other"), (0x1780, "southeast_asian"), (0x1800, "other"), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, "symbols"),
    (0x2C00, "other"), (0x2E80, "cjk"), (0x3040, "kana"), (0x3100, "cjk"), (0x3130, "hangul"), (0x3190, "cjk"),
    (0xA000, "other"), (0xAC00, "hangul"), (0xD7B0, "other"), (0xF900, "cjk"), (0xFB00, "other"), (0xFE30, "cjk"),
    (0xFE70, "arabic"), (0xFF00, "cjk"), (0x10000, "other"), (0x1F000, "emoji"), (0x20000, "cjk"), (0x30000, "other"),
]  # fmt: skip
STARTS = np.array([start for start, _ in BLOCKS])


def ascii_class(code: int) -> str:
    """Name of the class of an ASCII character in the report."""
    character = chr(code)
    if character.isalpha():
        return "letters"
    if character.isdigit():
        return "digits"
    if character in "\n\r":
        return "line_ends"
    if character in " \t":
        return "spaces"
    return "punctuation" if character.isprintable() else "control"


def character_classes(texts: Iterable[str]) -> dict[str, int]:
    """Characters by class: ASCII letters, digits, spaces, line ends, punctuation, then scripts beyond ASCII."""
    ascii_counts = np.zeros(128, np.int64)
    counts: Counter[str] = Counter()
    for text in texts:
        if text.isascii():
            ascii_counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128)
            continue
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ascii_counts += np.bincount(codes[codes < 128], minlength=128)
        blocks = np.bincount(np.searchsorted(STARTS, codes[codes >= 128], side="right") - 1, minlength=len(BLOCKS))
        for (_, name), count in zip(BLOCKS, blocks.tolist(), strict=True):
            counts[name] += count
    for code, count in enumerate(ascii_counts.tolist()):
        counts[ascii_class(code)] += count
    return {name: count for name, count in counts.most_common() if count}


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """`{"edges", "counts", "median", "p90", "max"}`: counts[i] lengths lie in [edges[i], edges[i+1]); empty ends are
    cut off.
    """
    if not len(lengths):
        return {"edges": [0, 1], "counts": [0], "median": 0, "p90": 0, "max": 0}
    edges = [0, *(1 << power for power in range(BINS))]
    counts = np.histogram(lengths, bins=[*edges, np.iinfo(np.int64).max])[0]
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    top = edges[last + 1] if last + 1 < len(edges) else int(lengths.max()) + 1
    return {
        "edges": [*edges[first : last + 1], top], "counts": counts[first : last + 1].tolist(),
        "median": float(np.median(lengths)), "p90": float(np.quantile(lengths, 0.9)), "max": int(lengths.max()),
    }  # fmt: skip


def line_lengths(texts: Iterable[str]) -> np.ndarray:
    """Bytes of every line of every text, without its line end."""
    found = [np.zeros(0, np.int64)]
    for text in texts:
        data = np.frombuffer(text.encode(), np.uint8)
        ends = np.concatenate([[-1], np.flatnonzero(data == 10), [len(data)]])
        found.append(np.diff(ends) - 1)
    return np.concatenate(found)


def sizes(documents: Sequence[Document]) -> dict[str, int]:
    """Documents, UTF-8 bytes, characters and lines."""
    return {
        "documents": len(documents), "bytes": sum(len(d.text.encode()) for d in documents),
        "chars": sum(len(d.text) for d in documents), "lines": sum(d.text.count("\n") + 1 for d in documents),
    }  # fmt: skip


def by_kind(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Documents and bytes by kind, largest first."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
    for document in documents:
        found[document.kind]["documents"] += 1
        found[document.kind]["bytes"] += len(document.text.encode())
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def top_sources(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """The input files that most of the text comes from."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        counts = found[document.source.split("#")[0]]
        counts[0] += 1
        counts[1] += len(document.text.encode())
    ranked = sorted(found.items(), key=lambda item: (-item[1][1], item[0]))[:TOP_SOURCES]
    return [{"source": name, "documents": count, "bytes": size} for name, (count, size) in ranked]


def drop_reasons(dropped: Sequence[Dropped]) -> list[dict[str, Any]]:
    """Count and first examples for each reason, most frequent first."""
    found: dict[str, list[Dropped]] = defaultdict(list)
    for item in ordered(dropped):
        found[item.reason].append(item)
    ranked = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [
        {
            "reason": reason, "count": len(items),
            "examples": [{"source": i.source, "detail": i.detail, "excerpt": i.excerpt} for i in items[:EXAMPLES]],
        }
        for reason, items in ranked
    ]  # fmt: skip


def ordered(dropped: Sequence[Dropped]) -> list[Dropped]:
    """By reason and source, so that the order of reading does not show."""
    return sorted(dropped, key=lambda item: (item.reason, item.source, item.detail, item.excerpt))


def drop_summary(dropped: Sequence[Dropped]) -> str:
    """One line for each reason with its first example, for an error message; empty if nothing was dropped."""
    lines = []
    for entry in drop_reasons(dropped):
        first = entry["examples"][0]
        detail = f": {first['detail']}" if first["detail"] else ""
        lines.append(f"\n  {entry['count']} dropped as {entry['reason']}, such as {first['source']}{detail}")
    return "".join(lines)


def size_counts(groups: Mapping[Any, Sequence[Any]]) -> dict[str, int]:
    """How many groups have how many members, for groups of two and more."""
    counts = Counter(len(members) for members in groups.values() if len(members) > 1)
    return {str(size): counts[size] for size in sorted(counts)}


def excerpt(text: str) -> str:
    """The start of a text, for reports."""
    return text[:EXCERPT_CHARS]
