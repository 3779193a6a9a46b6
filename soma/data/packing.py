"""How documents become sequences: a plan of pieces on a line of slots, made anew for each epoch without a loop over
tokens.

The unit is a (input, target) pair within one document. In unmasked data a document of n tokens (its end-of-text token
is the last) has n pairs: the end-of-text token is the input before its first token, as it would be if the document
before it were there. So an end-of-text token ends its document as a target and begins the next as an input, every
stored token is a target once, and a model is asked at evaluation what it saw in training. In masked (chat) data a
document has n − 1 pairs.

Sequence s of the epoch is the slots [s·T, (s+1)·T). A slot that no piece covers is padding.

`WholePacker` is best-fit packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830):
only what is longer than T is cut. `Blocks` packs and shuffles within blocks of documents, so that memory stays bounded
and what is read lies close together; with length stages the blocks of short documents come first in every epoch.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

PLANS_KEPT = 3


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


def random(seed: int, *place: int) -> np.random.Generator:
    """The generator of one epoch, or of a block in it; the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *place])))


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


Packer = ConcatPacker | WholePacker | SinglePacker


def blocks_of(
    pairs: np.ndarray, buffer: int | None, length_stages: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The documents of each block, and the stage of each block, ascending.

    Stage i holds the documents of at most length_stages[i] pairs that no stage before it holds, one more stage the
    longer ones. A block is `buffer` documents of a stage, in a row as they are stored; None: all of them.
    """
    stage_N = np.searchsorted(np.asarray(length_stages, np.int64), pairs, side="left")
    blocks, stages = [], []
    for stage in range(len(length_stages) + 1):
        documents = np.flatnonzero(stage_N == stage)
        size = buffer or max(len(documents), 1)
        found = [documents[start : start + size] for start in range(0, len(documents), size)]
        blocks += found
        stages += [stage] * len(found)
    return blocks, np.array(stages, np.int64)


class Blocks:
    """Documents in blocks, each packed alone by `make`, which is given the numbers of its documents.

    `sequences` is the same in every epoch. An epoch visits the stages in order and the blocks of a stage in a permuted
    one. A block's packer is made again when its turn comes: in memory are the numbers of the documents and the plans of
    the last `PLANS_KEPT` blocks.
    """

    def __init__(
        self, make: Callable[[np.ndarray], Packer], documents: list[np.ndarray], stages: np.ndarray,
        sequence_length: int,
    ) -> None:  # fmt: skip
        self.make, self.documents, self.stages, self.sequence_length = make, documents, stages, sequence_length
        packers = [make(block) for block in documents]
        self.counts = np.array([packer.sequences for packer in packers], np.int64)
        self.left_out = sum(packer.left_out for packer in packers)
        self.sequences = int(self.counts.sum())
        self.only = packers[0] if len(packers) == 1 else None
        self.plans: OrderedDict[tuple[int, int, int], tuple[Plan, np.ndarray]] = OrderedDict()

    @classmethod
    def single(cls, packer: SinglePacker) -> "Blocks":
        """All in one block."""
        return cls(lambda _: packer, [np.arange(len(packer.pairs))], np.zeros(1, np.int64), packer.sequence_length)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The blocks in the order in which an epoch visits them."""
        if self.only is not None:
            return np.zeros(1, np.int64)
        return np.lexsort((random(seed, epoch, 0).random(len(self.stages)), self.stages))

    def plan(self, seed: int, epoch: int, block: int) -> tuple[Plan, np.ndarray]:
        """A block's plan in an epoch and its order of sequences."""
        key = (seed, epoch, block)
        if key not in self.plans:
            if self.only is not None:
                self.plans[key] = self.only.plan(random(seed, epoch))
            else:
                documents = self.documents[block]
                plan, permuted = self.make(documents).plan(random(seed, epoch, 1 + block))
                self.plans[key] = replace(plan, document=documents[plan.document]), permuted
            if len(self.plans) > PLANS_KEPT:
                self.plans.popitem(last=False)
        self.plans.move_to_end(key)
        return self.plans[key]

    def locate(self, seed: int, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, Plan, np.ndarray]]:
        """For sequences counted over all epochs, block by block: which of `numbers` lie in it, its plan, and their
        sequences in that plan.
        """
        for epoch in np.unique(numbers // self.sequences).tolist():
            order = self.order(seed, epoch)
            ends = np.cumsum(self.counts[order])
            here = np.flatnonzero(numbers // self.sequences == epoch)
            within = numbers[here] % self.sequences
            turn = np.searchsorted(ends, within, side="right")
            for number in np.unique(turn).tolist():
                block = int(order[number])
                plan, permuted = self.plan(seed, epoch, block)
                chosen = turn == number
                yield here[chosen], plan, permuted[within[chosen] - (ends[number] - self.counts[block])]

    def upcoming(self, seed: int, number: int) -> Iterator[np.ndarray]:
        """The documents of the block that holds a sequence (counted over all epochs), then of those after it."""
        epoch, within = divmod(number, self.sequences)
        order = self.order(seed, epoch)
        turn = int(np.searchsorted(np.cumsum(self.counts[order]), within, side="right"))
        while True:
            yield from (self.documents[block] for block in order[turn:])
            epoch, turn = epoch + 1, 0
            order = self.order(seed, epoch)


@dataclass(frozen=True)
class Waste:
    """What a way of packing does to a split. Shares are of all slots, or of the documents."""

    sequences: int
    padding: float  # share of the slots that hold nothing
    cut: int  # documents that lie in more than one sequence
    needless: int  # of these, the ones that would fit into one
    left_out: int


def waste(blocks: Blocks, pairs: np.ndarray) -> Waste:
    """Padding and cuts of the first epoch, counted in the plan.

    Worked example: three documents of 3 pairs at T = 4: concatenated 3 sequences, a quarter of them padding, 2 cut,
    both needlessly; whole 3 sequences, none cut.
    """
    length, covered = blocks.sequence_length, 0
    first, last = np.full(len(pairs), -1, np.int64), np.full(len(pairs), -1, np.int64)
    base = 0
    for block in range(len(blocks.counts)):
        plan, _ = blocks.plan(0, 0, block)
        covered += int(plan.length.sum())
        begin, end = plan.slot // length + base, (plan.slot + plan.length - 1) // length + base
        real = plan.length > 0
        order = np.argsort(-begin[real], kind="stable")  # the earliest piece is written last
        first[plan.document[real][order]] = begin[real][order]
        np.maximum.at(last, plan.document[real], end[real])
        base += int(blocks.counts[block])
    cut = first != last
    # A document longer than T must be cut; pieces of T and one rest are the fewest.
    return Waste(
        blocks.sequences, 1 - covered / max(blocks.sequences * length, 1), int(cut.sum()),
        int((cut & (pairs <= length)).sum()), blocks.left_out,
    )  # fmt: skip
