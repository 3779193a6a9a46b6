"""One cell of the pipelines' parity grid: three training steps in one process, and on the ranks of a pipeline."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soma.data.loader import Batch
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.balance import RouterBalance
from soma.train.config import TrainConfig
from soma.train.optim import build_optimizers
from soma.train.parallel.pipeline import schedules
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.heads import LanguageHead
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedule import Schedule
from soma.train.parallel.pipeline.search import search, v_half_limit
from soma.train.world import World
from tests.train.pool import device
from tests.train.replay import Choices, Replay

STEPS, B, T, CLIP = 3, 2, 12, 0.5
UNEVEN = {4: (1, 4, 2, 3), 8: (1, 2, 1, 2, 1, 1, 1, 1), 2: (3, 7), 12: ()}
SHAPE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "qwen3", "num_key_value_heads": 2},
    "gpt2": {"family": "gpt2"},
    "moe": {
        "family": "deepseek_v3", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 4,
        "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "router_aux_loss_coef": 0.05,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a cell is. `broken` names what a negative control spoils."""

    schedule: str = "1f1b"
    model: str = "dense"
    precision: str = "fp32"
    optimizer: str = "adamw"
    ranks: int = 4
    microbatches: int = 8
    tied: bool = True
    uneven: bool = True
    masked: bool = True  # unequal numbers of targets per microbatch, packed documents
    compiled: bool = False
    recompute: bool = False
    split: bool = True
    late: bool = False  # receives are posted when they are needed, as between GPUs
    broken: str = ""
    layers: int = 10

    def __str__(self) -> str:
        flags = [name for name in ("tied", "uneven", "masked", "compiled", "recompute", "late") if getattr(self, name)]
        words = [self.schedule, self.model, self.precision, self.optimizer, f"m{self.microbatches}", *flags]
        return "-".join(words if self.split else [*words, "whole"])

    @property
    def replays(self) -> bool:
        """Whether the ranks' routers choose what one process chose (`tests.train.replay`)."""
        return self.precision == "bf16" and self.model == "moe"

    @property
    def alone(self) -> "Case":
        """The same for all pipelines that must agree with one process."""
        return replace(
            self, schedule="", ranks=1, uneven=False, compiled=False, recompute=False, split=True, late=False
        )

    def config(self) -> ModelConfig:
        tied = self.tied or self.model == "gpt2"
        return ModelConfig(**SHAPE, **MODELS[self.model], num_hidden_layers=self.layers, tie_word_embeddings=tied)

    def plan(self) -> Schedule:
        if self.schedule == "search":
            return search(self.ranks, self.microbatches, v_half_limit(self.ranks))
        return schedules.SCHEDULES[self.schedule](self.ranks, self.microbatches)

    def autocast(self) -> Any:
        return torch.autocast(device().type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


@dataclass
class Trained:
    """What three steps gave: by step the loss, the norm before clipping, every gradient; then weights and biases, and
    the experts chosen."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: Choices | None = None


def make_model(case: Case) -> Transformer:
    model = Transformer(case.config())
    model.init_weights(3)
    with torch.no_grad():  # weights large enough that layers matter and routers choose clearly
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter *= 4
            elif name.endswith("bias"):
                parameter += torch.linspace(-0.1, 0.1, parameter.numel())
    return model.to(device()).train()


@cache
def batches(case: Case) -> list[Batch]:
    """Three batches; masked: packed documents, padding, and microbatches with few targets and with many."""
    rng = np.random.default_rng(11)
    made = []
    for _ in range(STEPS):
        rows = case.microbatches * B
        tokens = rng.integers(0, SHAPE["vocab_size"], (rows, T))
        targets = rng.integers(0, SHAPE["vocab_size"], (rows, T))
        positions = np.tile(np.arange(T), (rows, 1))
        documents = np.zeros((rows, T), dtype=np.int64)
        if case.masked:
            for row in range(rows):
                cut, end = rng.integers(1, T - 2), T - rng.integers(0, 2)
                documents[row, cut:] += 1
                positions[row, cut:] = np.arange(T - cut)
                documents[row, end:] = -1
                targets[row, end:] = loss.IGNORE
                targets[row, rng.random(T) < (row // B) / case.microbatches] = loss.IGNORE
        made.append(Batch(tokens, targets, positions, documents))
    return made


def train(case: Case, model: Transformer, step: Callable[[Batch, int], Tensor], clip: Callable[[], Tensor],
          before_balance: Callable[[], None], choices: Choices | None = None) -> Trained:  # fmt: skip
    """Three steps; `step` adds gradients and returns the sum of cross-entropies. `choices` as in `Replay`."""
    settings = TrainConfig(steps=STEPS, optimizer=case.optimizer, learning_rate=1e-3)
    optimizers = build_optimizers(model, settings, torch.float32)
    balance = RouterBalance(model, 1e-3, World())
    trained = Trained()
    if case.replays:
        replay = Replay(
            lambda step: batches(case.alone)[step].tokens, np.arange(T), lambda: len(trained.losses), choices
        )
        replay.attach(model)
        trained.choices = replay.choices
    for batch in batches(case.alone):
        count = int((batch.targets != loss.IGNORE).sum())
        loss_ = float(step(batch, count)) / count
        trained.gradients.append({name: own(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        trained.norms.append(float(clip()))
        for optimizer in optimizers:
            optimizer.step()
        before_balance()
        balance.step()
        model.zero_grad(set_to_none=True)
        trained.losses.append(loss_)  # the step is over
    tensors = [*model.named_parameters(), *model.named_buffers()]
    trained.weights = {name: own(t) for name, t in tensors if not name.endswith(("load", "inv_freq"))}
    return trained


def own(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def parts(case: Case, batch: Batch) -> list[Microbatch]:
    return [Microbatch.of(batch, slice(i * B, i * B + B), device()) for i in range(case.microbatches)]


def train_alone(case: Case) -> Trained:
    """One process, one microbatch after the other."""
    model = make_model(case)

    def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        with case.autocast():
            logits_NV = model.logits(x_ND)
        return loss.cross_entropy_sum(logits_NV, targets_N)

    def step(batch: Batch, count: int) -> Tensor:
        total = torch.zeros((), device=device())
        for part in parts(case, batch):
            with case.autocast():
                x_BTD, aux = model.features(part.tokens, part.positions, part.document_ids)
            scale, aux_scale = (torch.tensor(1 / share, device=device()) for share in (count, case.microbatches))
            total += loss.backward(x_BTD, aux, part.targets, part.rows, chunk_loss, scale, aux_scale)
        return total

    def clip() -> Tensor:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    return train(case, model, step, clip, lambda: None)


def alone_on_rank(rank: int, world_size: int, case: Case) -> Trained:
    """One process, which is a rank of the pool: for a GPU."""
    return train_alone(case)


def layers_of(case: Case, stages: int) -> list[list[int]] | None:
    """Uneven stages of ten layers."""
    if not case.uneven:
        return None
    counts = UNEVEN[stages]
    ends = np.cumsum(counts)
    return [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]


def train_rank(rank: int, world_size: int, case: Case, choices: Choices | None = None) -> Trained:
    """This rank's part of a pipeline."""
    plan = case.plan()
    model = make_model(case)
    pipeline = PipelineStep(
        model, plan, layers=layers_of(case, plan.stages), autocast=case.autocast, compiled=case.compiled,
        split=case.split, recompute=case.recompute,
    )  # fmt: skip
    assert pipeline.transport is not None
    pipeline.transport.when_needed |= case.late
    spoil(pipeline, case.broken)

    def step(batch: Batch, count: int) -> Tensor:
        microbatches = parts(case, batch)
        if case.broken == "swap" and rank == 1:
            microbatches[0], microbatches[1] = microbatches[1], microbatches[0]
        return pipeline.step(microbatches, 1 / count, 1 / case.microbatches)

    return train(case, model, step, lambda: pipeline.clip(CLIP), pipeline.sum_loads, choices)


def spoil(pipeline: PipelineStep, broken: str) -> None:
    """Break one thing: the grid must notice."""
    if broken == "send" and pipeline.rank == 1:
        whole = pipeline.transport.send

        def send(message: Any, reader: int, value: Tensor) -> None:
            whole(message, reader, torch.zeros_like(value) if message.microbatch == 3 else value)

        pipeline.transport.send = send  # type: ignore[method-assign]
    if broken == "loss":
        for worker in pipeline.workers.values():
            assert isinstance(worker.head, LanguageHead)
            inner = worker.head.chunk_loss
            worker.head.chunk_loss = lambda x, targets, inner=inner: inner(x, targets) * 1.001
    if broken == "reduction":
        pipeline.replicas.sum_gradients = lambda: None  # type: ignore[method-assign]
    if broken == "weight" and pipeline.rank == 2:
        for worker in pipeline.workers.values():
            inner_weight = worker.weight
            worker.weight = lambda index, inner=inner_weight: inner(index) if index != 4 else None
