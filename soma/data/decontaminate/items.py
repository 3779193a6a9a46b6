"""Evaluation sets as fields of words, and the hashes by which they are found in documents.

A set is a file of JSON rows or Parquet rows, of which every string counts as a field of its own (those in lists and
objects too), or a text file, of which every paragraph does. Words are runs of letters and digits, case folded: as in
GPT-3 (Brown et al. 2020, appendix C) punctuation and line ends do not count.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from soma.base.errors import UserError
from soma.data.config import DecontaminateConfig
from soma.data.dedup.files import save_array
from soma.data.dedup.substring import window_hashes
from soma.data.dedup.words import parse, word_hashes
from soma.data.readers import READ_ERRORS, Dropped, decompress, json_rows
from soma.data.sources import Item, Skipped, list_items

NOT_WORD = re.compile(r"[\W_]+")
COMMON = 50  # an n-gram of more fields than this tells nothing of any one of them: it is left out of near matches
LEAST_GRAMS = 4  # a field with fewer n-grams of its own is too short for a near match
FIELD_BATCH = 4096


@dataclass(frozen=True)
class Field:
    """One field of one item: `item` counts rows or paragraphs from 1, as a person would."""

    set: str
    item: int
    name: str
    text: str


@dataclass(frozen=True)
class Targets:
    """What is looked for, as sorted hashes with the fields that have them.

    `grams`, `gram_field`: windows of `ngram` words. `heads`, `head_field`: the first `min_words` words of fields with
    fewer than `ngram`; by field, `whole`: their hash as a whole, `words`: the words of each field. `near`,
    `near_field`: windows of `near_ngram` words that few fields have. `sizes` (fields, 2): windows of each field in
    `grams` (1 for a short one) and in `near`.
    """

    grams: np.ndarray
    gram_field: np.ndarray
    heads: np.ndarray
    head_field: np.ndarray
    whole: np.ndarray
    words: np.ndarray
    near: np.ndarray
    near_field: np.ndarray
    sizes: np.ndarray

    def save(self, folder: Path) -> None:
        for name, array in vars(self).items():
            save_array(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "Targets":
        return cls(**{name: np.load(folder / f"{name}.npy") for name in cls.__dataclass_fields__})


def plain(text: str) -> str:
    """A text as its words, punctuation gone. Folding case is left to `parse`."""
    return NOT_WORD.sub(" ", text)


def read_fields(config: DecontaminateConfig) -> list[Field]:
    """All fields of all sets with at least `min_words` words, each distinct one once.

    Raises UserError for a set that is not there or cannot be read, and for one in which no field is long enough.
    """
    found: dict[str, Field] = {}
    for source in config.sets:
        used = False
        for item in list_items([source]):
            if isinstance(item, Skipped):
                raise UserError(f"data.decontaminate.sets: {item.name}: {item.detail or item.reason}")
            name = item.name if "/" in item.name else f"{PurePath(source).parent.name}/{item.name}".lstrip("/")
            for field in _fields(item, name):
                words = plain(field.text).casefold().split()
                if len(words) >= config.min_words:
                    used = True
                    found.setdefault(" ".join(words), field)
        if not used:
            raise UserError(
                f"data.decontaminate.sets: {source}: no field of at least {config.min_words} words "
                "(data.decontaminate.min_words)"
            )
    return list(found.values())


def _fields(item: Item, name: str) -> Iterator[Field]:
    """The fields of one file, which the report calls `name`."""
    try:
        with item.open() as raw:
            file = decompress(raw, item.compression)
            if item.kind == "jsonl":
                for number, row in json_rows(item, file):
                    if isinstance(row, Dropped):
                        raise UserError(f"data.decontaminate.sets: {row.source}: {row.reason} ({row.detail})")
                    yield from (Field(name, number, path, text) for path, text in _strings(row, ""))
            elif item.kind == "parquet":
                import pyarrow.parquet as pq

                for number, row in enumerate(pq.read_table(file).to_pylist(), 1):
                    yield from (Field(name, number, path, text) for path, text in _strings(row, ""))
            else:
                text = file.read().decode()
                for number, part in enumerate(filter(str.strip, re.split(r"\n\s*\n", text)), 1):
                    yield Field(name, number, "paragraph", part)
    except READ_ERRORS as error:
        raise UserError(f"data.decontaminate.sets: {item.name}: cannot be read ({error})") from None


def _strings(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with its path: `question`, `choices.2`."""
    if isinstance(value, str):
        yield name or "text", value
    elif isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _strings(inner, f"{name}.{key}" if name else str(key))


def make_targets(fields: Sequence[Field], config: DecontaminateConfig) -> Targets:
    """The hashes of these fields."""
    grams, heads, near, whole, counts = [], [], [], [], []
    for start in range(0, len(fields), FIELD_BATCH):
        words = parse([plain(field.text) for field in fields[start : start + FIELD_BATCH]])
        hashes, count = word_hashes(words), np.diff(words.first)
        owner = np.repeat(np.arange(len(words)), count)
        short = count < config.ngram
        grams.append(_windows(hashes, owner, config.ngram, start))
        near.append(_windows(hashes, owner, config.near_ngram, start))
        first = words.first[:-1][short]
        head = window_hashes(hashes, config.min_words)[first] if len(first) else np.zeros(0, np.uint64)
        heads.append((head, np.flatnonzero(short) + start))
        of_batch = np.zeros(len(words), np.uint64)
        for number in np.flatnonzero(short).tolist():
            of_batch[number] = window_hashes(hashes[words.first[number] :][: count[number]], count[number])[0]
        whole.append(of_batch)
        counts.append(count)
    gram, gram_field = _sorted(grams)
    few, few_field = _rare(*_sorted(near))
    head, head_field = _sorted(heads)
    sizes = np.stack([np.bincount(field, minlength=len(fields)) for field in (gram_field, few_field)], axis=1)
    sizes[:, 0] = np.maximum(sizes[:, 0], 1)
    return Targets(
        gram, gram_field, head, head_field, np.concatenate([np.zeros(0, np.uint64), *whole]),
        np.concatenate([np.zeros(0, np.int64), *counts]), few, few_field, sizes,
    )  # fmt: skip


def _windows(hashes: np.ndarray, owner: np.ndarray, length: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Each field's windows; `owner`: the field of each word, numbered from `first` on."""
    windows = window_hashes(hashes, length)
    inside = owner[: len(windows)] == owner[length - 1 :]
    return windows[inside], owner[: len(windows)][inside] + first


def _sorted(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes ascending, with their fields; each pair once."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(pair[0] for pair in pairs)])
    owners = np.concatenate([np.zeros(0, np.int64), *(pair[1] for pair in pairs)])
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    first = np.ones(len(order), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[first], owners[first]


def _rare(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the n-grams that more than `COMMON` fields have."""
    _, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    keep = counts[place] <= COMMON
    return hashes[keep], owners[keep]
