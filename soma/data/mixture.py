"""Several tokens folders as one: which sequence of the training comes from which.

A mixture is a folder with an index.json of its own (`"format": "soma-mixture"`) that names its parts: tokens folders by
a path relative to it or by URL, each with the share of the sequences that it gives (`weight`) and how often it may be
gone through (`epochs`). The order of the parts is a function of the weights and the seed alone, so any position can be
found again, on any number of ranks.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soma.base.artefact import json_hash, write_json
from soma.base.errors import UserError
from soma.base.secrets import URL, redact_url
from soma.data.packing import random
from soma.data.store import MIXTURE, VERSION, read_index
from soma.data.streaming import remote_index

BLOCK = 128  # sequences whose order is permuted together; at the end of each the shares are exact
SHARED = ("dtype", "vocab_size", "tokenizer_hash", "eos_id", "masked")


class Schedule:
    """Deals the sequences 0, 1, 2 … out to parts.

    `weights` are the parts' shares (any scale), `limits` how many sequences a part has to give (None: any number). A
    part that has given all of them drops out and the others share its place by their weights. The first n sequences
    are apportioned by Webster's method: part p has given k when (k − ½)/weight is among the n smallest of all parts,
    which is known for any n without counting up to it. Within a block of `BLOCK` the order is permuted.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None], seed: int) -> None:
        assert len(weights) == len(limits)
        assert all(weight > 0 for weight in weights)
        self.weights = np.array(weights, np.float64) / sum(weights)
        self.limits = np.array([np.inf if limit is None else limit for limit in limits])
        self.seed = seed
        self.deals: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def total(self) -> int | None:
        """Sequences that all parts have to give together; None without end."""
        total = self.limits.sum()
        return None if np.isinf(total) else int(total)

    def given(self, sequences: int) -> np.ndarray:
        """How many of the first `sequences` each part gives.

        Worked example: weights 2 and 1: of 5 sequences 3 and 2 (3.3 and 1.7), of 6 sequences 4 and 2.
        """
        wanted = min(float(sequences), float(self.limits.sum()))
        full_N = np.zeros(len(self.weights), bool)
        counts = np.zeros(len(self.weights))
        while not full_N.all():  # raise the level until what is asked for is nearly met; parts that are full drop out
            level = (wanted - self.limits[full_N].sum() - len(full_N)) / self.weights[~full_N].sum()
            counts = np.where(full_N, self.limits, np.maximum(np.floor(self.weights * level + 0.5), 0))
            newly_N = ~full_N & (counts >= self.limits)
            if not newly_N.any():
                break
            full_N |= newly_N
        counts = np.minimum(counts, self.limits)
        while counts.sum() < wanted:
            counts[np.argmin(np.where(counts < self.limits, (counts + 0.5) / self.weights, np.inf))] += 1
        return counts.astype(np.int64)

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a block: its part, and the number of the sequence within that part."""
        if block not in self.deals:
            before = self.given(block * BLOCK)
            counts = self.given((block + 1) * BLOCK) - before
            part = random(self.seed, block).permutation(np.repeat(np.arange(len(counts)), counts))
            number = np.zeros(len(part), np.int64)
            for one in np.flatnonzero(counts).tolist():
                number[part == one] = before[one] + np.arange(counts[one])
            self.deals = dict([*self.deals.items()][-1:]) | {block: (part, number)}
        return self.deals[block]

    def locate(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each sequence and its number there; part −1 beyond the end."""
        part, number = np.full(len(sequences), -1, np.int64), np.zeros(len(sequences), np.int64)
        for block in np.unique(sequences // BLOCK).tolist():
            parts, numbers = self._deal(block)
            here = np.flatnonzero((sequences // BLOCK == block) & (sequences % BLOCK < len(parts)))
            part[here], number[here] = parts[sequences[here] % BLOCK], numbers[sequences[here] % BLOCK]
        return part, number


def write_mixture(out: Path, parts: Sequence[dict[str, Any]], home: Path | None = None) -> None:
    """Fill the folder `out` with the index.json of a mixture.

    Each part is `{"name", "tokens", "weight", "epochs"}`; `weight` and `epochs` may be None. `tokens` is a Path
    (written relative to `home`, where the mixture will lie; left out, `out`) or a text (a URL, a folder from the root;
    written as it is). Raises UserError where parts were made with other tokenizers or are no tokens of one kind, and
    for a URL with a secret in it.
    """
    entries: list[dict[str, Any]] = []
    shared: dict[str, Any] | None = None
    splits: dict[str, dict[str, int]] = {}
    home = home or out
    for part in parts:
        ref = str(part["tokens"])
        if URL.match(ref) and redact_url(ref) != ref:
            raise UserError(f"mixture: {redact_url(ref)}: keep user, password and parameters out of the address")
        index = part_index(ref)
        facts = {key: index[key] for key in SHARED}
        for key in SHARED:
            if shared is not None and facts[key] != shared[key]:
                raise UserError(
                    f"mixture: {part['name']} and {parts[0]['name']} differ in {key} ({facts[key]!r} and "
                    f"{shared[key]!r}): tokenize both with one tokenizer"
                )
        shared = facts
        place = os.path.relpath(ref, home) if isinstance(part["tokens"], Path) else ref
        entries.append({**part, "tokens": place, "content": {
            split: json_hash(entry["shards"]) for split, entry in index["splits"].items()
        }})  # fmt: skip
        for split, entry in index["splits"].items():
            so_far = splits.setdefault(split, {"tokens": 0, "documents": 0, "bytes": 0})
            for key in so_far:
                so_far[key] += entry[key]
    assert shared is not None
    write_json(
        out / "index.json", {"format": MIXTURE, "version": VERSION, **shared, "splits": splits, "parts": entries}
    )


def read_part(text: str) -> dict[str, Any]:
    """A part as the command line has it: `NAME=TOKENS[,weight=W][,epochs=E]`. UserError where it is another form."""
    name, _, rest = text.partition("=")
    tokens, *options = rest.split(",")
    part: dict[str, Any] = {"name": name, "weight": None, "epochs": None}
    part["tokens"] = tokens if URL.match(tokens) else Path(tokens).absolute()
    for option in options:
        key, _, value = option.partition("=")
        try:
            part[key] = float(value)
        except ValueError:
            key = ""
        if key not in ("weight", "epochs") or not part[key] > 0:
            raise UserError(f"--part {text}: {option!r} is neither weight= nor epochs= with a number above 0")
    if not name or not tokens:
        raise UserError(f"--part {text}: expected NAME=TOKENS, for example wiki=runs/wiki/tokens,weight=2,epochs=3")
    return part


def part_index(ref: str | Path) -> dict[str, Any]:
    """index.json of a tokens folder, here or at a URL."""
    return remote_index(str(ref)) if URL.match(str(ref)) else read_index(Path(ref))


def parts_of(folder: Path, index: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The parts of a mixture that have a split, with the place of each as it can be opened from here."""
    found = []
    for part in index["parts"]:
        if split not in part["content"]:
            continue
        ref = part["tokens"] if URL.match(part["tokens"]) else folder / part["tokens"]
        now = json_hash(part_index(ref)["splits"][split]["shards"])
        if now != part["content"][split]:
            raise UserError(f"{redact_url(str(ref))}: not the tokens that the mixture {folder} was made of")
        found.append({**part, "tokens": ref})
    if not found:
        raise UserError(f"{folder}: no part of the mixture has the split {split!r}")
    return found
