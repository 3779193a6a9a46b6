"""Documents to stored ids, with a memory of words: ids of a piece of text that came before are not computed again.

A byte-level BPE tokenizer cuts a text with a regular expression and merges within each cut. Where a space stands
between an ASCII mark, digit or letter and an ASCII letter, each of the expressions known here cuts before the space,
and none looks back or beyond it; so the ids of a text are the ids of its pieces between such spaces, one after the
other. Any other tokenizer (another expression, SentencePiece, WordPiece) encodes whole documents.
"""

import json
import os
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import tokenizers

from soma.data.tokenizer import NUMBERS, PATTERNS
from soma.model.tokenizer import Tokenizer

CUT = re.compile(" (?<=[!-~] )(?=[A-Za-z])")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
KNOWN = {pattern.replace("NUMBERS", numbers) for pattern in PATTERNS.values() for numbers in NUMBERS.values()} | {
    LLAMA3, LLAMA3.replace("{1,3}", "")  # Qwen 2 takes single digits
}  # fmt: skip
MEMORY = 1 << 22  # characters of pieces that are remembered, about 100 MB with their ids
THREADS = 3  # the memory works in one thread and about this many times as fast as the library does in one


class DocumentEncoder:
    """Ids of documents as they are stored: special tokens' names as characters, the end-of-text id last."""

    def __init__(self, runtime: Tokenizer, eos_id: int, dtype: np.dtype[Any]) -> None:
        self.runtime, self.dtype = runtime, dtype
        self.eos = np.array([eos_id], dtype).tobytes()
        self.remembers = threads() <= THREADS and cuts_at_spaces(runtime.plain)
        self.known: dict[str, bytes] = {}
        self.held = 0

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One array of ids for each text."""
        if not self.remembers:
            return [np.frombuffer(ids + self.eos, self.dtype) for ids in self._encode(texts)]
        pieces_D = [CUT.split(text) for text in texts]
        firsts = self._encode([pieces[0] for pieces in pieces_D])  # no space before them: not the same pieces
        new = list(set(chain.from_iterable(pieces[1:] for pieces in pieces_D)) - self.known.keys())
        self.known.update(zip(new, self._encode([" " + piece for piece in new]), strict=True))
        lookup = self.known.__getitem__
        found = [
            np.frombuffer(b"".join([first, *map(lookup, pieces[1:]), self.eos]), self.dtype)
            for first, pieces in zip(firsts, pieces_D, strict=True)
        ]
        self.held += sum(map(len, new))
        if self.held > MEMORY:
            self.known.clear()
            self.held = 0
        return found

    def _encode(self, texts: list[str]) -> Iterable[bytes]:
        """The library's ids of each text, one conversion for all."""
        ids_D = self.runtime.encode_batch(texts, as_text=True)
        ends = np.cumsum([0, *map(len, ids_D)]) * self.dtype.itemsize
        data = np.fromiter(chain.from_iterable(ids_D), self.dtype).tobytes()
        return (data[start:end] for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def threads() -> int:
    """How many threads the library encodes with."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no", "f", "n"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else os.cpu_count() or 1


def cuts_at_spaces(inner: tokenizers.Tokenizer) -> bool:
    """True where the ids of a text are those of its pieces between `CUT`s."""
    model, normalizer = inner.model, inner.normalizer
    if not isinstance(model, tokenizers.models.BPE) or model.dropout or inner.pre_tokenizer is None:
        return False
    if normalizer is not None and not isinstance(normalizer, tokenizers.normalizers.NFC):
        return False
    for token in inner.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\S\s", token.content):
            return False
    return _is_known(json.loads(inner.pre_tokenizer.__getstate__()))


def _is_known(facts: dict[str, Any]) -> bool:
    """A byte-level pre-tokenizer with its own (GPT-2's) expression, or after a split by one of `KNOWN`."""
    split: dict[str, Any] | None = None
    if facts["type"] == "Sequence":
        if [part["type"] for part in facts["pretokenizers"]] != ["Split", "ByteLevel"]:
            return False
        split, facts = facts["pretokenizers"]
    if facts["type"] != "ByteLevel" or facts["add_prefix_space"] or facts["use_regex"] != (split is None):
        return False
    if split is None:
        return True
    return split["pattern"].get("Regex") in KNOWN and split["behavior"] == "Isolated" and not split["invert"]
