"""What is in a corpus, counted: the figures of `report.json`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from soma.data.readers import EXCERPT_CHARS, Dropped

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
    return counted_histogram(*np.unique(lengths, return_counts=True))


def counted_histogram(lengths_N: np.ndarray, times_N: np.ndarray) -> dict[str, Any]:
    """`histogram` of ascending lengths that each occur so many times."""
    if not len(lengths_N):
        return {"edges": [0, 1], "counts": [0], "median": 0, "p90": 0, "max": 0}
    edges = [0, *(1 << power for power in range(BINS))]
    counts = np.histogram(lengths_N, bins=[*edges, np.iinfo(np.int64).max], weights=times_N)[0].astype(np.int64)
    used = np.flatnonzero(counts)
    first, last, longest = int(used[0]), int(used[-1]), int(lengths_N[-1])
    top = edges[last + 1] if last + 1 < len(edges) else longest + 1
    return {
        "edges": [*edges[first : last + 1], top], "counts": counts[first : last + 1].tolist(),
        "median": _quantile(lengths_N, times_N, 0.5), "p90": _quantile(lengths_N, times_N, 0.9), "max": longest,
    }  # fmt: skip


def _quantile(values_N: np.ndarray, times_N: np.ndarray, share: float) -> float:
    """As np.quantile of the values written out: linear between the two neighbours."""
    ends_N = np.cumsum(times_N)
    place = share * (int(ends_N[-1]) - 1)
    low, high = (float(values_N[np.searchsorted(ends_N, int(p), side="right")]) for p in (place, np.ceil(place)))
    part = place - int(place)
    return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)


def line_lengths(text: str) -> np.ndarray:
    """Bytes of every line of a text, without its line end."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.diff(np.concatenate([[-1], np.flatnonzero(data == 10), [len(data)]])) - 1


class Profile:
    """Counts what the report says of the rows of a corpus, a batch at a time."""

    def __init__(self, splits: Sequence[str]) -> None:
        self.sizes = {split: dict.fromkeys(("documents", "bytes", "chars", "lines"), 0) for split in splits}
        self.splits = list(splits)
        self.characters: Counter[str] = Counter()
        self.chars: Counter[int] = Counter()
        self.lines: Counter[int] = Counter()
        self.kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
        self.sources: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, split: int, columns: dict[str, list[Any]]) -> None:
        """Rows of a split with the columns text, source, kind, n_bytes, n_chars."""
        texts, counts = columns["text"], self.sizes[self.splits[split]]
        self.characters.update(character_classes(texts))
        self.chars.update(columns["n_chars"])
        if texts:
            lengths, times = np.unique(np.concatenate([line_lengths(text) for text in texts]), return_counts=True)
            self.lines.update(dict(zip(lengths.tolist(), times.tolist(), strict=True)))
            counts["lines"] += int(times.sum())
        counts["documents"] += len(texts)
        counts["bytes"] += sum(columns["n_bytes"])
        counts["chars"] += sum(columns["n_chars"])
        for kind, source, size in zip(columns["kind"], columns["source"], columns["n_bytes"], strict=True):
            self.kinds[kind]["documents"] += 1
            self.kinds[kind]["bytes"] += size
            of_source = self.sources[source.split("#")[0]]
            of_source[0] += 1
            of_source[1] += size

    def figures(self) -> dict[str, Any]:
        """The sections of `report.json` that are about the rows."""
        ranked = sorted(self.sources.items(), key=lambda item: (-item[1][1], item[0]))[:TOP_SOURCES]
        return {
            "splits": self.sizes, "document_chars": _counter_histogram(self.chars),
            "line_bytes": _counter_histogram(self.lines),
            "characters": dict(sorted(self.characters.items(), key=lambda item: (-item[1], item[0]))),
            "kinds": dict(sorted(self.kinds.items(), key=lambda item: (-item[1]["bytes"], item[0]))),
            "sources": [{"source": name, "documents": count, "bytes": size} for name, (count, size) in ranked],
        }  # fmt: skip


def _counter_histogram(counts: Counter[int]) -> dict[str, Any]:
    lengths = sorted(counts)
    return counted_histogram(np.array(lengths, np.int64), np.array([counts[n] for n in lengths], np.int64))


def drop_reasons(dropped: Iterable[Dropped]) -> list[dict[str, Any]]:
    """Count and first examples for each reason, most frequent first. Give them `ordered`."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    for item in dropped:
        counts[item.reason] += 1
        if counts[item.reason] <= EXAMPLES:
            examples[item.reason].append({"source": item.source, "detail": item.detail, "excerpt": item.excerpt})
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [{"reason": reason, "count": count, "examples": examples[reason]} for reason, count in ranked]


def ordered(dropped: Iterable[Dropped]) -> list[Dropped]:
    """By reason and source, so that the order of reading does not show."""
    return sorted(dropped, key=lambda item: (item.reason, item.source, item.detail, item.excerpt))


def drop_summary(dropped: Iterable[Dropped]) -> str:
    """One line for each reason with its first example, for an error message; empty if nothing was dropped."""
    lines = []
    for entry in drop_reasons(dropped):
        first = entry["examples"][0]
        detail = f": {first['detail']}" if first["detail"] else ""
        lines.append(f"\n  {entry['count']} dropped as {entry['reason']}, such as {first['source']}{detail}")
    return "".join(lines)


def excerpt(text: str) -> str:
    """The start of a text, for reports."""
    return text[:EXCERPT_CHARS]
