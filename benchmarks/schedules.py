"""Pipeline schedules, measured against their simulation: the real executor, real processes, real transfers.

Two cores cannot compute for eight ranks at once, so on CPUs an action is a product of small matrices that is filled up
with a wait to its nominal time, and a link holds every message back by a fixed delay. Nothing else is made up: order,
transfers and waiting for each other are the executor's. Schedules take turns, round by round. A pair that DualPipe
overlaps runs one after the other, in the executor and in the simulation.

    python benchmarks/schedules.py --json --docs
    python benchmarks/schedules.py --device cuda --sizes 4     # true compute of a Llama, a GPU for each rank

Ratio: the smaller of measured and simulated over the larger. With --device cuda the simulation takes the mean time of
each kind of action on each stage from the run itself, and that of a message between two GPUs from a ping-pong before.
"""

import argparse
import gc
import json
import multiprocessing as mp
import os
import queue
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, Case, finish, parser
from peers.pipelining import fill_at_random
from torch import Tensor

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.parallel.pipeline.clock import Clock
from soma.train.parallel.pipeline.costs import Costs
from soma.train.parallel.pipeline.draw import chrome_trace, svg
from soma.train.parallel.pipeline.execute import PipelineStep, execute
from soma.train.parallel.pipeline.links import RecordedTransport, gather_timeline
from soma.train.parallel.pipeline.lower import lower, one_by_one
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedule import Action, Schedule
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.search import per_stage, search, v_half_limit
from soma.train.parallel.pipeline.simulate import Timeline, simulate
from soma.train.parallel.pipeline.transport import Transport, open_channels

MICROBATCHES = {2: 8, 4: 12, 8: 16}
MICROSECONDS = 1e6  # in a second: the unit of a trace
UNIT = 0.05  # seconds of a rank's forward; its two backwards 1 and 0.8 of that, a link's delay a tenth
BAR = 0.9
WIDTH = 32
NAMES = [*SCHEDULES, "v-half"]
PICTURE = "zb-h1"  # in the docs


@cache
def plan(name: str, ranks: int) -> Schedule:
    """A schedule with its overlapped pairs taken apart."""
    microbatches = MICROBATCHES[ranks]
    if name == "v-half":
        made = replace(search(ranks, microbatches, v_half_limit(ranks)), name=name)
    else:
        made = SCHEDULES[name](ranks, microbatches)
    return one_by_one(made)


def nominal(schedule: Schedule, unit: float) -> Costs:
    return per_stage(Costs(unit, unit, 0.8 * unit, transfer=0.1 * unit), schedule)


class Waiting:
    """A stage of one small matrix whose actions take the times of `costs`."""

    def __init__(self, costs: Costs) -> None:
        self.times = {kind: costs.of(Action(kind, 0, 0)) for kind in ("F", "B", "W")}  # type: ignore[arg-type]
        self.weight_DD = torch.eye(WIDTH) * 1.25
        self.inputs: dict[int, Tensor] = {}
        self.result: dict[int, float] = {}

    def fill(self, start: float, kind: str) -> None:
        """Wait until the action has taken its time."""
        left = start + self.times[kind] - time.monotonic()
        if left > 0:
            time.sleep(left)

    def forward(self, index: int, x: Tensor | None) -> Tensor:
        start = time.monotonic()
        self.inputs[index] = torch.full((WIDTH, WIDTH), float(index + 1)) if x is None else x
        out = self.inputs[index] @ self.weight_DD
        self.result[index] = float(out[0, 0])
        self.fill(start, "F")
        return out

    def backward(self, index: int, grad: Tensor | None) -> Tensor:
        start = time.monotonic()
        out = (torch.ones(WIDTH, WIDTH) if grad is None else grad) @ self.weight_DD.T
        self.fill(start, "B")
        return out

    def weight(self, index: int) -> None:
        start = time.monotonic()
        _ = self.inputs.pop(index).T @ self.weight_DD
        self.fill(start, "W")


class DelayedTransport(Transport):
    """Links that hold every message back by `delay` seconds: a thread sends when its time has come."""

    delay = 0.0

    def begin(self) -> None:
        self.outgoing: queue.Queue[tuple[float, Action, int, Tensor] | None] = queue.Queue()
        self.link = threading.Thread(target=self.carry)
        self.link.start()
        super().begin()

    def carry(self) -> None:
        while (message := self.outgoing.get()) is not None:
            when, action, reader, value = message
            time.sleep(max(0.0, when - time.monotonic()))
            super().send(action, reader, value)

    def send(self, message: Action, reader: int, value: Tensor) -> None:
        self.outgoing.put((time.monotonic() + self.delay, message, reader, value))

    def finish(self) -> None:
        self.outgoing.put(None)
        self.link.join()
        super().finish()


class DelayedLinks(RecordedTransport, DelayedTransport):
    """The same, noted."""


class WaitingPipeline:
    """One schedule with stages that wait."""

    def __init__(self, schedule: Schedule, group: dist.ProcessGroup) -> None:
        self.schedule, self.group, self.rank = schedule, group, dist.get_rank(group)
        self.plan = lower(schedule)
        channels = open_channels(self.plan, group, torch.device("cpu"))
        self.transport = DelayedLinks(self.plan, group, lambda index: torch.empty(WIDTH, WIDTH), channels)

    def run(self, unit: float) -> Timeline:
        costs = nominal(self.schedule, unit)
        self.transport.delay = costs.transfer
        workers = {stage: Waiting(costs) for stage in self.schedule.stages_of(self.rank)}
        clock = Clock(torch.device("cpu"))
        dist.barrier(self.group)
        execute(self.plan, self.rank, workers, self.transport, clock)
        last = self.schedule.stages - 1
        if last in workers:  # what arrived is what was sent, through all stages
            for index, value in workers[last].result.items():
                assert abs(value / ((index + 1) * 1.25**self.schedule.stages) - 1) < 1e-5
        return gather_timeline(self.schedule, clock, self.group, self.transport.links)


class ComputingPipeline:
    """One schedule with the stages of a Llama on GPUs."""

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup, device: torch.device | None = None, width: int = 2048
    ) -> None:
        config = ModelConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=16,
            num_attention_heads=width // 128,
        )  # fmt: skip
        self.schedule, self.group = schedule, group
        device = device or torch.device("cuda", torch.cuda.current_device())
        model = Transformer(config, device="meta", dtype=torch.bfloat16)
        self.pipeline = PipelineStep(model, schedule, group, device=device)
        self.pipeline.record()
        fill_at_random(model, device)
        tokens = torch.randint(0, 8192, (2, 2 * width), device=device)
        self.microbatches = [Microbatch(tokens, tokens)] * schedule.microbatches

    def run(self, unit: float) -> Timeline:
        self.pipeline.model.zero_grad(set_to_none=True)
        gc.collect()  # not in the step: `rank_main` has turned it off
        dist.barrier(self.group)
        self.pipeline.step(self.microbatches, 1e-4, 1.0)
        return self.pipeline.timeline()


def ping(group: dist.ProcessGroup, width: int = 2048, rounds: int = 20) -> float:
    """Seconds that a message of a microbatch takes from GPU to GPU: half of the way there and back, the median."""
    rank, value = dist.get_rank(group), torch.zeros(2, 2 * width, width, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(rounds if rank < 2 else 0):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for sender in (0, 1):
            move = dist.send if sender == rank else dist.recv
            move(value, 1 - rank, group=group)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 2)
    dist.barrier(group)
    return statistics.median(times) if times else 0.0


def rank_main(rank: int, store: str, chosen: argparse.Namespace, connection: Connection | None) -> None:
    """What a process does: every schedule in turn, on as many ranks as its size says."""
    sizes, device = chosen.sizes, chosen.device
    torch.set_num_threads(1)
    world = max(sizes)
    if device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as `soma.train.parallel.ranks`
        torch.cuda.set_device(rank)
        gc.disable()
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank < size:
            measure(size, group, chosen, connection)
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(size: int, group: dist.ProcessGroup, chosen: argparse.Namespace, connection: Connection | None) -> None:
    """Rounds of all schedules on `size` ranks; rank 0 sends (size, name, run) to the parent."""
    device = chosen.device
    make = ComputingPipeline if device == "cuda" else WaitingPipeline
    transfer = ping(group) if device == "cuda" else 0.0
    if connection is not None and transfer:
        print(f"  a message takes {transfer * 1e6:,.0f} µs", flush=True)
    pipelines: dict[str, Any] = {}
    for round_ in range(-1, chosen.rounds):
        for name in chosen.schedules:
            if name not in pipelines:
                pipelines[name] = make(plan(name, size), group)
                pipelines[name].run(UNIT / 50)  # connections, buffers, kernels
            if round_ >= 0:
                timeline = pipelines[name].run(UNIT)
                if connection is not None:
                    connection.send(
                        (size, name, Run(timeline, simulated(timeline, plan(name, size), device, transfer)))
                    )


@dataclass(frozen=True)
class Run:
    """A measured step and the simulation of it."""

    measured: Timeline
    plan: Timeline


def simulated(timeline: Timeline, schedule: Schedule, device: str, transfer: float) -> Timeline:
    """What a run should have been."""
    if device == "cpu":
        return simulate(schedule, nominal(schedule, UNIT))
    # Between GPUs a receive is posted when it is needed, so a message does not leave before its reader is free.
    return simulate(lower(schedule, ahead=0), measured_costs(timeline, transfer))


@dataclass(frozen=True)
class MeasuredCosts(Costs):
    """The mean time of each kind of action on each stage: a whole backward has one of its own."""

    means: dict[tuple[str, int], float] = field(default_factory=dict)

    def computation(self, action: Action) -> float:
        return self.means[action.kind, action.stage]


def measured_costs(timeline: Timeline, transfer: float) -> MeasuredCosts:
    times: dict[tuple[str, int], list[float]] = {}
    for row in timeline.spans:
        for span in row:
            assert isinstance(span.step, Action)
            times.setdefault((span.step.kind, span.step.stage), []).append(span.end - span.start)
    return MeasuredCosts(transfer=transfer, means={key: statistics.mean(values) for key, values in times.items()})


def cases_of(size: int, runs: dict[str, list[Run]]) -> list[Case]:
    """Step time and idle share of every schedule beside the simulated ones, and whether their order is the same."""
    cases = []
    steps: dict[str, tuple[float, float]] = {}
    for name, done in runs.items():
        for what, unit in (("step", "ms"), ("idle share", "%")):
            pairs = [
                (1000 * run.measured.length, 1000 * run.plan.length)
                if what == "step"
                else (100 * run.measured.idle_share, 100 * run.plan.idle_share)
                for run in done
            ]
            ratios = [min(pair) / max(pair) for pair in pairs]
            measured, expected = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = min(measured, expected) / max(measured, expected)
            cases.append(
                Case(f"{name}, {size} ranks, {what}", unit, measured, "simulated", expected, ratio,
                     (min(ratios), max(ratios)), BAR, ratio >= BAR)
            )  # fmt: skip
            if what == "step":
                steps[name] = (measured, expected)
    apart = [(a, b) for a, b in combinations(steps.values(), 2) if abs(a[1] / b[1] - 1) > 0.01]
    right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart)
    if apart:
        share, met = right / len(apart), right == len(apart)
        cases.append(
            Case(f"order, {size} ranks", "pairs", right, "simulated", len(apart), share, (share, share), 1.0, met)
        )
    return cases


def table(cases: list[Case], sizes: list[int]) -> str:
    """The page's table."""
    found = {case.case: case for case in cases}
    lines = ["| schedule | ranks | step, ms | simulated | idle share, % | simulated |", "|---|---|---|---|---|---|"]
    for size in sizes:
        for name in [name for name in NAMES if f"{name}, {size} ranks, step" in found]:
            step, idle = found[f"{name}, {size} ranks, step"], found[f"{name}, {size} ranks, idle share"]
            lines.append(
                f"| {name} | {size} | {step.ours:.0f} | {step.theirs:.0f} | {idle.ours:.1f} | {idle.theirs:.1f} |"
            )
    return "\n".join(lines)


def write_docs(cases: list[Case], sizes: list[int], device: str, picture: str) -> None:
    """Put the table and a drawing into docs/schedules.md."""
    mark = "measured" if device == "cpu" else "measured-gpu"
    path = ROOT / "docs" / "schedules.md"
    text = path.read_text()
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, rest = text.split(start)
    path.write_text(head + start + table(cases, sizes) + "\n" + end + rest.split(end)[1])
    (ROOT / "docs" / "schedules" / f"{mark}.svg").write_text(picture)
    print(f"written: docs/schedules.md, docs/schedules/{mark}.svg")


def run(arguments: argparse.Namespace) -> dict[int, dict[str, list[Run]]]:
    """All processes, and what rank 0 of each size measured."""
    context = mp.get_context("spawn")
    found: dict[int, dict[str, list[Run]]] = {size: {} for size in arguments.sizes}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        processes = []
        for rank in range(max(arguments.sizes)):
            words = (rank, f"{folder}/store", arguments)
            processes.append(context.Process(target=rank_main, args=(*words, None if rank else theirs), daemon=True))
            processes[-1].start()
        theirs.close()
        while True:
            try:
                size, name, done = ours.recv()
            except EOFError:
                break
            found[size].setdefault(name, []).append(done)
            measured, planned = (
                f"{timeline.length * 1000:,.1f} ms, idle {timeline.idle_share:.1%}"
                for timeline in (done.measured, done.plan)
            )
            print(f"  {size} ranks  {name}: {measured}; simulated {planned}", flush=True)
        for process in processes:
            process.join()
    return found


def main() -> None:
    arguments = parser("schedules", __doc__ or "", rounds=3)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[4, 8], help="ranks (default 4 8)")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: true compute, a GPU a rank")
    arguments.add_argument("--docs", action="store_true", help="write the table and a drawing into docs/schedules.md")
    arguments.add_argument("--schedules", nargs="+", default=NAMES, choices=NAMES, help="default: all")
    arguments.add_argument("--draw", type=Path, help="folder for a picture and a trace of every schedule")
    chosen = arguments.parse_args()
    chosen.threads = 1
    found = run(chosen)
    cases = [case for size, runs in found.items() for case in cases_of(size, runs)]
    if chosen.draw:
        chosen.draw.mkdir(parents=True, exist_ok=True)
        for size, runs in found.items():
            for name, done in runs.items():
                last = done[-1]
                (chosen.draw / f"{name}-{size}.svg").write_text(svg(last.measured, last.plan))
                trace = chrome_trace(last.measured, MICROSECONDS, last.plan)
                (chosen.draw / f"{name}-{size}.json").write_text(json.dumps(trace))
    if chosen.docs:
        last = found[chosen.sizes[0]][PICTURE][-1]
        write_docs(cases, chosen.sizes, chosen.device, svg(last.measured, last.plan))
    finish("schedules" if chosen.device == "cpu" else "schedules-gpu", chosen, cases)


if __name__ == "__main__":
    main()
