"""How documents become sequences: a plan of pieces on a line of slots, made anew for each epoch without a loop over
tokens.

The unit is a (input, target) pair within one document. In unmasked data a document of n tokens (its end-of-text token
is the last) has n pairs: the end-of-text token is the input before its first token, as it would be if the document
before it were there. So an end-of-text token ends its document as a target and begins the next as an input, every
stored token is a target once, and a model is asked at evaluation what it saw in training. In masked (chat) data a
document has n − 1 pairs.

Sequence s of the epoch is the slots [s·T, (s+1)·T). A slot that no piece covers is padding.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Pieces ascending by slot: piece i fills slots [slot[i], slot[i] + length[i]) with pairs skip[i].. of
    document[i].
    """

    slot: np.ndarray
    length: np.ndarray
    document: np.ndarray
    skip: np.ndarray

    def find(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For slots of any shape: the piece, the offset in it, and whether the slot is covered."""
        piece = np.maximum(np.searchsorted(self.slot, slots, side="right") - 1, 0)
        offset = slots - self.slot[piece]
        return piece, offset, (offset >= 0) & (offset < self.length[piece])


def random(seed: int, epoch: int) -> np.random.Generator:
    """The generator of one epoch; the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))


class ConcatPacker:
    """Documents one after the other in a permuted order, cut into sequences; the sequences permuted too.

    sequences = ceil(pairs / T). Nothing is left over: the last sequence is padded.
    """

    def __init__(self, pairs: np.ndarray, sequence_length: int) -> None:
        self.pairs, self.sequence_length = pairs, sequence_length
        self.left_out = 0
        self.sequences = -(-int(pairs.sum()) // sequence_length)

    def plan(self, generator: np.random.Generator) -> tuple[Plan, np.ndarray]:
        """The epoch's plan and its order of sequences."""
        document = generator.permutation(len(self.pairs))
        length = self.pairs[document]
        slot = np.concatenate([[0], np.cumsum(length)[:-1]]) if len(length) else length
        return Plan(slot, length, document, np.zeros_like(length)), generator.permutation(self.sequences)


class WholePacker:
    """Whole documents, best fit decreasing, padded. A longer document is left out (`longer="drop"`) or cut into pieces
    of T.

    Which lengths share a sequence is worked out once; each epoch deals the documents of a length anew and permutes the
    sequences, so the number of sequences is the same in every epoch.
    """

    def __init__(self, pairs: np.ndarray, sequence_length: int, cut_longer: bool) -> None:
        self.sequence_length = sequence_length
        document, self.skip = np.arange(len(pairs)), np.zeros(len(pairs), np.int64)
        if cut_longer:
            parts = -(-pairs // sequence_length)
            document = np.repeat(document, parts)
            self.skip = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * sequence_length
            length = np.minimum(pairs[document] - self.skip, sequence_length)
        else:
            length = np.where(pairs <= sequence_length, pairs, 0)
        fits = np.flatnonzero(length > 0)
        order = fits[np.argsort(-length[fits], kind="stable")]
        self.document, self.skip, self.length = document[order], self.skip[order], length[order]
        self.left_out = int((pairs > sequence_length).sum()) if not cut_longer else 0
        self.bins, self.offsets, self.sequences = best_fit(self.length, sequence_length)

    def plan(self, generator: np.random.Generator) -> tuple[Plan, np.ndarray]:
        """The epoch's plan and its order of sequences."""
        dealt = np.lexsort((generator.random(len(self.length)), -self.length))  # shuffled among equal lengths
        slot = self.bins * self.sequence_length + self.offsets
        by_slot = np.argsort(slot, kind="stable")
        dealt = dealt[by_slot]
        plan = Plan(slot[by_slot], self.length[dealt], self.document[dealt], self.skip[dealt])
        return plan, generator.permutation(self.sequences)


def best_fit(length: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit of descending lengths (each ≤ capacity) into bins: the bin and offset of each, and the number of bins.

    Worked example: lengths 6, 5, 4, 3, 2 into 10: bins 0, 1, 0, 1, 1 (6+4, 5+3+2), two bins.
    """
    bins, offsets = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    open_bins: dict[int, list[int]] = {}  # bins by the room left in them
    rooms: list[int] = []
    count = 0
    for index, size in enumerate(length.tolist()):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            target = open_bins[room].pop()
            if not open_bins[room]:
                del rooms[place], open_bins[room]
        else:
            room, target, count = capacity, count, count + 1
        bins[index], offsets[index] = target, capacity - room
        left = room - size
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(target)
    return bins, offsets, count


class SinglePacker:
    """One document a sequence, in a permuted order; `left_out` are those longer than T. For preference pairs."""

    def __init__(self, pairs: np.ndarray, fits: np.ndarray, sequence_length: int) -> None:
        self.pairs, self.sequence_length = pairs, sequence_length
        self.kept = np.flatnonzero(fits)
        self.left_out = int((~fits).sum())
        self.sequences = len(self.kept)

    def plan(self, generator: np.random.Generator) -> tuple[Plan, np.ndarray]:
        """The epoch's plan and its order of sequences; the order depends on the generator and `fits` alone."""
        length = self.pairs[self.kept]
        slot = np.arange(self.sequences) * self.sequence_length
        return Plan(slot, length, self.kept, np.zeros_like(length)), generator.permutation(self.sequences)
