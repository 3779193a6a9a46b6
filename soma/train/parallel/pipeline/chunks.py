"""The time of passes through a stage whose tokens travel to experts on other ranks, alone and in turns. Loads no torch.

A pass computes, exchanges, computes, exchanges, …, computes: a layer with experts has two exchanges, dispatch and
combine. Computation is one resource of a rank, communication another (on a GPU: two streams), and the order on both is
that of `overlap.in_turns`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from soma.train.parallel.pipeline.costs import Costs


@dataclass(frozen=True)
class Chunk:
    """A pass through a stage, in any unit of time.

    compute: before, between and after the exchanges, one more than these. behind: computation that comes after each of
    these but holds no exchange up (gradients of matrices); none: zeros.
    """

    compute: Sequence[float]
    exchange: Sequence[float]
    behind: Sequence[float] = ()

    def __post_init__(self) -> None:
        assert len(self.compute) == len(self.exchange) + 1, (self.compute, self.exchange)
        assert len(self.behind) in (0, len(self.compute)), self.behind

    @property
    def work(self) -> float:
        """Computation alone."""
        return sum(self.compute) + sum(self.behind)

    @property
    def first_part(self) -> "Chunk":
        """The same without what is behind: a B whose W comes later."""
        return Chunk(self.compute, self.exchange)


def length(*passes: Chunk) -> float:
    """The time that passes take in turns; of one alone, with its exchanges in the open.

    Worked number: two passes that each compute 2, exchange 1, compute 2 take 5 each alone and 8 in turns: all hidden.
    With exchanges of 3 they take 7 each alone and 10 in turns: the exchanges run from 2 to 8, and the last two
    computations start at 5 and at 8.
    """
    computing = communicating = 0.0
    sent, here = [0.0] * len(passes), [0.0] * len(passes)
    for turn in range(max(len(one.compute) for one in passes)):
        for place, one in enumerate(passes):
            if turn < len(one.compute):
                sent[place] = max(computing, here[place]) + one.compute[turn]
                computing = sent[place] + (one.behind[turn] if one.behind else 0.0)
        for place, one in enumerate(passes):
            if turn < len(one.exchange):
                here[place] = communicating = max(communicating, sent[place]) + one.exchange[turn]
    return computing


def chunk_costs(forward: Sequence[Chunk], backward: Sequence[Chunk], transfer: float = 0.0) -> Costs:
    """Times for `simulate` from the passes of every stage; those of the backward with W behind each computation."""
    pairs: Mapping[tuple[int, int], float] = {
        (f, b): length(one, other) for f, one in enumerate(forward) for b, other in enumerate(backward)
    }
    return Costs(
        [length(one) for one in forward], [length(one.first_part) for one in backward],
        [sum(one.behind) for one in backward], transfer, pairs, whole=[length(one) for one in backward],
    )  # fmt: skip
