"""A pipeline whose stages are sharded, as the trainer builds it: for tests of what it moves and holds."""

from functools import cache

import torch

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.costs import Memory
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.plan import layers_for, make_plan
from soma.train.parallel.pipeline.training import stage_model
from soma.train.world import World
from tests.train.parity import LENGTH, MODELS, ROWS

SHARDS, MICROBATCH, FLOAT = 2, 2, 4  # ranks of a stage; rows; bytes


def layout_of(schedule: str, zero: int) -> Layout:
    return Layout(pp=2, fsdp=SHARDS if zero else 1, dp=1, zero=zero or 3, schedule=schedule)


def settings() -> TrainConfig:
    return TrainConfig(steps=1, batch_size=ROWS, microbatch_size=MICROBATCH, sequence_length=LENGTH)


def build(schedule: str, zero: int, model: str = "dense5") -> tuple[PipelineStep, list[Microbatch]]:
    """On a rank: the pipeline, and a step's microbatches. `zero` 0: nothing is sharded."""
    world = World.join(layout_of(schedule, zero), "cpu")
    whole = Transformer(ModelConfig(**MODELS[model]))
    whole.init_weights(3)
    staged, _ = stage_model(whole.train(), settings(), world.mesh, Compute(torch.device("cpu"), "fp32", False))
    pipeline = staged.pipeline
    generator = torch.Generator().manual_seed(5)
    shape = (pipeline.schedule.microbatches, MICROBATCH, LENGTH)
    tokens = torch.randint(0, 90, shape, generator=generator)
    return pipeline, [Microbatch(own, own.flip(1)) for own in tokens]


@cache
def stage_bytes(schedule: str, zero: int, model: str = "dense5", vectors: bool = False) -> tuple[int, ...]:
    """Bytes of every stage's parameters (or of its norms and biases alone), with the rows that FSDP2 adds so that ranks
    have equal pieces."""
    config, layout = ModelConfig(**MODELS[model]), layout_of(schedule, zero).resolve(2 * (SHARDS if zero else 1))
    plan = make_plan(layout, ROWS, MICROBATCH)
    layers = layers_for(layout, plan, config, LENGTH)
    whole = Transformer(config, device="meta")
    return tuple(
        sum(padded(tuple(p.shape)) for layer in stage for p in whole.layers[layer].parameters()
            if p.ndim == 1 or not vectors)
        for stage in layers
    )  # fmt: skip


def padded(shape: tuple[int, ...]) -> int:
    """Bytes of a parameter whose rows are filled up to a multiple of the shards."""
    rows, *others = shape
    rows = -(-rows // SHARDS) * SHARDS
    return rows * int(torch.Size(others).numel()) * FLOAT


def memory_of(schedule: str, zero: int, model: str = "dense5") -> Memory:
    """What the simulation is told: float32 parameters and gradients, and messages of a microbatch."""
    sizes, width = stage_bytes(schedule, zero, model), MODELS[model]["hidden_size"]
    return Memory(0.0, sizes, sizes, MICROBATCH * LENGTH * width * FLOAT, SHARDS)
