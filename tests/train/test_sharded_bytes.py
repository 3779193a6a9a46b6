"""The bytes that a simulation gives a sharded pipeline, held to a real one's: what it sends and what it holds."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.pipeline import execute as executor
from soma.train.parallel.pipeline.costs import Costs, Memory
from soma.train.parallel.pipeline.schedule import Compute, Schedule, ShardAction, actions_of
from soma.train.parallel.pipeline.simulate import simulate
from soma.train.parallel.shard import PipelineShards, StageShards, parameter_groups
from tests.train.pool import Pool
from tests.train.sharded_pipeline import FLOAT, SHARDS, build, memory_of, stage_bytes

# All that torch can be asked for, by what it is counted as and which argument says how much.
COLLECTIVES = {
    "all_gather_into_tensor": "unshard", "all_gather_single": "unshard",
    "reduce_scatter_tensor": "reduce", "reduce_scatter_single": "reduce",
    "isend": "messages", "irecv": "received", "all_reduce": "all_reduce",
}  # fmt: skip
OTHERS = ("all_gather", "reduce_scatter", "broadcast", "all_to_all_single", "all_to_all", "reduce", "send", "recv",
          "gather", "scatter", "batch_isend_irecv")  # fmt: skip
Counted = dict[tuple[bool, str], int]  # whether it was the schedule's, and its kind: bytes


class Counter:
    """Notes every tensor that is given to `torch.distributed`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counted: Counted = {}
        self.in_plan = False
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                patch.setattr(dist, name, self.counting(getattr(dist, name), kind))
        for name in OTHERS:
            patch.setattr(dist, name, self.refusing(name))
        execute = executor.execute

        def within(*words: Any) -> None:
            self.in_plan = True
            execute(*words)
            self.in_plan = False

        patch.setattr(executor, "execute", within)

    def counting(self, call: Any, kind: str) -> Any:
        def counted(*words: Any, **named: Any) -> Any:
            tensors = [value for value in [*words, *named.values()] if isinstance(value, Tensor)]
            # Of a gather and of a reduction the piece: each rank passes on a piece for each other one.
            size = min(tensor.numel() * tensor.element_size() for tensor in tensors)
            size *= SHARDS - 1 if kind in ("unshard", "reduce") else 1
            self.counted[self.in_plan, kind] = self.counted.get((self.in_plan, kind), 0) + size
            return call(*words, **named)

        return counted

    def refusing(self, name: str) -> Any:
        def refused(*words: Any, **named: Any) -> Any:
            raise AssertionError(f"{name} is not counted")

        return refused


def counted(rank: int, world_size: int, schedule: str, zero: int, model: str) -> tuple[int, Schedule, Counted, int]:
    """Of a rank's second step (the first has made connections): its place in the pipeline, what it was to do, what it
    gave to torch, and the bytes of what it holds beside its stages."""
    pipeline, microbatches = build(schedule, zero, model)
    pipeline.step(microbatches, 0.01, 1.0)
    pipeline.model.zero_grad(set_to_none=True)
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        pipeline.step(microbatches, 0.01, 1.0)
    assert pipeline.shards is not None
    ends = [parameter for group in groups_of(pipeline.shards.ends) for parameter in group.fsdp_params]
    beside = sum(parameter.padded_sharded_param_size.numel() * SHARDS * FLOAT for parameter in ends)
    return pipeline.rank, pipeline.plan, counter.counted, beside


def groups_of(shards: StageShards) -> list[Any]:
    return [group for module in shards.modules for group in parameter_groups(module)]


@pytest.mark.parametrize(
    ("schedule", "zero", "model"),
    [("1f1b", 1, "dense5"), ("1f1b", 2, "odd"), ("zb-v", 3, "dense5"), ("dualpipe", 2, "dense5")],
)
def test_bytes_sent(pool: Pool, schedule: str, zero: int, model: str) -> None:
    memory = memory_of(schedule, zero, model)
    for rank, plan, found, beside in pool.run(counted, 4, schedule, zero, model):
        simulated = simulate(plan, memory=memory).sent[rank]
        simulated["reduce"] -= gone_before(plan, rank, stage_bytes(schedule, zero, model, vectors=True))
        assert {kind: found.get((True, kind), 0) for kind in simulated} == simulated
        readers = [simulate(plan, memory=memory).sent[other]["messages"] for other in range(2) if other != rank]
        assert found[True, "received"] == sum(readers)
        assert (True, "all_reduce") not in found
        # Embedding, final norm and head are no stage's: they are gathered before the schedule begins and reduced
        # behind it.
        outside = {kind: size for (planned, kind), size in found.items() if not planned and kind != "all_reduce"}
        piece = beside * (SHARDS - 1) / SHARDS
        assert outside == ({"unshard": piece, "reduce": piece} if beside else {})
        assert sum(simulated.values()) > 0


def gone_before(plan: Schedule, rank: int, vectors: tuple[int, ...]) -> float:
    """Bytes that the simulation reduces once too often: a B has the gradients of norms and biases, so a W whose B came
    before another W's reduction has none of them left."""
    bytes_, have = 0.0, set()
    for step in plan.steps[rank]:
        have |= {action.stage for action in actions_of(step) if action.kind in ("B", "BW")}
        if isinstance(step, ShardAction) and step.kind == "reduce":
            bytes_ += 0 if step.stage in have else vectors[step.stage] * (SHARDS - 1) / SHARDS
            have.discard(step.stage)
    return bytes_


def test_a_wrong_number_is_seen(pool: Pool) -> None:
    """Without the rows that fill up uneven matrices, and at another stage of ZeRO, the simulated bytes are others."""
    rank, plan, found, _ = pool.run(counted, 4, "1f1b", 2, "odd")[0]
    sizes = stage_bytes("1f1b", 2, "odd")
    even = stage_bytes("1f1b", 2, "dense5")
    assert sizes != even
    smaller = Memory(0.0, tuple(size - 64 for size in sizes), sizes, 0.0, SHARDS)
    assert simulate(plan, memory=smaller).sent[rank]["unshard"] != found[True, "unshard"]


# What is held: parameters and gradients, whole and in pieces, looked up in FSDP2 whenever a rank has computed a step.


def bytes_of(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def held_by(shards: PipelineShards) -> int:
    """Bytes of the parameters and gradients of a rank's stages."""
    held = 0
    for stage in shards.stages.values():
        for group in groups_of(stage):
            result = group._all_gather_result
            held += 0 if result is None else bytes_of(result.all_gather_output)  # on its way
            for parameter in group.fsdp_params:
                held += parameter.padded_sharded_param_size.numel() * FLOAT  # the piece
                if group.is_unsharded:
                    held += bytes_of(parameter._unsharded_param)
                    whole = [parameter._unsharded_param.grad, parameter.unsharded_accumulated_grad]
                    held += sum(bytes_of(grad) for grad in whole if grad is not None)
                if parameter.sharded_param.grad is not None:
                    held += bytes_of(parameter.sharded_param.grad)
    return held


def held_after_steps(rank: int, world_size: int, schedule: str, zero: int) -> tuple[int, Schedule, list[int]]:
    pipeline, microbatches = build(schedule, zero)
    pipeline.step(microbatches, 0.01, 1.0)
    pipeline.model.zero_grad(set_to_none=True)
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        compute = executor.compute

        def looking(workers: Any, step: Compute, values: Any) -> Any:
            results = compute(workers, step, values)
            assert pipeline.shards is not None
            found.append(held_by(pipeline.shards))
            return results

        patch.setattr(executor, "compute", looking)
        pipeline.step(microbatches, 0.01, 1.0)
    return pipeline.rank, pipeline.plan, found


@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 1), ("1f1b", 2), ("zb-v", 3)])
def test_bytes_held(pool: Pool, schedule: str, zero: int) -> None:
    """After every single step: with whole backwards exactly, with split ones but for the gradients of norms and biases,
    which a B has and the simulation counts from the first W on (and of a later W, whose B they have left with)."""
    memory = memory_of(schedule, zero)
    memory = Memory(0.0, memory.parameters, memory.gradients, 0.0, SHARDS)
    for rank, plan, found in pool.run(held_after_steps, 4, schedule, zero):
        timeline = simulate(plan, Costs(1, 1, 1), memory)
        vectors = stage_bytes(schedule, zero, vectors=True)
        more = sum(vectors[stage] for stage in plan.stages_of(rank)) if schedule == "zb-v" else 0
        for real, span in zip(found, timeline.spans[rank], strict=True):
            middle = (span.start + span.end) / 2
            expected = [held for time, held in timeline.held[rank] if time < middle][-1]
            assert abs(real - expected) <= more
