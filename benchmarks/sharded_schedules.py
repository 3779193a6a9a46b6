"""Pipelines whose stages are sharded, measured against their simulation: gathers and reductions with injected delays.

Four stages, each sharded over two processes, through `PipelineStep` with FSDP2, its shard actions and real collectives
over Gloo. As in `benchmarks/schedules.py` two cores cannot compute for eight ranks: a pass of a small Transformer is
filled up with a wait to its nominal time, a message is held for a fixed delay, and so are a gather and a reduction, one
at a time on each rank. When each of them begins and who waits for it is the product's. Schedules and stages of ZeRO
take turns.

    python benchmarks/sharded_schedules.py --json --docs

Ratio: the smaller of measured and simulated over the larger. "unshard" and "reduce": what they take on all ranks
together. A rank stands still for a reduction (`Costs.reduce_stops`).
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, Case, finish, parser
from schedules import BAR, MICROSECONDS, DelayedLinks, Run
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.parallel.config import Layout
from soma.train.parallel.mesh import Mesh, make_mesh
from soma.train.parallel.pipeline.costs import Costs, at
from soma.train.parallel.pipeline.draw import chrome_trace, svg
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.lower import one_by_one
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.search import per_stage
from soma.train.parallel.pipeline.simulate import Timeline, simulate

STAGES, SHARDS, MICROBATCHES, WIDTH, LENGTH = 4, 2, 8, 32, 8
UNIT = 0.2  # seconds of a rank's forward: passes and collectives are true ones beside the waits
NAMES = ["1f1b", "zb-h1", "zb-v", "dualpipe-v"]
PICTURE = ("zb-v", 3)  # in the docs
SHAPE = ModelConfig(
    vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=8, num_attention_heads=2
)  # fmt: skip


# torch 2.13 has other names for them, and warns of these.
gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Lane:
    """A rank's gathers and reductions: one at a time."""

    def __init__(self) -> None:
        self.free = 0.0

    def take(self, seconds: float) -> float:
        """When one that begins now will be through."""
        self.free = max(self.free, time.monotonic()) + seconds
        return self.free


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


class Held(dist.Work):
    """A collective that is not through before its time."""

    def __init__(self, work: dist.Work, until: float) -> None:
        super().__init__()
        self.work, self.until = work, until

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.work.wait()
        wait_until(self.until)
        return True


class Delayed:
    """FSDP2's own collectives, through after `seconds` on the rank's lane."""

    def __init__(self, lane: Lane, seconds: float) -> None:
        self.lane, self.seconds = lane, seconds

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class DelayedGather(Delayed):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:  # fmt: skip
        until = self.lane.take(self.seconds)
        work = gather(output_tensor, input_tensor, group=group, async_op=True)
        return Held(work, until)


class DelayedReduce(Delayed):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:  # fmt: skip
        until = self.lane.take(self.seconds)
        reduce_scatter(output_tensor, input_tensor, op=op, group=group)
        wait_until(until)


class ShardedPipeline:
    """One schedule at one stage of ZeRO, with passes, messages and collectives that take the times of `costs`."""

    def __init__(self, name: str, mesh: Mesh, unit: float) -> None:
        group = mesh.group("pp")
        assert group is not None
        self.group = group
        schedule = one_by_one(SCHEDULES[name](STAGES, MICROBATCHES))
        # A rank's stages together take four tenths of its forward to be gathered, three to be reduced.
        times = Costs(unit, unit, 0.8 * unit, 0.1 * unit, unshard=0.4 * unit, reduce=0.3 * unit, reduce_stops=True)
        self.costs = per_stage(times, schedule)
        model = Transformer(SHAPE)
        model.init_weights(1)
        self.pipeline = PipelineStep(model, schedule, group)
        self.pipeline.shard(mesh)
        transport = DelayedLinks(self.pipeline.plan, group, self.pipeline.buffer, self.pipeline.channels)
        assert isinstance(self.costs.transfer, float)
        transport.delay = self.costs.transfer
        self.pipeline.transport = transport
        tokens = torch.arange(LENGTH).expand(1, LENGTH).contiguous()
        self.microbatches = [Microbatch(tokens, tokens)] * MICROBATCHES
        self.fill_up()

    def fill_up(self) -> None:
        """Give every pass, gather and reduction its nominal time."""
        lane, shards = Lane(), self.pipeline.shards
        assert shards is not None
        for stage, worker in self.pipeline.workers.items():
            times = {"forward": self.costs.forward, "backward": self.costs.backward, "weight": self.costs.weight}
            for action, seconds in times.items():
                setattr(worker, action, filled_up(getattr(worker, action), at(seconds, stage)))
            modules: list[FSDPModule] = shards.stages[stage].modules
            for module in modules:
                module.set_custom_all_gather(DelayedGather(lane, at(self.costs.unshard, stage) / len(modules)))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(DelayedReduce(lane, at(self.costs.reduce, stage) / len(modules)))  # type: ignore[arg-type]

    def run(self) -> Run:
        self.pipeline.model.zero_grad(set_to_none=True)
        dist.barrier()
        self.pipeline.step(self.microbatches, 1e-2, 1.0)
        return Run(self.pipeline.timeline(), simulate(self.pipeline.plan, self.costs))


def filled_up(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """A pass that takes `seconds`, if it does not take longer."""

    def filled(*words: Any) -> Any:
        until = time.monotonic() + seconds
        result = call(*words)
        wait_until(until)
        return result

    return filled


def rank_main(rank: int, store: str, chosen: argparse.Namespace, connection: Connection | None) -> None:
    """What a process does: every schedule at every stage of ZeRO in turn; rank 0 sends what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=STAGES * SHARDS)
    meshes = {zero: make_mesh(Layout(pp=STAGES, fsdp=SHARDS, zero=zero).resolve(STAGES * SHARDS), "cpu")
              for zero in chosen.zero}  # fmt: skip
    pipelines: dict[tuple[str, int], ShardedPipeline] = {}
    for round_ in range(-1, chosen.rounds):
        for name, zero in product(chosen.schedules, chosen.zero):
            if round_ < 0:
                pipelines[name, zero] = ShardedPipeline(name, meshes[zero], UNIT)
            done = pipelines[name, zero].run()  # the first makes connections
            if connection is not None and round_ >= 0:
                connection.send((name, zero, done))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def taken(timeline: Timeline, kind: str) -> float:
    """Seconds that gathers or reductions take on all ranks together."""
    return sum(
        entry.end - entry.start
        for row in timeline.traffic for entry in row if entry.lane == "shards" and entry.name.startswith(kind)
    )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """What is read off a time line."""

    name: str
    unit: str
    of: Callable[[Timeline], float]


FIGURES = [
    Figure("step", "ms", lambda timeline: 1000 * timeline.length),
    Figure("idle share", "%", lambda timeline: 100 * timeline.idle_share),
    Figure("unshard", "ms", lambda timeline: 1000 * taken(timeline, "unshard")),
    Figure("reduce", "ms", lambda timeline: 1000 * taken(timeline, "reduce")),
]


def cases_of(name: str, zero: int, runs: list[Run]) -> list[Case]:
    """Measured beside simulated."""
    cases = []
    for figure in FIGURES:
        pairs = [(figure.of(run.measured), figure.of(run.plan)) for run in runs]
        ratios = [min(pair) / max(pair) for pair in pairs]
        measured, expected = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = min(measured, expected) / max(measured, expected)
        cases.append(
            Case(f"{name}, ZeRO-{zero}, {figure.name}", figure.unit, measured, "simulated", expected, ratio,
                 (min(ratios), max(ratios)), BAR, ratio >= BAR)
        )  # fmt: skip
    return cases


def run(chosen: argparse.Namespace) -> dict[tuple[str, int], list[Run]]:
    """All processes, and what rank 0 measured."""
    context = mp.get_context("spawn")
    found: dict[tuple[str, int], list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        processes = [
            context.Process(
                target=rank_main, args=(rank, f"{folder}/store", chosen, None if rank else theirs), daemon=True
            )
            for rank in range(STAGES * SHARDS)
        ]  # fmt: skip
        for process in processes:
            process.start()
        theirs.close()
        while True:
            try:
                name, zero, done = ours.recv()
            except EOFError:
                break
            found.setdefault((name, zero), []).append(done)
            figures = (
                f"{line.length * 1000:,.1f} ms, idle {line.idle_share:.1%}" for line in (done.measured, done.plan)
            )
            print(f"  {name}, ZeRO-{zero}: {next(figures)}; simulated {next(figures)}", flush=True)
        for process in processes:
            process.join()
    return found


def table(cases: list[Case]) -> str:
    """The page's table."""
    figures = {case.case: case for case in cases}
    lines = ["| schedule | ZeRO | step, ms | simulated | idle share, % | simulated | gathers, ms | simulated "
             "| reductions, ms | simulated |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for case in cases:
        name, zero, figure = case.case.split(", ")
        if figure == "step":
            row = [figures[f"{name}, {zero}, {figure.name}"] for figure in FIGURES]
            digits = ["{:.0f}", "{:.1f}", "{:.0f}", "{:.0f}"]
            shown = [
                form.format(value) for form, one in zip(digits, row, strict=True) for value in (one.ours, one.theirs)
            ]
            lines.append(f"| {name} | {zero.removeprefix('ZeRO-')} | {' | '.join(shown)} |")
    return "\n".join(lines)


def write_docs(cases: list[Case], picture: str) -> None:
    """Put the table and a drawing into docs/schedules.md."""
    path = ROOT / "docs" / "schedules.md"
    start, end = "<!-- measured-sharded -->\n", "<!-- /measured-sharded -->"
    head, rest = path.read_text().split(start)
    path.write_text(head + start + table(cases) + "\n" + end + rest.split(end)[1])
    (ROOT / "docs" / "schedules" / "measured-sharded.svg").write_text(picture)
    print("written: docs/schedules.md, docs/schedules/measured-sharded.svg")


def main() -> None:
    arguments = parser("sharded_schedules", __doc__ or "", rounds=3)
    arguments.add_argument("--schedules", nargs="+", default=NAMES, choices=list(SCHEDULES), help=f"default: {NAMES}")
    arguments.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3], help="stages of ZeRO (default 1 2 3)")
    arguments.add_argument("--docs", action="store_true", help="write the table and a drawing into docs/schedules.md")
    arguments.add_argument("--draw", type=Path, help="folder for a picture and a trace of every one")
    chosen = arguments.parse_args()
    chosen.threads = 1
    found = run(chosen)
    cases = [case for (name, zero), runs in found.items() for case in cases_of(name, zero, runs)]
    if chosen.draw:
        chosen.draw.mkdir(parents=True, exist_ok=True)
        for (name, zero), runs in found.items():
            last = runs[-1]
            (chosen.draw / f"{name}-zero-{zero}.svg").write_text(svg(last.measured, last.plan))
            trace = chrome_trace(last.measured, MICROSECONDS, last.plan)
            (chosen.draw / f"{name}-zero-{zero}.json").write_text(json.dumps(trace))
    if chosen.docs:
        last = found[PICTURE][-1]
        write_docs(cases, svg(last.measured, last.plan))
    finish("sharded_schedules", chosen, cases)


if __name__ == "__main__":
    main()
