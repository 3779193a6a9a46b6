"""What a pipeline's last stage makes of its hidden states: the loss of a microbatch, and its gradient.

Shape letters: B sequences of a microbatch, T positions, D model width; of pairs P = 2B: the chosen answers of B pairs,
then the rejected ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from soma.data.loader import PreferenceBatch
from soma.train import loss
from soma.train.objective import both_answers
from soma.train.parallel.pipeline.microbatch import Microbatch


class Head(Protocol):
    """Sums are over the microbatch, in nats, 0-d float32, detached."""

    def backward(self, y_BTD: Tensor, microbatch: Microbatch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum; and of what tensor, with what gradient, the backward pass of scale · sum is still to be run."""

    def loss(self, y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        """The sum without gradients."""


class LanguageHead:
    """Cross-entropy of the next token. `chunk_loss` as in `soma.train.loss.head_backward`."""

    def __init__(self, chunk_loss: loss.ChunkLoss) -> None:
        self.chunk_loss = chunk_loss

    def backward(self, y_BTD: Tensor, microbatch: Microbatch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss.head_seeds(
            y_BTD, microbatch.targets, microbatch.rows, self.chunk_loss, scale, microbatch.stamps
        )  # fmt: skip

    def loss(self, y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        return loss.loss_sum(y_BTD, microbatch.targets, microbatch.rows, self.chunk_loss)


@dataclass(frozen=True, eq=False)
class Pairs(Microbatch):
    """Preference pairs: all chosen answers, below them all rejected ones. `is_pair`: bool (B,), False for rows that
    fill up; `reference`: the reference model's log p of each answer, (P,), where the last stage is.
    """

    is_pair: Tensor | None = None
    reference: Tensor | None = None

    @classmethod
    def of_pairs(cls, batch: PreferenceBatch, rows: slice, device: torch.device, isolate: bool = True) -> Self:
        """Rows of a loader's batch; without `isolate` documents see each other."""
        answers = cls.of(both_answers(batch, rows), slice(None), device, isolate)
        return replace(answers, is_pair=torch.from_numpy(batch.is_pair[rows]).to(device, non_blocking=True))


Logprobs = Callable[[Tensor, Microbatch], Tensor]  # hidden states to log p of each answer, with gradients


class PairHead:
    """DPO's loss."""

    def __init__(self, logprobs: Logprobs, beta: float) -> None:
        self.logprobs, self.beta = logprobs, beta

    def backward(self, y_BTD: Tensor, microbatch: Microbatch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = self.total(y_BTD, microbatch)
        return total.detach(), total, scale.to(total.dtype)

    def loss(self, y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        return self.total(y_BTD, microbatch)

    def total(self, y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        """The sum over the pairs."""
        assert isinstance(microbatch, Pairs)
        assert microbatch.is_pair is not None
        assert microbatch.reference is not None
        logprobs_P = self.logprobs(y_BTD, microbatch)
        return loss.pairs_loss(logprobs_P, microbatch.reference, microbatch.is_pair, self.beta)


class ReferenceHead:
    """Keeps the log-probabilities of each microbatch's answers until `take`."""

    def __init__(self, logprobs: Logprobs) -> None:
        self.logprobs = logprobs
        self.found: dict[Microbatch, Tensor] = {}

    def backward(self, y_BTD: Tensor, microbatch: Microbatch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("a reference model is not trained")

    def loss(self, y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        self.found[microbatch] = self.logprobs(y_BTD, microbatch)
        return torch.zeros((), device=y_BTD.device)

    def take(self, microbatches: list[Pairs]) -> list[Pairs]:
        """The microbatches with what was found for them here."""
        found, self.found = self.found, {}
        return [replace(microbatch, reference=found.get(microbatch)) for microbatch in microbatches]
