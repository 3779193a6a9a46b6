"""What a batch is worth: the language model's objective and DPO's, behind the same four methods.

B sequences, T positions, D model width. A part is a slice of a batch, one forward and backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from soma.data.loader import Batch, PreferenceBatch, PreferenceLoader, TokenLoader
from soma.model.dropout import stamped
from soma.model.lora import without_updates
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.world import World

Features = Callable[..., tuple[Tensor, Tensor]]


class Objective(Protocol):
    """How a batch becomes a loss. Sums are over the part, in nats, float32; the trainer divides by the global count."""

    def count(self, batch: Any) -> int:
        """What the sum is divided by: targets of this rank's batch, or pairs."""

    def parts(self, batch: Any, size: int) -> Iterator[Any]:
        """The batch in slices of `size` sequences."""

    def backward(self, part: Any, scale: Tensor, aux_scale: Tensor) -> Tensor:
        """Add the gradient of scale · sum + aux_scale · aux; returns the sum, 0-d."""

    def loss(self, part: Any) -> Tensor:
        """The sum without gradients, in eval mode, never compiled."""


def make_loader(
    config: TrainConfig, world: World, tokens: Path, split: str, epochs: int | None = None
) -> TokenLoader | PreferenceLoader:
    """The loader of a split for this rank: of pairs for a PreferenceConfig, of packed sequences else."""
    rows, rank, size = config.batch_size // world.data_size, world.data_rank, world.data_size
    if isinstance(config, PreferenceConfig):
        return PreferenceLoader(tokens, split, config.sequence_length, rows, rank, size, config.seed, epochs)
    pack = None if config.pack == "auto" else config.pack
    return TokenLoader(tokens, split, config.sequence_length, rows, rank, size, config.seed, pack, epochs,
                       truncate=config.long_conversations == "truncate", buffer=config.pack_buffer,
                       length_stages=config.length_stages, stream=config.stream)  # fmt: skip


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A numpy array as a tensor on the device."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def stamps_of(batch: Batch, rows: slice, device: torch.device) -> Tensor | None:
    """The stamps of some rows (B, T), where the batch has any."""
    return None if batch.stamps is None else to_device(batch.stamps[rows], device)


class Inputs:
    """Runs the model over a slice of a batch, compiled if the run is."""

    def __init__(self, model: Transformer, config: TrainConfig, compute: Compute) -> None:
        self.model, self.compute, self.isolate = model, compute, config.isolate_documents
        self.compiled: Features = torch.compile(model.features, dynamic=False) if compute.compile else model.features

    def __call__(self, batch: Batch, rows: slice, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, T, D), auxiliary loss, targets (B, T)."""
        device = self.compute.device
        tokens_BT, targets_BT = to_device(batch.tokens[rows], device), to_device(batch.targets[rows], device)
        documents = []
        if self.isolate:
            documents = [to_device(batch.positions[rows], device), to_device(batch.document_ids[rows], device)]
        with self.compute.autocast(), stamped(stamps_of(batch, rows, device)):
            x_BTD, aux = features(tokens_BT, *documents)
        return x_BTD, aux, targets_BT


class LanguageModeling:
    """Cross-entropy of the next token, wherever the batch has a target. Pretraining and instruction tuning."""

    def __init__(
        self, model: Transformer, config: TrainConfig, compute: Compute,
        cross_entropy_sum: loss.ChunkLoss = loss.cross_entropy_sum,
    ) -> None:  # fmt: skip
        self.inputs = Inputs(model, config, compute)

        def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
            with compute.autocast():
                logits_NV = model.logits(x_ND)
            return cross_entropy_sum(logits_NV, targets_N)

        self.plain_chunk_loss = chunk_loss
        self.chunk_loss = torch.compile(chunk_loss, dynamic=False) if compute.compile else chunk_loss

    def count(self, batch: Batch) -> int:
        return int((batch.targets != loss.IGNORE).sum())

    def parts(self, batch: Batch, size: int) -> Iterator[tuple[Batch, slice]]:
        for start in range(0, len(batch.tokens), size):
            yield batch, slice(start, start + size)

    def backward(self, part: tuple[Batch, slice], scale: Tensor, aux_scale: Tensor) -> Tensor:
        x_BTD, aux, targets_BT = self.inputs(*part, self.inputs.compiled)
        stamps_BT = stamps_of(*part, x_BTD.device)
        return loss.backward(
            x_BTD, aux, targets_BT, self.rows(part), self.chunk_loss, scale, aux_scale, stamps_BT=stamps_BT
        )  # fmt: skip

    @torch.no_grad()
    def loss(self, part: tuple[Batch, slice]) -> Tensor:
        x_BTD, _, targets_BT = self.inputs(*part, self.inputs.model.features)
        return loss.loss_sum(x_BTD, targets_BT, self.rows(part), self.plain_chunk_loss)

    def rows(self, part: tuple[Batch, slice]) -> Tensor | None:
        """The positions of a part that have a target; None if all have."""
        batch, rows = part
        kept = loss.kept_rows(batch.targets[rows])
        return None if kept is None else to_device(kept, self.inputs.compute.device)


class Preference:
    """DPO (Rafailov et al. 2023): the chosen answer against the rejected one, relative to the frozen starting model.

    reference: that model; None: the weights below the updates of the one that is trained. Both answers of a pair are
    rows of one forward pass. `across` sums the log-probabilities of a sequence that lies on several ranks.
    """

    def __init__(
        self, model: Transformer, reference: Transformer | None, config: PreferenceConfig, compute: Compute,
        target_logprobs: loss.ChunkLoss = loss.target_logprobs, across: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:  # fmt: skip
        self.config, self.compute, self.target_logprobs, self.across = config, compute, target_logprobs, across
        self.inputs = Inputs(model, config, compute)
        self.is_below = reference is None
        self.reference_inputs = (
            self.inputs if reference is None else Inputs(reference.eval().requires_grad_(False), config, compute)
        )

    def count(self, batch: PreferenceBatch) -> int:
        return int(batch.is_pair.sum())

    def parts(self, batch: PreferenceBatch, size: int) -> Iterator[tuple[PreferenceBatch, slice]]:
        for start in range(0, len(batch.is_pair), size):
            yield batch, slice(start, start + size)

    def backward(self, part: tuple[PreferenceBatch, slice], scale: Tensor, aux_scale: Tensor) -> Tensor:
        total, aux = self.pair_loss(part, self.inputs.compiled, self.reference_inputs.compiled)
        (total * scale + aux * aux_scale).backward()
        return total.detach()

    @torch.no_grad()
    def loss(self, part: tuple[PreferenceBatch, slice]) -> Tensor:
        return self.pair_loss(part, self.inputs.model.features, self.reference_inputs.model.features)[0]

    def pair_loss(
        self, part: tuple[PreferenceBatch, slice], features: Features, reference_features: Features
    ) -> tuple[Tensor, Tensor]:
        """Sum of the pairs' losses and the auxiliary loss."""
        answers = both_answers(*part)
        with torch.no_grad(), below_updates(self.inputs.model) if self.is_below else nullcontext():
            reference_P, _ = self.answer_logprobs(answers, self.reference_inputs, reference_features)
        logprobs_P, aux = self.answer_logprobs(answers, self.inputs, features)
        is_pair_B = to_device(part[0].is_pair[part[1]], logprobs_P.device)
        return loss.pairs_loss(logprobs_P, reference_P, is_pair_B, self.config.beta), aux

    def answer_logprobs(self, batch: Batch, inputs: Inputs, features: Features) -> tuple[Tensor, Tensor]:
        """log p of each row's answer, (B,), float32, and the auxiliary loss."""
        x_BTD, aux, targets_BT = inputs(batch, slice(None), features)

        def chunk_logprobs(x_ND: Tensor, targets_N: Tensor) -> Tensor:
            with self.compute.autocast():
                logits_NV = inputs.model.logits(x_ND)
            return self.target_logprobs(logits_NV, targets_N)

        kept = loss.kept_rows(batch.targets)
        rows = None if kept is None else to_device(kept, x_BTD.device)
        stamps_BT = stamps_of(batch, slice(None), x_BTD.device)
        return self.across(loss.answer_logprobs(x_BTD, targets_BT, rows, chunk_logprobs, stamps_BT)), aux


@contextmanager
def below_updates(model: nn.Module) -> Iterator[None]:
    """Inside, a model that is trained by updates is the frozen one that it began as, in eval mode."""
    is_training = model.training
    model.eval()
    try:
        with without_updates():
            yield
    finally:
        model.train(is_training)


def both_answers(batch: PreferenceBatch, rows: slice) -> Batch:
    """The chosen answers of some rows, and below them the rejected ones."""
    sides = [side.map(lambda array: array[rows]) for side in (batch.chosen, batch.rejected)]
    both = {field.name: [getattr(side, field.name) for side in sides] for field in fields(Batch)}
    joined: dict[str, Any] = {name: None if one is None else np.concatenate((one, other))
                              for name, (one, other) in both.items()}  # fmt: skip
    return Batch(**joined)
