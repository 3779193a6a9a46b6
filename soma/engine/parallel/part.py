"""What every rank does, rank 0 too: load its shard, join the others, measure, and run its share of steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soma.base.errors import UserError
from soma.engine.batch import Batch
from soma.engine.load import choose_device, load_model_for
from soma.engine.memory import room
from soma.engine.paged import PagedCache
from soma.engine.parallel.links import Links, join
from soma.engine.parallel.parts import pack, unpack
from soma.engine.parallel.stage import StageModel
from soma.model.hub import load_config
from soma.model.quantized import quantize
from soma.model.shard import Shard


@dataclass(frozen=True)
class Plan:
    """How a model is spread over ranks. `device` is that of rank 0; on GPUs the others have the next ones."""

    directory: str
    tensors: int
    stages: int
    precision: str = "auto"
    device: str = "auto"
    bits: int | None = None  # 8 or 4: round the weights at load

    @property
    def world_size(self) -> int:
        return self.tensors * self.stages

    def device_of(self, rank: int) -> torch.device:
        """Raises UserError if there are not enough GPUs."""
        device = choose_device(self.device)
        if device.type != "cuda":
            return device
        first, count = device.index or 0, torch.cuda.device_count()
        if first + self.world_size > count:
            raise UserError(
                f"tensor_parallel {self.tensors} x pipeline_parallel {self.stages} = {self.world_size} GPUs are "
                f"needed from cuda:{first} on; torch sees {count}"
            )
        return torch.device("cuda", first + rank)


class Part:
    """One rank's shard, and the cache and steps over it."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.shard, self.device = plan, Shard.of_rank(rank, plan.tensors, plan.stages), plan.device_of(rank)
        self.config = load_config(plan.directory)
        self.model = load_model_for(
            Path(plan.directory), precision=plan.precision, device=str(self.device), shard=self.shard
        )
        if plan.bits is not None:
            quantize(self.model, plan.bits, head=self.shard.is_last)
        self.links: Links | None = None
        self.stage: StageModel | None = None

    def join(self, port: int) -> None:
        """Enter the process group: every rank at the same time."""
        join(self.shard, port, self.device)
        self.links = Links(self.shard)
        self.links.sum(torch.zeros(1, device=self.device))  # NCCL connects at the first use

    def start(self, blocks: int, block_size: int) -> None:
        """Make the cache."""
        assert self.links is not None
        cache = PagedCache(self.model.config, blocks, block_size, self.model.dtype, self.device)
        if self.stage is None:
            self.stage = StageModel(self.model, cache, self.links, self.config)
        self.stage.cache = cache

    def measure(self, message: np.ndarray, utilization: float) -> tuple[float, float]:
        """Bytes that the cache may have beside the largest step, and those of a token in it. Needs `start`."""
        assert self.stage is not None
        cache = self.stage.cache
        (batch,) = unpack(message, 1, self.device)
        free = room(Measured(self, cache), batch, utilization)
        token = PagedCache.block_bytes(self.model.config, cache.block_size, self.model.dtype) / cache.block_size
        self.stage.cache = PagedCache(self.model.config, 1, cache.block_size, self.model.dtype, self.device)
        return free, token

    def step(self, message: np.ndarray) -> Tensor | None:
        """A step: on rank 0 the logits of the rows that it asks for."""
        assert self.stage is not None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        with torch.inference_mode():
            return self.stage.step(unpack(message, self.plan.stages, self.device))


class Measured:
    """A part as `soma.engine.memory` measures it: every rank runs the same steps, only rank 0 has logits."""

    def __init__(self, part: Part, cache: PagedCache) -> None:
        self.part, self.cache = part, cache

    def step(self, batch: Batch) -> Tensor:
        logits_RV = self.part.step(pack(batch))
        return torch.zeros(1, 1) if logits_RV is None else logits_RV
