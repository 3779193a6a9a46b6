"""A batch of texts, normalised and cut into words in one pass over its bytes, and hashes of its word n-grams.

`parse(texts)` gives what `normalized` gives for each text (the tests hold it to that), as one buffer that Arrow takes
as it is: numpy looks at bytes, Python only at documents. Case folding and white space beyond ASCII stay with `str`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

# What `str.split` cuts at: in ASCII, and beyond.
BLANK = np.zeros(256, bool)
BLANK[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True
WIDE_BLANKS = (
    "\x85",
    "\xa0",
    "\u1680",
    *map(chr, range(0x2000, 0x200B)),
    "\u2028",
    "\u2029",
    "\u202f",
    "\u205f",
    "\u3000",
)

# Words are hashed by a polynomial modulo 2^64, which is an even spread only of short strings (Thue and Morse's strings
# of 1024 letters and more collide for every base): longer words are hashed by BLAKE2b.
LONG_WORD = 1000
PARSED_AT_ONCE = 1 << 18  # characters: what is looked at several times stays in the cache
CHUNK = 1 << 18  # bytes whose powers fit in the second-level cache
BASE = 0x9E3779B97F4A7C15
SPREAD = 0xD1B54A32D192ED03  # words of an n-gram are weighed by its powers
ONES = (1 << 64) - 1


@dataclass(frozen=True)
class Words:
    """Normalised texts back to back. All arrays but `data` (uint8) are int64.

    `offsets` (documents + 1,): where texts begin in `data`; `starts`, `ends` (words,): each word's place in `data`;
    `first` (documents + 1,): each text's first word.
    """

    data: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def arrow(self) -> Any:
        """The normalised texts as an Arrow large_string array that shares `data`."""
        import pyarrow

        buffers = [pyarrow.py_buffer(self.offsets), pyarrow.py_buffer(self.data)]
        return pyarrow.LargeStringArray.from_buffers(len(self), *buffers)


def folded(text: str) -> bytes:
    """UTF-8 of the case-folded text, every white space beyond ASCII as one space."""
    text = text.casefold()
    if not text.isascii():
        for blank in WIDE_BLANKS:
            if blank in text:  # a scan for one character runs at memory's speed, a regular expression does not
                text = text.replace(blank, " ")
    return text.encode()


def parse(texts: Sequence[str]) -> Words:
    """Normalise the texts and find their words."""
    blocks = []
    start, size = 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= PARSED_AT_ONCE or end == len(texts):
            blocks.append(_parse(texts[start:end]))
            start, size = end, 0
    return blocks[0] if len(blocks) == 1 else _joined(blocks)


def _joined(blocks: Sequence[Words]) -> Words:
    """Blocks one after the other."""
    texts = np.cumsum([0, *(block.offsets[-1] for block in blocks)])
    words = np.cumsum([0, *(len(block.starts) for block in blocks)])
    data = np.concatenate([np.zeros(0, np.uint8), *(block.data for block in blocks)])
    moved = [
        (block.offsets[:-1] + text, block.starts + text, block.ends + text, block.first[:-1] + word)
        for block, text, word in zip(blocks, texts.tolist(), words.tolist(), strict=False)
    ]
    none = np.zeros(0, np.int64)
    offsets, starts, ends, first = (
        (np.concatenate([none, *arrays]) for arrays in zip(*moved, strict=True)) if moved else [none] * 4
    )
    return Words(data, np.append(offsets, texts[-1]), starts, ends, np.append(first, words[-1]))


def _parse(texts: Sequence[str]) -> Words:
    parts = [folded(text) for text in texts]
    raw = np.frombuffer(bytearray(b" ".join([b"", *parts, b""])), np.uint8)
    begins = np.cumsum([1, *(len(part) + 1 for part in parts)])  # of each text in `raw`, and one past the last
    blank = BLANK[raw]
    turns = np.flatnonzero(blank[1:] != blank[:-1]) + 1  # `raw` begins and ends blank: word, blank, word, blank …
    starts, ends = turns[0::2], turns[1::2]
    first = np.searchsorted(starts, begins)
    follows = np.ones(len(starts), bool)  # whether a space stands before the word
    follows[first[:-1][np.diff(first) > 0]] = False
    spaces = starts[follows] - 1
    raw[spaces] = 32
    keep = ~blank
    keep[spaces] = True
    lengths = ends - starts
    reach = np.concatenate([[0], np.cumsum(lengths + follows)])
    return Words(raw[keep], reach[first], reach[1:] - lengths, reach[1:], first)


def word_hashes(words: Words) -> np.ndarray:
    """A 64-bit hash of each word, uint64 (words,): equal words have equal hashes in every batch."""
    hashes = np.empty(len(words.starts), np.uint64)
    lengths = words.ends - words.starts
    powers, inverses = _powers()
    for low, high in _chunks(words.starts, words.ends):
        begin, end = words.starts[low], words.ends[high - 1]
        if end - begin <= CHUNK:
            sums = np.zeros(end - begin + 1, np.uint64)
            np.cumsum((words.data[begin:end] + np.uint64(1)) * powers[: end - begin], out=sums[1:])
            here = words.starts[low:high] - begin
            hashes[low:high] = (sums[words.ends[low:high] - begin] - sums[here]) * inverses[here]
    hashes = mix(hashes + lengths.astype(np.uint64))
    for long in np.flatnonzero(lengths > LONG_WORD).tolist():
        word = words.data[words.starts[long] : words.ends[long]]
        hashes[long] = int.from_bytes(blake2b(word.tobytes(), digest_size=8).digest(), "little")
    return hashes


def shingle_hashes(words: Words, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, offsets): the distinct word n-grams of each text as 64-bit hashes, ascending within a text.

    What `shingle_set` gives, hashed: a text of at most `ngram` words is one shingle. Two different shingles share a
    hash with probability 2^-64.
    """
    each = word_hashes(words)
    padded = np.concatenate([each, np.zeros(ngram, np.uint64)])
    sums = np.zeros(len(each), np.uint64)
    for place in range(ngram):
        sums += padded[place : place + len(each)] * np.uint64(pow(SPREAD, place + 1, 1 << 64))
    sums = mix(sums)
    found = []
    for low, high in zip(words.first[:-1].tolist(), words.first[1:].tolist(), strict=True):
        if high - low > ngram:
            found.append(distinct(sums[low : high - ngram + 1]))
        else:
            weights = (pow(SPREAD, place + 1, 1 << 64) for place in range(ngram))
            whole = sum(word * weight for word, weight in zip(each[low:high].tolist(), weights, strict=False))
            found.append(mix(np.array([whole & ONES], np.uint64)))
    offsets = np.cumsum([0, *(len(one) for one in found)])
    return np.concatenate([np.zeros(0, np.uint64), *found]), offsets


def distinct(values: np.ndarray) -> np.ndarray:
    """Each value once, ascending. By sorting: `numpy.unique` makes a hash table, which took 7 to 100 times as long."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def mix(values: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 spread over all bits, one to one (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64 for i below `CHUNK`."""
    inverse = pow(BASE, -1, 1 << 64)
    tables = []
    for base in (BASE, inverse):
        steps = np.full(CHUNK, base, np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps))
    return tables[0], tables[1]


def _chunks(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of words that span at most `CHUNK` bytes; a longer word is a range of its own."""
    low = 0
    while low < len(starts):
        high = int(np.searchsorted(ends, starts[low] + CHUNK, side="right"))
        yield low, max(high, low + 1)
        low = max(high, low + 1)
