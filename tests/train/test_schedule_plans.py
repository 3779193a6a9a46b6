"""Lowered schedules: sends, receives and shard actions are checked, timed, weighed, and run in that order."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soma.train.parallel.pipeline.clock import Clock
from soma.train.parallel.pipeline.costs import Costs, Memory
from soma.train.parallel.pipeline.execute import execute
from soma.train.parallel.pipeline.lower import lower, one_by_one
from soma.train.parallel.pipeline.schedule import Action, Overlap, Schedule, ShardAction, Step, Transfer, actions_of
from soma.train.parallel.pipeline.schedules import SCHEDULES, interleaved
from soma.train.parallel.pipeline.simulate import LongerError, simulate
from soma.train.parallel.pipeline.validate import SHOWN, validate

F, B, BW = (lambda stage, index, kind=kind: Action(kind, stage, index) for kind in ("F", "B", "BW"))
QUICK = settings(max_examples=25, deadline=None)


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    """Any schedule of a size that it exists for, lowered in any way."""
    while True:
        name, ranks = draw(st.sampled_from(list(SCHEDULES))), draw(st.integers(2, 4))
        with suppress(ValueError):  # not for these sizes
            schedule = SCHEDULES[name](ranks, draw(st.integers(1, 9)))
            schedule = one_by_one(schedule) if draw(st.booleans()) else schedule
            return lower(schedule, draw(st.integers(0, 3)), draw(st.integers(1, 3)))


def test_worked_example() -> None:
    words = [str(step) for step in lower(SCHEDULES["1f1b"](2, 2), ahead=1).steps[1]]
    assert words == ["0>F0.0", "F1.0", "0>F0.1", "BW1.0", "B1.0>0", "F1.1", "BW1.1", "B1.1>0"]
    pair = lower(SCHEDULES["dualpipe"](4, 8)).steps[1]
    place = next(place for place, step in enumerate(pair) if isinstance(step, Overlap))
    assert [str(step) for step in pair[place : place + 3]] == ["F2.6&BW1.0", "F2.6>0", "B1.0>0"]


@QUICK
@given(plans(), st.integers(1, 4), st.randoms())
def test_any_plan(plan: Schedule, shards: int, rng: Random) -> None:
    """It is valid; links and lanes carry one thing at a time; in the end a rank has its pieces and nothing else."""
    validate(plan)
    draw = lambda: [rng.choice([0.0, 0.5, 1.3]) for _ in range(plan.stages)]  # noqa: E731
    costs = Costs([1.0] * plan.stages, draw(), draw(), rng.choice([0.0, 0.4]), None, draw(), draw(), draw())
    memory = Memory(3.0, 8.0, 16.0, 1.0, shards)
    timeline = simulate(plan, costs, memory)
    assert timeline.peaks == simulate(plan).peaks
    pieces = (8 + 16) / (shards if plan.zero else 1)
    for rank in range(plan.ranks):
        for lane in ("send", "receive", "shards"):
            spans = sorted((traffic.start, traffic.end) for traffic in timeline.traffic[rank] if traffic.lane == lane)
            if lane == "shards" or plan.ranks == 2:  # else a rank has more than one link
                assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(spans))
        assert all(one.end <= other.start for one, other in pairwise(timeline.spans[rank]))
        assert timeline.held[rank][-1][1] == pytest.approx(pieces * len(plan.stages_of(rank)))
        assert timeline.exposed[rank] >= -1e-9
    with pytest.raises(LongerError):
        simulate(plan, costs, memory, within=timeline.length - max(costs.reduce) * 99 - 0.01)  # type: ignore[arg-type]


@QUICK
@given(plans(), st.randoms())
def test_whatever_is_left_out_is_missed(plan: Schedule, rng: Random) -> None:
    """Any step of any plan."""
    rank = rng.randrange(plan.ranks)
    row = list(plan.steps[rank])
    del row[rng.randrange(len(row))]
    with pytest.raises(ValueError, match="!"):
        validate(replace(plan, steps=(*plan.steps[:rank], tuple(row), *plan.steps[rank + 1 :])))


@QUICK
@given(plans(), st.randoms())
def test_a_shuffled_plan_runs_or_is_refused(plan: Schedule, rng: Random) -> None:
    """Two steps of a rank change places, or one is there twice: the answer is a time line or a picture."""
    rows = [list(row) for row in plan.steps]
    row = rng.choice(rows)
    one, other = rng.randrange(len(row)), rng.randrange(len(row))
    if rng.random() < 0.5:
        row[one], row[other] = row[other], row[one]
    else:
        row.insert(one, row[other])
    changed = replace(plan, steps=tuple(tuple(row) for row in rows), activations=None)
    try:
        validate(changed)
    except ValueError as error:
        assert str(error).startswith(f"schedule {plan.name}: ")  # noqa: PT017
        assert "!" in str(error)  # noqa: PT017
    else:
        assert len(simulate(changed).spans) == plan.ranks


@QUICK
@given(plans())
def test_no_more_buffers_than_said(plan: Schedule) -> None:
    """Open receives of a channel: those ahead, and those that a rank reads in another order than they are sent in."""
    for rank, row in enumerate(plan.steps):
        opened: dict[int, int] = {}
        most = 0
        for step in row:
            if isinstance(step, Transfer) and step.kind == "receive":
                opened[step.peer] = opened.get(step.peer, 0) + 1
                most = max(most, *opened.values())
            for action in actions_of(step):
                for peer in opened:
                    opened[peer] -= any(
                        isinstance(other, Transfer) and other.kind == "receive" and other.peer == peer
                        and is_read_by(other.message, action) for other in row
                    )  # fmt: skip
        assert most <= 3 + plan.stages_per_rank, (plan.name, rank)
        assert set(opened.values()) <= {0}


def is_read_by(message: Action, action: Action) -> bool:
    step = 1 if message.kind == "F" else -1
    kinds = ("F",) if message.kind == "F" else ("B", "BW")
    return action == Action(action.kind, message.stage + step, message.microbatch) and action.kind in kinds


# Broken on purpose: what is said, and what is marked in the picture.

Change = Callable[[list[list[Step]]], object]
PLAN = lower(SCHEDULES["1f1b"](2, 3), 2)


def swap(row: list[Step], one: Step, other: Step) -> None:
    first, second = row.index(one), row.index(other)
    row[first], row[second] = other, one


FAULTS: dict[str, tuple[Change, str, list[str]]] = {
    "a send is missing": (
        lambda rows: rows[0].remove(Transfer("send", F(0, 1), 1)),
        "rank 0 never sends F0.1, which rank 1 reads", ["!(F0.1>1)"],
    ),
    "a receive is missing": (
        lambda rows: rows[1].remove(Transfer("receive", F(0, 1), 0)),
        "rank 1 runs F1.1 without a receive of F0.1 before it", ["!F1.1"],
    ),
    "a send comes too early": (
        lambda rows: swap(rows[0], Transfer("send", F(0, 1), 1), F(0, 1)),
        "rank 0 sends F0.1 before it has made it", ["!F0.1>1"],
    ),
    "a send is there twice": (
        lambda rows: rows[0].append(Transfer("send", F(0, 1), 1)),
        "rank 0 has a send of F0.1 to rank 1 twice", ["!F0.1>1"],
    ),
    "nobody reads it": (
        lambda rows: rows[1].append(Transfer("send", F(1, 0), 0)),
        "rank 1 has a send of F1.0 to rank 0: rank 0 reads no such thing of rank 1", ["!F1.0>0"],
    ),
    "receives in another order": (
        lambda rows: swap(rows[1], Transfer("receive", F(0, 0), 0), Transfer("receive", F(0, 1), 0)),
        "rank 0 sends F0.0 to rank 1, which receives F0.1 first", ["!F0.0>1", "!0>F0.1"],
    ),
    "a stage is not gathered": (
        lambda rows: rows[0].remove(ShardAction("unshard", 0)),
        "rank 0 runs F0.0 while the parameters of stage 0 are cut", ["!F0.0"],
    ),
    "gathered twice": (
        lambda rows: rows[0].insert(5, ShardAction("unshard", 0)),
        "rank 0 has unshard0 where stage 0 is whole already", ["!unshard0"],
    ),
    "not cut again": (
        lambda rows: rows[0].remove(ShardAction("reshard", 0)),
        "rank 0 never cuts stage 0 again", ["!unshard0"],
    ),
    "cut too early": (
        lambda rows: rows[1].insert(0, ShardAction("reshard", 1)),
        "rank 1 has reshard1 where stage 1 is not whole", ["!reshard1"],
    ),
    "a reduction is missing": (
        lambda rows: rows[1].remove(ShardAction("reduce", 1)),
        "rank 1 has reduce1 after 2 backward passes of it: ZeRO-2 has it after 1", ["!reduce1"],
    ),
    "the last reduction is missing": (
        lambda rows: rows[0].pop(len(rows[0]) - 1 - rows[0][::-1].index(ShardAction("reduce", 0))),
        "rank 0 never reduces gradients of stage 0", ["!BW0.2"],
    ),
    "of another rank": (
        lambda rows: rows[0].append(ShardAction("unshard", 1)),
        "rank 0 has unshard1, but no such stage is sharded there", ["!unshard1"],
    ),
    "nothing is computed": (
        lambda rows: rows[1].remove(F(1, 2)), "rank 1 never runs F1.2", ["!rank 1", "!(F1.2)"],
    ),
    "no backward": (
        lambda rows: rows[1].remove(BW(1, 2)),
        "the backward of stage 1, microbatch 2 is nothing: one BW, or B and W", ["!(BW1.2)"],
    ),
    "half a backward more": (
        lambda rows: rows[1].append(Action("W", 1, 2)),
        "the backward of stage 1, microbatch 2 is W, BW: one BW, or B and W", ["!W1.2", "!BW1.2"],
    ),
    "done twice": (lambda rows: rows[1].append(F(1, 0)), "F1.0 is done 2 times", ["!F1.0"]),
    "elsewhere": (lambda rows: rows[0].append(F(1, 0)), "rank 0 has F1.0, which belongs to rank 1", ["!F1.0"]),
    "unknown": (
        lambda rows: rows[0].append(F(0, 3)), "F0.3 is outside 2 stages and 3 microbatches", ["!F0.3"],
    ),
    "a circle": (
        lambda rows: swap(rows[1], BW(1, 1), F(1, 1)),
        "rank 1 cannot start BW1.1: it waits for F1.1", ["!BW1.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_picture_of_a_fault(fault: str) -> None:
    change, said, marked = FAULTS[fault]
    validate(PLAN)
    rows = [list(row) for row in PLAN.steps]
    change(rows)
    with pytest.raises(ValueError, match=r"^schedule 1f1b: ") as caught:
        validate(replace(PLAN, steps=tuple(tuple(row) for row in rows)))
    message, *picture = str(caught.value).split("\n")
    assert said in message
    assert len(picture) == 2
    words = [word for line in picture for word in line.split()]
    for word in marked:
        assert word in words or word in "\n".join(picture), picture
    assert any(line.startswith("!rank") for line in picture)


def test_a_stage_kept_whole_at_stage_3() -> None:
    """And a row that is long is shown around the culprit."""
    plan = lower(one_by_one(SCHEDULES["zb-v"](2, 16)), 3)
    rows = [list(row) for row in plan.steps]
    first = rows[0].index(ShardAction("reshard", 0))
    again = rows[0].index(ShardAction("unshard", 0), first)
    del rows[0][again], rows[0][first]
    with pytest.raises(ValueError, match="rank 0 keeps stage 0 whole during") as caught:
        validate(replace(plan, steps=tuple(tuple(row) for row in rows)))
    assert all(len(line.split()) <= SHOWN + 5 for line in str(caught.value).split("\n")[1:])
    assert "…" in str(caught.value)


def test_more_memory_than_promised() -> None:
    with pytest.raises(ValueError, match="rank 0 holds 8 activations at once, 4 were promised") as caught:
        validate(replace(SCHEDULES["gpipe"](2, 8), activations=4))
    assert "!F0.4" in str(caught.value)


# Times and bytes, by hand.


def test_a_link_carries_one_message_at_a_time() -> None:
    """Two ranks, GPipe, messages as long as three forwards: the second waits for the first."""
    timeline = simulate(SCHEDULES["gpipe"](2, 2), Costs(1, 1, 1, 3))
    sent = [(traffic.start, traffic.end) for traffic in timeline.traffic[0] if traffic.lane == "send"]
    assert sent == [(1, 4), (4, 7)]
    assert [span.start for span in timeline.spans[1]] == [4, 7, 8, 10]


def test_a_link_has_its_own_time() -> None:
    slow = simulate(SCHEDULES["gpipe"](3, 2), Costs(transfer={(0, 1): 0.25, (1, 0): 0.25, (1, 2): 1.0, (2, 1): 1.0}))
    assert slow.length == simulate(SCHEDULES["gpipe"](3, 2)).length + 2 * 1.25


def test_a_message_leaves_when_its_buffer_is_open() -> None:
    """With one buffer a message waits until the forward that reads the one before it is done."""
    few, many = (simulate(lower(SCHEDULES["gpipe"](2, 3), ahead=n), Costs((1, 5), 1, 1, 1)) for n in (1, 3))
    left = [[traffic.start for traffic in line.traffic[0] if traffic.lane == "send"] for line in (few, many)]
    assert left == [[1, 7, 13], [1, 2, 3]]


def test_shards_beside_the_computation() -> None:
    """One rank, two microbatches: what is gathered holds the first step up, a reduction the end, the rest is hidden."""
    plan = lower(SCHEDULES["1f1b"](1, 2), 2)
    timeline = simulate(plan, Costs(1, 1, 1, unshard=0.5, reduce=0.75))
    assert [span.start for span in timeline.spans[0]] == [0.5, 1.5, 3.5, 4.5]
    assert [(entry.name, entry.start, entry.end) for entry in timeline.traffic[0]] == [
        ("unshard0", 0, 0.5), ("reduce0", 3.5, 4.25), ("reduce0", 6.5, 7.25),
    ]  # fmt: skip
    assert timeline.length == 7.25
    once = simulate(lower(SCHEDULES["1f1b"](1, 2), 1), Costs(1, 1, 1, unshard=0.5, reduce=0.75))
    assert [entry.name for entry in once.traffic[0]] == ["unshard0", "reduce0"]


def test_every_time_is_that_of_its_stage() -> None:
    timeline = simulate(
        lower(SCHEDULES["zb-h1"](2, 1), 3),
        Costs((1, 2), (3, 4), (5, 6), 0.5, all_to_all=(0.5, 0.25), unshard=(1, 2), reduce=(3, 4)),
    )
    lengths = [{span.step.kind: span.end - span.start for span in row} for row in timeline.spans]  # type: ignore[union-attr]
    assert lengths == [{"F": 1.5, "B": 3.5, "W": 5}, {"F": 2.25, "B": 4.25, "W": 6}]
    assert timeline.exposed == [1.0, 0.5]
    shards = [[entry.end - entry.start for entry in row if entry.lane == "shards"] for row in timeline.traffic]
    assert shards == [[1, 3], [2, 4]]


def test_trips_to_experts_alone_and_hidden() -> None:
    """F = B = W = 1, a trip and back 0.5 a pass: 1.5 + 2.5 apart, 3 as a pair, in which nothing stands still."""
    costs = Costs(all_to_all=0.5)
    forward, backward = F(0, 1), BW(0, 0)
    assert (costs.of(forward), costs.of(backward), costs.of(Overlap(forward, backward))) == (1.5, 2.5, 3)
    assert Costs(all_to_all=4).of(Overlap(forward, backward)) >= 8  # trips alone take that long
    assert Costs(overlapped=2.2, all_to_all=0.5).of(Overlap(forward, backward)) == 2.2
    schedule = SCHEDULES["dualpipe"](4, 8)
    together, apart = (simulate(plan, costs) for plan in (schedule, one_by_one(schedule)))
    assert together.length < apart.length
    assert max(together.exposed) < max(apart.exposed) == 8 * (0.5 + 0.5)
    trips = [entry for entry in apart.traffic[0] if entry.lane == "all-to-all"]
    assert sum(entry.end - entry.start for entry in trips) == pytest.approx(8)


def test_bytes_by_hand() -> None:
    """1F1B on two ranks: parameters 10, gradients 20 from the first backward, two activations of 3, messages of 1 that
    take half a step: to the last rank the next one comes while it works, on the first one leaves when another is there.
    """
    memory = Memory(3, 10, 20, 1)
    first, last = simulate(SCHEDULES["1f1b"](2, 4), Costs(transfer=0.5), memory=memory).held
    assert max(count for _, count in last) == 10 + 20 + 3 + 1
    assert max(count for _, count in first) == 10 + 20 + 2 * 3 + 2
    assert first[-1][1] == last[-1][1] == 10 + 20


def test_bytes_of_shards() -> None:
    """Of 4 shards: pieces, whole parameters of the stages whose turn it is, gradients whole until they are reduced."""

    def most(name: str, zero: int) -> float:
        plan = lower(SCHEDULES[name](2, 4), zero)
        return max(simulate(plan, memory=Memory(0, 8, 16, 0, 4)).peak_bytes)

    assert most("zb-v", 0) == 2 * (8 + 16)
    assert most("zb-v", 1) == 2 * 8 / 4 + 2 * 8 + 2 * 16 + 16 / 4  # one is reduced before the other
    # A W is reduced before the other stage has one.
    assert most("zb-v", 2) == most("zb-v", 3) == 2 * 8 / 4 + 2 * 8 + 16 + 2 * 16 / 4
    many = interleaved(2, 4, chunks=4)
    peaks = [max(simulate(lower(many, zero), memory=Memory(0, 8, 16, 0, 4)).peak_bytes) for zero in range(4)]
    # A reduction holds its input and its output.
    assert peaks == [4 * 24, 4 * 2 + 4 * 8 + 4 * 16 + 4, 4 * 2 + 4 * 8 + 16 + 4 * 4, 4 * 2 + 2 * 8 + 16 + 4 * 4]


# The executor runs that very plan.


class Log:
    """A transport, a worker, shards and a clock that note what they are asked."""

    def __init__(self, did: list[str], stage: int = -1) -> None:
        self.did, self.stage = did, stage

    def begin(self) -> None: ...

    def finish(self) -> None: ...

    def ready(self) -> None: ...

    def mark(self, step: Step) -> None: ...

    def open(self, receive: Transfer) -> None:
        self.did.append(str(receive))

    def receive(self, message: Action) -> Tensor:
        assert any(word.endswith(f">{message}") for word in self.did)
        return torch.zeros(1)

    def send(self, message: Action, reader: int, value: Tensor) -> None:
        self.did.append(f"{message}>{reader}")

    def forward(self, index: int, x: Tensor | None) -> Tensor:
        assert (x is None) == (self.stage == 0)
        self.did.append(f"F{self.stage}.{index}")
        return torch.zeros(1)

    def backward(self, index: int, grad: Tensor | None) -> Tensor | None:
        self.did.append(f"B{self.stage}.{index}")
        return torch.zeros(1)

    def weight(self, index: int) -> None:
        self.did[-1:] = ([f"BW{self.stage}.{index}"] if self.did[-1] == f"B{self.stage}.{index}" else
                         [self.did[-1], f"W{self.stage}.{index}"])  # fmt: skip

    def __getattr__(self, kind: str) -> Callable[[], None]:
        assert kind in ("unshard", "reshard", "reduce")
        return lambda: self.did.append(f"{kind}{self.stage}")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero", [0, 3])
def test_executed_in_order(name: str, zero: int) -> None:
    plan = lower(one_by_one(SCHEDULES[name](4, 8)), zero)
    for rank in range(4):
        did: list[str] = []
        parts = {stage: Log(did, stage) for stage in plan.stages_of(rank)}
        clock: Clock = Log(did)  # type: ignore[assignment]
        execute(plan, rank, parts, Log(did), clock, parts)  # type: ignore[arg-type]
        expected = [str(step) for step in plan.steps[rank]]
        # A W directly behind its own B looks like a BW here.
        assert " ".join(did) == " ".join(merged(expected))


def merged(words: list[str]) -> list[str]:
    found: list[str] = []
    for word in words:
        if word.startswith("W") and found and found[-1] == f"B{word[1:]}":
            found[-1] = f"BW{word[1:]}"
        else:
            found.append(word)
    return found
