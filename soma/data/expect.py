"""Expectations of a recipe: names of a corpus's figures with the bounds that they must keep. `data.profile.expect`
checks them.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

# One figure each, of the whole corpus.
FIGURES = {
    "documents": "documents in the corpus",
    "bytes": "bytes of text",
    "chars": "characters of text",
    "words": "words",
    "mean_length": "mean length of a document, in characters",
    "median_length": "median length of a document, in characters",
    "duplicates": "share of the documents that exact deduplication dropped",
    "near_duplicates": "share of the documents that near-deduplication dropped",
    "dropped": "share of the documents read that are not in the corpus",
    "validation": "share of the documents that is held out",
    "anomalies": "share of the documents far from the others",
    "dominant_file": "share of the documents that come from one file, the largest",
}
# Share of documents (of characters for `characters`) of a category: `languages.en`.
SHARES = {
    "languages": "language", "domains": "domain", "scripts": "script", "kinds": "kind", "characters": "characters",
}  # fmt: skip
STATISTICS = ("mean", "std", "low", "high", "p01", "p05", "p25", "p50", "p75", "p95", "p99")
# Attributes by the signal that measures them; the first are always there.
ATTRIBUTES = {
    "": (
        "bytes", "chars", "digits_share", "distinct_words", "lines", "punctuation_share", "spaces_share",
    ),
    "gopher_quality": (
        "alpha_words", "bullet_lines", "ellipses_per_word", "ellipsis_lines", "hashes_per_word", "mean_word_chars",
        "plain_words", "stop_words", "words",
    ),
    "gopher_repetition": (
        "dup_10gram", "dup_5gram", "dup_6gram", "dup_7gram", "dup_8gram", "dup_9gram", "dup_line_chars", "dup_lines",
        "dup_paragraph_chars", "dup_paragraphs", "top_2gram", "top_3gram", "top_4gram",
    ),
    "language": ("language_probability",),
    "personal": (
        "personal_card", "personal_email", "personal_iban", "personal_ip", "personal_phone", "personal_secret",
    ),
}  # fmt: skip
Bounds = tuple[float | None, float | None]


def read_expectations(value: Any) -> dict[str, Bounds]:
    """The block as `{name: (low, high)}`, None where a side is open; `languages: {en: …}` is `languages.en`.

    Raises ValueError that names what is wrong and the nearest valid name.
    """
    if not isinstance(value, Mapping):
        raise ValueError("expected names with bounds, such as {mean_length: [200, 4000]}")
    return {name: _bounds(name, bounds) for name, bounds in _flat("", value)}


def _flat(before: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{before}{key}"
        if isinstance(inner, Mapping):
            yield from _flat(f"{name}.", inner)
        else:
            _check_name(name)
            yield name, inner


def _check_name(name: str) -> None:
    first, _, rest = name.partition(".")
    if name in FIGURES or (first in SHARES and rest):
        return
    parts = name.split(".")
    if first == "attributes" and len(parts) == 3 and parts[1] in attribute_names() and parts[2] in STATISTICS:
        return
    valid = [*FIGURES, *(f"{family}.NAME" for family in SHARES), "attributes.NAME.STATISTIC"]
    if first == "attributes":
        valid = [f"attributes.{one}.{statistic}" for one in attribute_names() for statistic in STATISTICS]
    close = difflib.get_close_matches(name, [one.replace(".NAME", f".{rest}") for one in valid], n=1, cutoff=0.5)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    shown = ", ".join(valid if first != "attributes" else [f"attributes.{one}.mean" for one in attribute_names()])
    raise ValueError(f"`{name}` is no figure of a corpus{hint} Valid here: {shown}")


def attribute_names() -> list[str]:
    """All attributes, sorted."""
    return sorted(name for names in ATTRIBUTES.values() for name in names)


def _bounds(name: str, value: Any) -> Bounds:
    sides = tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else ()
    numbers = [side for side in sides if isinstance(side, int | float) and not isinstance(side, bool)]
    if len(sides) != 2 or len(numbers) != sum(side is not None for side in sides) or not numbers:
        raise ValueError(f"`{name}`: expected [least, most], null for an open side, got {value!r}")
    low, high = (None if side is None else float(side) for side in sides)
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"`{name}`: the least ({low:g}) is above the most ({high:g})")
    return low, high


def signals_needed(names: Mapping[str, Bounds]) -> list[str]:
    """The signals that must be measured for these figures."""
    needed = {"gopher_quality"} if "words" in names else set()
    if any(name.startswith("languages.") for name in names):
        needed.add("language")
    if "anomalies" in names:
        needed |= {"gopher_quality", "gopher_repetition"}
    for name in names:
        if name.startswith("attributes."):
            needed |= {signal for signal, known in ATTRIBUTES.items() if signal and name.split(".")[1] in known}
    return sorted(needed)
