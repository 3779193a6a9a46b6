"""What the model of speech acts sees of a turn: its words and pairs of words, and how it begins and ends, hashed."""

import re
import zlib
from itertools import pairwise

import numpy as np

WORD = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")
APART = re.compile(r"\s*['’]\s*(s|m|re|ve|ll|d|t)\b")  # DailyDialog writes "don ’ t"
MOST = 200


def features(text: str, buckets: int) -> np.ndarray:
    """Different buckets (int64) of the features of a text, in the order of their first occurrence."""
    words = ["<", *WORD.findall(APART.sub(r"'\1", text.lower())), ">"]
    found = ["1" + word for word in words[1:-1]] + [f"2{a} {b}" for a, b in pairwise(words)]
    found += ["s" + " ".join(words[1:4]), "e" + " ".join(words[-4:])]
    hashed = dict.fromkeys(zlib.crc32(feature.encode(errors="replace")) % buckets for feature in found)
    return np.array(list(hashed)[:MOST], np.int64)
