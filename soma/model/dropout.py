"""Dropout whose masks are a function of what they are for, so that they do not depend on who computes what, or when.

Every token of a training step has a *stamp*: a number made from the run's seed, the step, the token's sequence in the
batch of all ranks and its place in the sequence (`soma.train.stamps`). From a token's stamp and a layer's salt follows
which of the layer's inputs are dropped: no generator has a state, so ranks, pieces of a sequence, microbatches,
pipeline stages, a layer that is computed again and a run that is resumed all find the same mask.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195) with (stamp, salt) as the
seed. Its words are 64 bits of integer arithmetic that wraps, the same on every device, compiled or not; each gives four
inputs 16 bits.

Letters: K inputs of a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from soma.base.errors import UserError

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
STEPS = 1 << 16  # what a share is rounded to


@dataclass
class Pass:
    """The forward pass that is under way in this process. `stamps`: those of its tokens, int64 (…); None: not known."""

    stamps: Tensor | None = None


current = Pass()


@contextmanager
def stamped(stamps: Tensor | None) -> Iterator[None]:
    """The forward passes inside are about tokens with these stamps, int64, (B, T) or any shape of as many."""
    before, current.stamps = current.stamps, stamps
    try:
        yield
    finally:
        current.stamps = before


def signed(word: int) -> int:
    """A 64-bit word as int64 has it. signed(2**64 - 1) is -1."""
    return word - (1 << 64) if word >> 63 else word


def mix(z: Tensor) -> Tensor:
    """SplitMix64's function of its state, int64 to int64, in place. mix(GAMMA) is 0xE220A8397B1DCDAF."""
    for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
        high = z >> shift  # with copies of the sign bit, which are masked away
        z ^= high.bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            z *= signed(factor)
    return z


def steps_of(share: float) -> int:
    """The share of inputs to drop, in steps of 1/65,536: the probability that a mask has exactly. 0.1 is 6,554."""
    return min(round(share * STEPS), STEPS - 1)


def kept_share(share: float) -> float:
    """The probability that an input is kept; what is kept is divided by it, so that means are exact. 0.1: 0.899994."""
    return 1 - steps_of(share) / STEPS


def dropped(shape: torch.Size, salt: Tensor, first: int, share: float) -> Tensor:
    """Which of a layer's inputs (…, K) of that shape are dropped, bool, in the pass that is under way.

    salt: the layer's, int64, 0-d. first: the number of the first input, where a rank has some of a layer's inputs.

    Raises UserError where the pass has no stamps.
    """
    if current.stamps is None:
        raise UserError(
            "lora_dropout: a forward pass in training mode must know which tokens it is about: run it inside "
            "soma.model.dropout.stamped(stamps), or call model.eval()"
        )
    count, skipped = shape[-1], first % 4
    seeds = mix(current.stamps.reshape(shape[:-1]).contiguous() ^ salt)
    numbers = torch.arange(first // 4 + 1, (first + count - 1) // 4 + 2, device=seeds.device)
    words = mix(seeds[..., None] + numbers * signed(GAMMA))
    return words.view(torch.int16)[..., skipped : skipped + count] < steps_of(share) - STEPS // 2
