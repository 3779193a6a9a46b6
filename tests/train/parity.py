"""Three steps of the real training loop under a layout: what the parity grid compares with one process.

The batches are packed documents with masked answers, so that ranks, microbatches and pieces of a sequence have unequal
numbers of targets.
"""

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from soma.data.loader import IGNORE, PADDING, Batch, PreferenceBatch
from soma.model.config import ModelConfig
from soma.model.lora import add_lora, lora_layers
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import quantize
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.journal import Journal
from soma.train.loop import Trainer
from soma.train.objective import Objective
from soma.train.parallel.apply import Parallel, parallelize
from soma.train.parallel.bridge import bridge
from soma.train.parallel.bridge_deepspeed import DeepSpeedParallel, starts_in_ram
from soma.train.parallel.config import Layout
from soma.train.parallel.context import columns_of
from soma.train.parallel.export import Gather, save_merged, save_whole
from soma.train.parallel.pipeline.training import stage_model
from soma.train.start import fill
from soma.train.tracking import NullTracker
from soma.train.trainer import make_objective
from soma.train.world import World
from tests.train.pieces import collect
from tests.train.pool import device
from tests.train.replay import Choices, Replay

# A first step of AdamW is the sign of the gradient: where bf16 flips a sign, the weight is two rates away.
RATES = {"fp32": 1e-2, "bf16": 1e-3, "fp16": 1e-3}
STEPS, ROWS, LENGTH = 3, 16, 32
DENSE: dict[str, Any] = {
    "family": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
MOE = DENSE | {
    "family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip
LATENT = {
    "family": "deepseek_v3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "n_shared_experts": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
    "router_aux_loss_coef": 0.1,
}  # fmt: skip
GPT2 = {
    "family": "gpt2", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
LORA = LoRAConfig(r=3, lora_alpha=6, rank_pattern={"down_proj": 5})
WIDE = DENSE | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}  # rounded in groups of 32, cut in two
KINDS: dict[str, dict[str, Any]] = {"dense": DENSE, "moe": MOE, "latent": LATENT, "gpt2": GPT2}
# Matrices that two and four ranks cannot cut evenly; positions beyond those that the frequencies were made for.
ODD = DENSE | {"vocab_size": 97, "intermediate_size": 51, "max_position_embeddings": 16,
               "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}  # fmt: skip
# Query heads that share key heads unevenly on two ranks (4 + 2 and 2 + 4), and on four (3, 1 + 2, 2 + 1, 3).
SHARED = DENSE | {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}
# With 3, 5 and 9 layers: on 2, 4 and 8 stages they lie unevenly.
MODELS: dict[str, dict[str, Any]] = {"wide": WIDE, "odd": ODD, "shared": SHARED} | KINDS | {
    f"{name}{layers}": shape | {"num_hidden_layers": layers}
    for name, shape in KINDS.items() for layers in (3, 4, 5, 9)
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained and how. `microbatch` rows are one forward and backward pass; None: all rows of a rank."""

    model: str = "dense"
    precision: str = "fp32"
    microbatch: int | None = None
    optimizer: str = "adamw"
    checkpointing: bool | str = False
    compile: bool = False
    isolate: bool = True
    lora: str = ""  # of the frozen weights below: full, int8, int4
    pairs: bool = False  # preference pairs, by DPO against other weights, or those below the updates
    dropout: float = 0.0  # before the updates, which then stand beside the output layer too

    @property
    def replays(self) -> bool:
        """Whether the ranks' routers choose what one process chose (`tests.train.replay`)."""
        return self.precision != "fp32" and "num_experts" in MODELS[self.model] and not self.pairs


class Exact(Compute):
    """Muon's iteration in the precision of the run: in bf16 the last bit of a sum shows as 1e-3."""

    @property
    def muon_dtype(self) -> torch.dtype:
        return self.dtype


@dataclass
class Outcome:
    """Figures of each step, and every gradient and the final weights and buffers by name, whole; the experts chosen."""

    losses: list[float] = field(default_factory=list)
    validation: float | None = None
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)  # of one process: the weights before the first step
    unlike: list[str] = field(default_factory=list)  # what ranks that hold the same tensor do not have alike
    choices: Choices | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which makes a file of its own of each tensor: arrays."""
        return changed(self.__dict__, Tensor, Tensor.numpy)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(changed(state, np.ndarray, torch.from_numpy))


def changed(value: Any, kind: type, to: Callable[[Any], Any]) -> Any:
    """A value in which all that is of a kind, in its lists and dictionaries, is made `to` something else."""
    if isinstance(value, dict):
        return {key: changed(each, kind, to) for key, each in value.items()}
    if isinstance(value, list):
        return [changed(each, kind, to) for each in value]
    return to(value) if isinstance(value, kind) else value


class Recording(Trainer):
    """The loop, with every gradient written down before it is clipped."""

    outcome: Outcome
    twin: Transformer  # the whole model's names and shapes

    def clip(self) -> Tensor:
        own: dict[str, Any] = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        if isinstance(self.parallel, DeepSpeedParallel):
            own = deepspeed_gradients(self.model)
        shapes = {name: like.shape for name, like in self.twin.named_parameters() if like.requires_grad}
        whole, unlike = collect({name: gradient for name, gradient in own.items() if gradient is not None}, shapes)
        self.outcome.gradients.append(whole)
        self.outcome.unlike += [f"gradient {len(self.outcome.gradients)}, {name}" for name in unlike]
        return super().clip()

    def count_step(self, loss: float, norm: float, rate: float, seconds: float) -> None:
        self.outcome.losses.append(loss)
        self.outcome.norms.append(norm)
        super().count_step(loss, norm, rate, seconds)


def deepspeed_gradients(model: Transformer) -> dict[str, Any]:
    """Whole gradients by name, which DeepSpeed keeps to itself."""
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(each) for name, each in model.named_parameters() if each.requires_grad}


class Rows:
    """A loader: each step's batch is made from its number; a rank takes its share of the rows."""

    left_out = 0

    def __init__(self, world: World, pairs: bool = False) -> None:
        self.world, self.pairs, self.step = world, pairs, 0

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> Batch | PreferenceBatch:
        self.step += 1
        count = ROWS // self.world.data_size
        rows = slice(self.world.data_rank * count, (self.world.data_rank + 1) * count)
        if not self.pairs:
            return rows_of(make_batch(self.step), rows)
        whole = make_pairs(self.step)
        return PreferenceBatch(rows_of(whole.chosen, rows), rows_of(whole.rejected, rows), whole.is_pair[rows])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


@cache
def make_batch(step: int) -> Batch:
    """Rows of one to four documents; later rows have more padding and fewer targets."""
    random = np.random.default_rng(step)
    shape = (ROWS, LENGTH)
    tokens = random.integers(0, 96, shape)
    targets = np.where(random.random(shape) < np.linspace(1.0, 0.2, ROWS)[:, None], np.roll(tokens, -1, 1), IGNORE)
    positions, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row in range(ROWS):
        cuts = np.sort(random.choice(np.arange(1, LENGTH), row % 4, replace=False))
        for number, piece in enumerate(np.split(np.arange(LENGTH), cuts)):
            documents[row, piece], positions[row, piece] = number, np.arange(len(piece))
            targets[row, piece[-1]] = IGNORE
        if row % 5 == 4:
            documents[row, -6:], targets[row, -6:] = PADDING, IGNORE
    return Batch(tokens, targets, positions, documents)


def make_pairs(step: int) -> PreferenceBatch:
    """Answers of unequal lengths after shared prompts; the last row but one holds no pair."""
    random = np.random.default_rng(100 + step)
    sides = []
    prompts, starts = random.integers(0, 96, (ROWS, LENGTH)), random.integers(2, 12, ROWS)
    is_pair = np.arange(ROWS) != ROWS - 2
    for _ in ("chosen", "rejected"):
        tokens, positions = random.integers(0, 96, (ROWS, LENGTH)), np.tile(np.arange(LENGTH), (ROWS, 1))
        targets, documents = np.roll(tokens, -1, 1), np.zeros((ROWS, LENGTH), np.int64)
        for row, start in enumerate(starts):
            end = int(random.integers(start + 2, LENGTH)) if is_pair[row] else 0
            tokens[row, :start] = prompts[row, :start]
            targets[row, : start - 1], targets[row, end:], documents[row, end:] = IGNORE, IGNORE, PADDING
        sides.append(Batch(tokens, targets, positions, documents))
    return PreferenceBatch(*sides, is_pair=is_pair)


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.tokens[rows], batch.targets[rows], batch.positions[rows], batch.document_ids[rows])


def make_trainer(case: Case, world: World, folder: Path, choices: Choices | None = None) -> Recording:
    """The loop of a case on this rank. `choices`: what the routers of one process chose, for a case that replays it."""
    kind = PreferenceConfig if case.pairs else TrainConfig
    config = kind(
        steps=STEPS, batch_size=ROWS, microbatch_size=case.microbatch, sequence_length=LENGTH, warmup=1,
        optimizer=case.optimizer, learning_rate=RATES[case.precision], eps=1e-4, grad_clip=0.5, log_every=100,
        router_bias_rate=0.05, evaluate_batches=2, weight_decay=0.1,
        activation_checkpointing=case.checkpointing, isolate_documents=case.isolate, layout=world.mesh.layout,
    )  # fmt: skip
    is_rounded = case.lora not in ("", "full")
    model = make_model(case, "cpu").to(device()) if is_rounded else make_model(case, "meta")
    in_ram = world.mesh.layout.cpu_offload or starts_in_ram(world.mesh.layout)
    filled = partial(fill, model, first_weights(case).__getitem__, device(), in_ram)
    reference, filled_reference = make_reference(case) if case.pairs and not case.lora else (None, filled)
    world.mesh.layout.check_model(model.config)
    world.mesh.layout.check_batch(ROWS, case.microbatch)
    compute = Exact(device(), case.precision, False)
    parallel: Parallel
    objective: Objective
    if world.mesh.layout.engine != "soma":
        parallel, objective = bridge(model, config, world.mesh, compute, filled)
    elif world.mesh.layout.pp > 1:
        parallel, objective = stage_model(model, config, world.mesh, compute, filled, reference, filled_reference)
    else:
        parallel = parallelize(
            model, world.mesh, activation_checkpointing=case.checkpointing, compile_layers=case.compile,
            whole_batch=case.microbatch is None, fill=filled,
        )  # fmt: skip
        if reference is not None:
            parallelize(reference.requires_grad_(False), world.mesh, fill=filled_reference)
        objective = make_objective(config, parallel, reference, compute)
    tokenizer: Any = None
    trainer = Recording(
        config, folder, parallel=parallel, objective=objective, loader=Rows(world, case.pairs),
        validation=Rows(world, case.pairs), steps=STEPS,
        compute=compute, tokenizer=tokenizer, identity="parity", world=world,
        journal=Journal(folder / "metrics.jsonl", NullTracker(), False),
    )  # fmt: skip
    trainer.outcome, trainer.twin = Outcome(), twin(case)
    if case.replays:
        replay = make_replay(trainer, choices)
        replay.attach(trainer.model)
        trainer.outcome.choices = replay.choices
    model.train()
    return trainer


def make_replay(trainer: Recording, choices: Choices | None) -> Replay:
    """For the routers of a model that trains, or of one process that is to be followed. Held-out batches, which are
    those of the first steps again, count backwards from -1."""
    world, held_out = trainer.world, trainer.validation
    layout = world.mesh.layout
    assert world.size == 1 or choices is not None
    columns = columns_of(LENGTH, layout.cp, world.mesh.place["cp"]) if layout.cp > 1 else np.arange(LENGTH)
    return Replay(
        lambda step: make_batch(abs(step)).tokens,
        columns,
        lambda: trainer.loader.step if trainer.model.training else -held_out.step,
        choices,
    )


def make_model(case: Case, place: str) -> Transformer:
    """The model; updates begin somewhere, so that both of their matrices have gradients from the first step on."""
    return build(json.dumps(MODELS[case.model]), case.lora, case.dropout, place)


def twin(case: Case) -> Transformer:
    """Names and shapes of the model."""
    return kept(json.dumps(MODELS[case.model]), case.lora, case.dropout, "meta")


def first_weights(case: Case, other: bool = False) -> dict[str, Tensor]:
    """What the model begins with, or `other` weights. They must not be written to."""
    return kept(json.dumps(MODELS[case.model]), case.lora, case.dropout, "cpu", 7 if other else 0).state_dict()


@cache
def kept(shape: str, lora: str, dropout: float, place: str, seed: int = 0) -> Transformer:
    """A model that many cases look at."""
    model = build(shape, lora, dropout, place)
    if seed:
        model.init_weights(seed)
    return model


def build(shape: str, lora: str, dropout: float, place: str) -> Transformer:
    """`make_model`, of a shape in JSON."""
    model = Transformer(ModelConfig(**json.loads(shape)), device=place, dtype=torch.float32)
    if lora:
        if lora != "full" and place != "meta":
            quantize(model, {"int8": 8, "int4": 4}[lora], head=False)
        more = {"lora_dropout": dropout, "target_modules": ".*"} if dropout else {}
        add_lora(model, LORA.model_copy(update=more), seed=1)
        generator = torch.Generator().manual_seed(2)
        for layer in lora_layers(model).values():
            layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model


def make_reference(case: Case) -> tuple[Transformer, Callable[[], None]]:
    """Other weights than those that are trained, so that a pair's margin is not 0; and what fills them in."""
    model = make_model(case, "meta")
    return model, partial(fill, model, first_weights(case, other=True).__getitem__, device())


def train(case: Case, world: World, choices: Choices | None = None, steps: int = STEPS) -> Outcome:
    """Three steps, or fewer, and the held-out loss after them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, world, Path(folder), choices)
        for _ in range(steps):
            trainer.train_step()
            trainer.at.done += 1
        trainer.outcome.validation = trainer.validation_loss()
        finish(trainer, case)
        return trainer.outcome


def finish(trainer: Recording, case: Case) -> None:
    """Write down the weights, and what the ranks do not have alike."""
    outcome, world = trainer.outcome, trainer.world
    if isinstance(trainer.parallel, DeepSpeedParallel):  # its pieces are its own
        outcome.weights = gathered(trainer.parallel, case)
        return
    shapes = weight_shapes(case)
    outcome.weights, unlike = collect(trainer.model.state_dict(), {name: like.shape for name, like in shapes.items()})
    outcome.unlike += [f"weights, {name}" for name in unlike]
    if world.size == 1:
        before = first_weights(case)
        outcome.start = {name: before[name] for name in outcome.weights}
        return
    figures: list[Any] = [None] * world.size
    dist.all_gather_object(figures, (outcome.losses, outcome.norms, outcome.validation))
    outcome.unlike += ["figures"] * (figures != figures[:1] * world.size)
    if device().type != "cpu":  # a GPU's atomic sums differ by a bit from rank to rank
        outcome.unlike = []


def weight_shapes(case: Case) -> dict[str, Tensor]:
    """Names and shapes of all weights and buffers; without those that are rounded."""
    shapes = twin(case).state_dict()
    return shapes if case.lora in ("", "full") else {name: like for name, like in shapes.items() if "lora_" in name}


def gathered(parallel: Parallel, case: Case) -> dict[str, Tensor]:
    """All weights and buffers, whole, as the product brings them together; without those that are rounded."""
    shapes = weight_shapes(case)
    fetch = Gather(parallel, shapes)
    return {name: fetch(name).clone() for name in shapes}


@cache
def alone(case: Case) -> Outcome:
    """One process. With `SOMA_PARITY_CACHE`, a folder of this run's own, test processes side by side share it."""
    folder = os.environ.get("SOMA_PARITY_CACHE")
    if folder is None:
        return train(case, World())
    path = Path(folder) / f"{hashlib.sha256(repr(case).encode()).hexdigest()[:16]}.pickle"
    if not path.exists():
        mine = path.with_suffix(f".{os.getpid()}")
        mine.write_bytes(pickle.dumps(train(case, World())))
        mine.replace(path)
    outcome = pickle.loads(path.read_bytes())
    assert isinstance(outcome, Outcome)
    return outcome


def alone_on_rank(rank: int, world_size: int, cases: list[Case]) -> list[Outcome]:
    """One process, which is a rank of the pool: for a GPU."""
    return [train(case, World()) for case in cases]


Job = tuple[Case, Choices | None]  # and what the routers of one process chose, where it replays them


def jobs(cases: Sequence[Case], one: Callable[[Case], Outcome] = alone) -> list[Job]:
    """What `on_rank` is given of cases; `one` is what one process does of a case."""
    return [(case, one(case).choices) for case in cases]


def on_rank(rank: int, world_size: int, layout: dict[str, Any], jobs: list[Job]) -> list[Outcome] | None:
    """On a rank of the pool: the outcomes of a layout; every rank takes part, rank 0 answers."""
    world = World.join(Layout(**layout), device().type)
    outcomes = []
    for case, choices in jobs:
        try:
            outcomes.append(train(case, world, choices))
        except BaseException as error:
            error.add_note(f"rank {rank} in {case} under {layout}")
            raise
    return outcomes if rank == 0 else None


def save_on_rank(rank: int, world_size: int, layout: dict[str, Any], case: Case, folder: str) -> None:
    """Two steps, then a checkpoint."""
    trainer = make_trainer(case, World.join(Layout(**layout), device().type), Path(folder))
    trainer.journal.start(0)
    for _ in range(STEPS - 1):
        trainer.train_step()
        trainer.at.done += 1
    trainer.save()
    trainer.checkpoints.wait()


def resume_on_rank(
    rank: int, world_size: int, layout: dict[str, Any], case: Case, folder: str, model: str
) -> Outcome | None:
    """The third step from a checkpoint, whatever layout wrote it; the weights go into a model folder."""
    trainer = make_trainer(case, World.join(Layout(**layout), device().type), Path(folder))
    trainer.resume()
    assert trainer.at.done == STEPS - 1
    trainer.train_step()
    outcome = trainer.outcome
    outcome.validation = trainer.validation_loss()
    outcome.weights = gathered(trainer.parallel, case)
    config, folder_ = trainer.model.config, Path(model)
    if case.lora:
        save_merged(trainer.parallel, LORA, None, config, torch.float32, folder_ / "adapter", folder_, None)
    else:
        save_whole(trainer.parallel, config, torch.float32, folder_, None)
    return outcome if rank == 0 else None
