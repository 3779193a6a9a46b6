"""What the links of a real run did: noted, gathered from all ranks, and laid over the plan link for link."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soma.train.parallel.pipeline.costs import Costs
from soma.train.parallel.pipeline.draw import chrome_trace, svg
from soma.train.parallel.pipeline.links import Moves, on_links
from soma.train.parallel.pipeline.schedule import Action, Schedule, ShardAction, Transfer, actions_of
from soma.train.parallel.pipeline.simulate import Timeline, Traffic, simulate
from soma.train.parallel.pipeline.transfers import made_by, needed_by
from tests.train.pool import Pool
from tests.train.sharded_pipeline import build


def recorded(rank: int, world_size: int, schedule: str, zero: int) -> tuple[Schedule, Timeline, bool]:
    """Of a step that was recorded: its plan, what it did, and whether its gradients are those of one that was not."""
    pipeline, microbatches = build(schedule, zero)
    gradients: list[dict[str, Tensor]] = []
    for records in (False, True):
        if records:
            assert not pipeline.timeline().traffic
            pipeline.record()
            assert pipeline.transport is not None
            pipeline.transport.when_needed = zero == 0  # then a rank surely waits: a message is not asked for before
        pipeline.model.zero_grad(set_to_none=True)
        pipeline.step(microbatches, 0.01, 1.0)
        gradients.append({name: local(p.grad) for name, p in pipeline.model.named_parameters()})
    pipeline.model.eval()
    pipeline.evaluate(microbatches)  # is not noted: the time line is that of the last step
    same = all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    return pipeline.plan, pipeline.timeline(), same


def local(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 0), ("zb-v", 3), ("dualpipe-v", 2)])
def test_a_run_and_its_plan_have_the_same_links(pool: Pool, schedule: str, zero: int) -> None:
    answers = pool.run(recorded, 4 if zero else 2, schedule, zero)
    plan, run, _ = answers[0]
    assert all(same for _, _, same in answers)
    planned = simulate(plan, Costs(1, 1, 1, 0.2, unshard=0.1, reduce=0.1))
    for rank in range(plan.ranks):
        for lane in ("send", "receive", "shards"):
            did, should = (in_lane(timeline, rank, lane) for timeline in (run, planned))
            assert sorted(entry.name for entry in did) == sorted(entry.name for entry in should)
            if lane != "shards":  # of each link in this very order
                for peer in {entry.peer for entry in should}:
                    orders = [[one.message for one in row if one.peer == peer] for row in (did, should)]
                    assert orders[0] == orders[1]
    check_times(plan, run)
    check_pictures(run, planned)


def in_lane(timeline: Timeline, rank: int, lane: str) -> list[Traffic]:
    return [entry for entry in timeline.traffic[rank] if entry.lane == lane]


def check_times(plan: Schedule, run: Timeline) -> None:
    """Nothing is there before it was made, nothing is used before it is there, and nobody computes while it waits."""
    spans = [{action: span for span in row for action in actions_of(span.step)} for row in run.spans]
    ends = {made_by(action): span.end for row in spans for action, span in row.items() if action.kind != "W"}
    for rank in range(plan.ranks):
        there = {entry.message: entry for entry in in_lane(run, rank, "receive")}
        for entry in [*there.values(), *in_lane(run, rank, "send")]:
            assert entry.message is not None
            assert entry.posted is not None
            assert entry.posted <= entry.start <= entry.end
            assert ends[entry.message] <= entry.start
        for action, span in spans[rank].items():
            need = needed_by(plan, action)
            if need in there:
                assert there[need].end <= span.start
        for peer in {entry.peer for entry in there.values()}:
            own = [entry for entry in there.values() if entry.peer == peer]
            assert all(one.end <= other.start for one, other in pairwise(own))
        for wait in in_lane(run, rank, "wait"):
            assert not any(span.start < wait.end and wait.start < span.end for span in run.spans[rank])
        gathers = [entry for entry in in_lane(run, rank, "shards") if entry.name.startswith("unshard")]
        for gather in gathers:
            stage = int(gather.name.removeprefix("unshard"))
            later = [span.start for action, span in spans[rank].items() if action.stage == stage]
            assert any(gather.end <= start for start in later)
        named = [wait.name for wait in in_lane(run, rank, "wait") if " of rank " in wait.name]
        received = [entry.name for entry in in_lane(run, rank, "receive")]
        assert set(named) <= set(received)
        assert plan.zero or sorted(named) == sorted(received)
        own = [name for name in {wait.name for wait in in_lane(run, rank, "wait")} if " of rank " not in name]
        assert sorted(own) == sorted({entry.name for entry in in_lane(run, rank, "shards")})
    assert run.length >= max(span.end for row in run.spans for span in row)


def check_pictures(run: Timeline, planned: Timeline) -> None:
    """Every link of both is drawn, and every message has an arrow from its sender to its reader."""
    titles = [node.text or "" for node in ElementTree.fromstring(svg(run, planned)).iter(f"{SVG}title")]
    events = chrome_trace(run, 1e6, planned)["traceEvents"]
    for timeline, prefix in ((run, ""), (planned, "plan: ")):
        traffic = [entry for row in timeline.traffic for entry in row]
        threads = {event["tid"] for event in events if event["ph"] == "M" and event["name"] == "thread_name"
                   and event["args"]["name"] in {f"{prefix}{entry.lane}" for entry in traffic}}  # fmt: skip
        slices = [event for event in events if event["ph"] == "X" and event["tid"] in threads]
        assert len(slices) == len(traffic)
        arrows = [event for event in events if event["ph"] in "sf" and event["tid"] in threads]
        messages = [entry for entry in traffic if entry.lane == "receive"]
        assert len(arrows) == 2 * len(messages) > 0
        for arrow in arrows:  # each end lies in a slice of its message
            message = arrow["id"].split(" ")[-1]
            assert any(
                one["pid"] == arrow["pid"] and one["tid"] == arrow["tid"] and one["name"].startswith(f"{message} ")
                and one["ts"] <= arrow["ts"] <= one["ts"] + one["dur"] for one in slices
            )  # fmt: skip
    for lane in ("send", "receive", "shards", "wait"):
        drawn = sum(title.startswith(f"{lane}: ") for title in titles)
        assert drawn == sum(len(in_lane(timeline, rank, lane)) for timeline in (run, planned) for rank in range(2))


SVG = "{http://www.w3.org/2000/svg}"


def test_both_ends_of_a_message() -> None:
    """It leaves when both ends are posted and the one before it has come; the sender is through before its reader."""
    first, second = Action("F", 0, 0), Action("F", 0, 1)
    sender = Moves({first: (1, 1.0, 2.5), second: (1, 2.0, None)}, {}, [])
    reader = Moves({}, {first: (0, 1.5, 3.0), second: (0, 0.5, 4.0)}, [Traffic("wait", "F0.0 of rank 0", 1.6, 3.0)])
    sends, (receive, wait, other) = on_links([sender, reader])
    assert [(entry.start, entry.end, entry.posted) for entry in sends] == [(1.5, 2.5, 1.0), (3.0, 4.0, 2.0)]
    assert [(entry.start, entry.end, entry.posted) for entry in (receive, other)] == [(1.5, 3.0, 1.5), (3.0, 4.0, 0.5)]
    assert (wait.start, wait.end) == (1.6, 3.0)


def test_the_plan_is_not_changed(pool: Pool) -> None:
    """Recording a run adds nothing to what is done: sends and shard actions are those of the schedule."""
    plan, run, _ = pool.run(recorded, 4, "1f1b", 1)[0]
    steps = [step for row in plan.steps for step in row]
    assert sum(isinstance(step, Transfer) and step.kind == "send" for step in steps) == sum(
        len(in_lane(run, rank, "send")) for rank in range(2)
    )
    shards = [step for step in steps if isinstance(step, ShardAction) and step.kind != "reshard"]
    assert len(shards) == sum(len(in_lane(run, rank, "shards")) for rank in range(2))
