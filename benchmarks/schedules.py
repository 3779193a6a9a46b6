"""Pipeline schedules, measured against their simulation: the real executor, real processes, real transfers.

Two cores cannot compute for eight ranks at once, so on CPUs an action is a product of small matrices that is filled up
with a wait to its nominal time, and a link holds every message back by a fixed delay. Nothing else is made up: order,
transfers and waiting for each other are the executor's. Schedules take turns, round by round. A pair that DualPipe
overlaps runs one after the other, in the executor and in the simulation.

    python benchmarks/schedules.py --json --docs
    python benchmarks/schedules.py --device cuda --sizes 4     # true compute of a Llama, a GPU for each rank

Ratio: the smaller of measured and simulated over the larger. With --device cuda the simulation takes the mean time of
each kind of action on each stage from the run itself.
"""

import argparse
import multiprocessing as mp
import os
import queue
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, Case, finish, parser
from torch import Tensor

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.parallel.pipeline.costs import Costs
from soma.train.parallel.pipeline.draw import svg
from soma.train.parallel.pipeline.execute import Clock, PipelineStep, execute, gather_timeline
from soma.train.parallel.pipeline.lower import lower, one_by_one
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedule import Action, Schedule
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.search import per_stage, search, v_half_limit
from soma.train.parallel.pipeline.simulate import Timeline, simulate
from soma.train.parallel.pipeline.transport import Transport

MICROBATCHES = {2: 8, 4: 12, 8: 16}
UNIT = 0.05  # seconds of a rank's forward; its two backwards 1 and 0.8 of that, a link's delay a tenth
BAR = 0.9
WIDTH = 32
NAMES = [*SCHEDULES, "v-half"]


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


class WaitingPipeline:
    """One schedule with stages that wait."""

    def __init__(self, schedule: Schedule, group: dist.ProcessGroup) -> None:
        self.schedule, self.group, self.rank = schedule, group, dist.get_rank(group)
        self.plan = lower(schedule)
        self.transport = DelayedTransport(self.plan, group, lambda index: torch.empty(WIDTH, WIDTH))

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
        return gather_timeline(self.schedule, clock, self.group)


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
        self.pipeline = PipelineStep(model, schedule, group)
        model.to_empty(device=device)
        model.init_weights(0)
        tokens = torch.randint(0, 8192, (1, 2 * width), device=device)
        self.microbatches = [Microbatch(tokens, tokens)] * schedule.microbatches

    def run(self, unit: float) -> Timeline:
        dist.barrier(self.group)
        self.pipeline.step(self.microbatches, 1e-4, 1.0)
        return self.pipeline.timeline()


def rank_main(rank: int, store: str, sizes: list[int], rounds: int, device: str, connection: Connection | None) -> None:
    """What a process does: every schedule in turn, on as many ranks as its size says."""
    torch.set_num_threads(1)
    world = max(sizes)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank < size:
            measure(size, group, rounds, device, connection)
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(size: int, group: dist.ProcessGroup, rounds: int, device: str, connection: Connection | None) -> None:
    """Rounds of all schedules on `size` ranks; rank 0 sends (size, name, timeline) to the parent."""
    make = ComputingPipeline if device == "cuda" else WaitingPipeline
    pipelines: dict[str, Any] = {}
    for round_ in range(-1, rounds):
        for name in NAMES:
            if device == "cuda":
                pipelines.clear()  # one model at a time
            if name not in pipelines:
                pipelines[name] = make(plan(name, size), group)
                pipelines[name].run(UNIT / 50)  # connections, buffers, kernels
            if round_ >= 0:
                timeline = pipelines[name].run(UNIT)
                if connection is not None:
                    connection.send((size, name, timeline))


def measured_costs(timeline: Timeline) -> Costs:
    """Mean times of the kinds of actions on each stage."""
    times: dict[tuple[str, int], list[float]] = {}
    for row in timeline.spans:
        for span in row:
            assert isinstance(span.step, Action)
            times.setdefault((span.step.kind, span.step.stage), []).append(span.end - span.start)
    mean = {key: statistics.mean(values) for key, values in times.items()}
    stages = range(timeline.schedule.stages)
    backward = [mean.get(("B", stage), mean.get(("BW", stage), 0.0)) for stage in stages]
    return Costs([mean["F", stage] for stage in stages], backward, [mean.get(("W", stage), 0.0) for stage in stages])


def cases_of(size: int, runs: dict[str, list[Timeline]], device: str) -> tuple[list[Case], dict[str, Timeline]]:
    """Step time and idle share of every schedule beside the simulated ones, and whether their order is the same."""
    cases, plans = [], {}
    steps: dict[str, tuple[float, float]] = {}
    for name, timelines in runs.items():
        schedule = timelines[0].schedule
        costs = nominal(schedule, UNIT) if device == "cpu" else measured_costs(timelines[-1])
        plans[name] = simulate(schedule, costs)
        for what, unit in (("step", "ms"), ("idle share", "%")):
            factor = 1000 if what == "step" else 100
            values = [factor * (run.length if what == "step" else run.idle_share) for run in timelines]
            expected = factor * (plans[name].length if what == "step" else plans[name].idle_share)
            ratios = [min(value, expected) / max(value, expected) for value in values]
            middle = statistics.median(values)
            ratio = min(middle, expected) / max(middle, expected)
            cases.append(
                Case(f"{name}, {size} ranks, {what}", unit, middle, "simulated", expected, ratio,
                     (min(ratios), max(ratios)), BAR, ratio >= BAR)
            )  # fmt: skip
            if what == "step":
                steps[name] = (middle, expected)
    apart = [(a, b) for a, b in combinations(steps.values(), 2) if abs(a[1] / b[1] - 1) > 0.01]
    right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart)
    share = right / len(apart)
    cases.append(
        Case(f"order, {size} ranks", "pairs", right, "simulated", len(apart), share, (share, share), 1.0, share == 1.0)
    )
    return cases, plans


def table(cases: list[Case], sizes: list[int]) -> str:
    """The page's table."""
    found = {case.case: case for case in cases}
    lines = ["| schedule | ranks | step, ms | simulated | idle share, % | simulated |", "|---|---|---|---|---|---|"]
    for size in sizes:
        for name in NAMES:
            step, idle = found[f"{name}, {size} ranks, step"], found[f"{name}, {size} ranks, idle share"]
            lines.append(
                f"| {name} | {size} | {step.ours:.0f} | {step.theirs:.0f} | {idle.ours:.1f} | {idle.theirs:.1f} |"
            )
    return "\n".join(lines)


def write_docs(cases: list[Case], sizes: list[int], picture: str) -> None:
    """Put the table and a drawing into docs/schedules.md."""
    path = ROOT / "docs" / "schedules.md"
    text = path.read_text()
    start, end = "<!-- measured -->\n", "<!-- /measured -->"
    head, rest = text.split(start)
    path.write_text(head + start + table(cases, sizes) + "\n" + end + rest.split(end)[1])
    (ROOT / "docs" / "schedules" / "measured.svg").write_text(picture)
    print("written: docs/schedules.md, docs/schedules/measured.svg")


def run(arguments: argparse.Namespace) -> dict[int, dict[str, list[Timeline]]]:
    """All processes, and what rank 0 of each size measured."""
    context = mp.get_context("spawn")
    found: dict[int, dict[str, list[Timeline]]] = {size: {} for size in arguments.sizes}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        processes = []
        for rank in range(max(arguments.sizes)):
            words = (rank, f"{folder}/store", arguments.sizes, arguments.rounds, arguments.device)
            processes.append(context.Process(target=rank_main, args=(*words, None if rank else theirs), daemon=True))
            processes[-1].start()
        theirs.close()
        while True:
            try:
                size, name, timeline = ours.recv()
            except EOFError:
                break
            found[size].setdefault(name, []).append(timeline)
            print(
                f"  {size} ranks  {name}: {timeline.length * 1000:,.0f} ms, idle {timeline.idle_share:.1%}", flush=True
            )
        for process in processes:
            process.join()
    return found


def main() -> None:
    arguments = parser("schedules", __doc__ or "", rounds=3)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[4, 8], help="ranks (default 4 8)")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: true compute, a GPU a rank")
    arguments.add_argument("--docs", action="store_true", help="write the table and a drawing into docs/schedules.md")
    arguments.add_argument("--draw", type=Path, help="folder for a drawing of every schedule, plan and run")
    chosen = arguments.parse_args()
    chosen.threads = 1
    found = run(chosen)
    cases: list[Case] = []
    pictures: dict[tuple[str, int], str] = {}
    for size, runs in found.items():
        new, plans = cases_of(size, runs, chosen.device)
        cases += new
        for name, timelines in runs.items():
            pictures[name, size] = svg(timelines[-1], plans[name])
    if chosen.draw:
        chosen.draw.mkdir(parents=True, exist_ok=True)
        for (name, size), picture in pictures.items():
            (chosen.draw / f"{name}-{size}.svg").write_text(picture)
    if chosen.docs:
        write_docs(cases, chosen.sizes, pictures["zb-h1", chosen.sizes[0]])
    finish("schedules" if chosen.device == "cpu" else "schedules-gpu", chosen, cases)


if __name__ == "__main__":
    main()
