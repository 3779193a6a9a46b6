"""Pipeline schedules: whole, within their memory, and as long as their papers say."""

import json
import random
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from soma.cli import app
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline import formulas
from soma.train.parallel.pipeline.costs import Costs
from soma.train.parallel.pipeline.draw import LEFT, chrome_trace, svg
from soma.train.parallel.pipeline.plan import plan_of
from soma.train.parallel.pipeline.schedule import Action, Overlap, Schedule, layers_of_stages
from soma.train.parallel.pipeline.schedules import SCHEDULES, interleaved
from soma.train.parallel.pipeline.search import fixed, per_stage, search, v_half_limit
from soma.train.parallel.pipeline.simulate import DeadlockError, simulate
from soma.train.parallel.pipeline.validate import validate

SIZES = [(2, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 24), (6, 12)]
EVEN_COSTS = Costs(1, 1, 1)
# The formulas hold where a weight gradient is the shortest and the input's backward no shorter than the forward.
UNEVEN_COSTS = [Costs(1, 1, 0.8), Costs(1, 1.3, 0.7), Costs(2, 2, 1.5)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_valid_within_memory_and_as_long_as_published(name: str, ranks: int, microbatches: int) -> None:
    schedule = SCHEDULES[name](ranks, microbatches)
    validate(schedule)
    timeline = simulate(schedule, per_stage(EVEN_COSTS, schedule))
    assert timeline.bubble == pytest.approx(formulas.bubble(name, ranks, EVEN_COSTS), abs=1e-9)
    assert schedule.activations is not None
    assert timeline.peak <= schedule.activations


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "zb-v"])
@pytest.mark.parametrize("costs", UNEVEN_COSTS)
def test_formula_at_uneven_times(name: str, costs: Costs) -> None:
    schedule = SCHEDULES[name](8, 24)
    timeline = simulate(schedule, per_stage(costs, schedule))
    published = formulas.bubble(name, 8, costs)
    if published is None:
        assert name.startswith("dualpipe")
        assert costs.forward != costs.backward
    else:
        assert timeline.bubble == pytest.approx(published, abs=1e-9)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe-v"])
def test_formula_bounds_shorter_pairs(name: str) -> None:
    """Met where a pair takes as long as its parts, F + B = 3; an upper bound down to the longer of the two."""
    for pair in (2.0, 2.4, 2.8, 3.0):
        costs = Costs(overlapped=pair)
        schedule = SCHEDULES[name](8, 20)
        bubble = simulate(schedule, per_stage(costs, schedule)).bubble
        published = formulas.bubble(name, 8, costs)
        assert published is not None
        assert bubble == pytest.approx(published) if pair == 3 else bubble < published


def test_formulas_worked_numbers() -> None:
    found = [formulas.bubble(name, 8, EVEN_COSTS) for name in SCHEDULES]
    assert found == [21, 21, 10.5, 7, 0, 0, 6, 7]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_idle_share(name: str) -> None:
    """(p-1)/(m+p-1), whatever the times of forward and backward."""
    for ranks, microbatches in SIZES:
        timeline = simulate(SCHEDULES[name](ranks, microbatches), Costs(1.3, 0.9, 1.1))
        assert timeline.idle_share == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_worked_timeline() -> None:
    timeline = simulate(SCHEDULES["1f1b"](4, 8))
    assert timeline.length == 33
    assert timeline.idle_share == pytest.approx(3 / 11)


def test_interleaved_placement() -> None:
    """16 layers on 4 ranks, two layers a chunk: rank 0 has layers 1, 2, 9, 10 and rank 1 has 3, 4, 11, 12."""
    schedule = interleaved(4, 8)
    layers = layers_of_stages(16, schedule.stages)
    held = [[layer + 1 for stage in schedule.stages_of(rank) for layer in layers[stage]] for rank in range(4)]
    assert held[:2] == [[1, 2, 9, 10], [3, 4, 11, 12]]


def test_dualpipe_placement() -> None:
    """8 layers on 8 ranks: layers 0 and 7 lie on ranks 0 and 7."""
    schedule = SCHEDULES["dualpipe"](8, 16)
    assert schedule.stages_of(0) == schedule.stages_of(7) == [0, 7]
    assert [schedule.rank_of(0, microbatch) for microbatch in (0, 7, 8, 15)] == [0, 0, 7, 7]


def test_uneven_layers() -> None:
    assert [len(stage) for stage in layers_of_stages(10, 4)] == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="3 layers do not fill 4 stages"):
        layers_of_stages(3, 4)


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "said"),
    [("interleaved", 4, 6, "use 8"), ("dualpipe", 4, 6, "use 4 and 8"), ("dualpipe", 3, 8, "use 4 and 8"),
     ("dualpipe-v", 4, 6, "use 8")],
)  # fmt: skip
def test_impossible_sizes_name_possible_ones(name: str, ranks: int, microbatches: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SCHEDULES[name](ranks, microbatches)


# Broken on purpose:


def altered(schedule: Schedule, rank: int, change: object) -> Schedule:
    rows = [list(row) for row in schedule.steps]
    change(rows[rank])  # type: ignore[operator]
    return replace(schedule, steps=tuple(tuple(row) for row in rows))


def test_validate_sees_what_is_broken() -> None:
    schedule = SCHEDULES["1f1b"](4, 8)
    with pytest.raises(ValueError, match=r"never runs F2\.7"):
        validate(altered(schedule, 2, lambda row: row.remove(Action("F", 2, 7))))
    with pytest.raises(ValueError, match=r"(?s)is done 2 times.*!F1\.0"):
        validate(altered(schedule, 1, lambda row: row.insert(3, Action("F", 1, 0))))
    with pytest.raises(ValueError, match=r"belongs to rank 3"):
        validate(altered(schedule, 0, lambda row: row.append(Action("F", 3, 0))))
    with pytest.raises(ValueError, match=r"is nothing: one BW"):
        validate(altered(schedule, 3, lambda row: row.remove(Action("BW", 3, 5))))
    with pytest.raises(ValueError, match=r"outside 4 stages"):
        validate(altered(schedule, 0, lambda row: row.append(Action("F", 0, 8))))
    with pytest.raises(ValueError, match=r"holds 8 activations at once, 4 were promised"):
        validate(replace(SCHEDULES["gpipe"](4, 8), activations=4))


def test_deadlock_names_who_waits_for_what() -> None:
    schedule = altered(SCHEDULES["1f1b"](2, 2), 1, lambda row: row.reverse())
    with pytest.raises(DeadlockError, match=r"rank 1 cannot start BW1\.1: it waits for F1\.1"):
        simulate(schedule)
    with pytest.raises(ValueError, match=r"(?s)the schedule stops.*!BW1\.1"):
        validate(schedule)


def test_transfers_and_slow_stages_count() -> None:
    schedule = SCHEDULES["gpipe"](3, 2)
    assert simulate(schedule, Costs(transfer=0.5)).length == simulate(schedule).length + 4 * 0.5
    slow = simulate(schedule, Costs(forward=(1, 3, 1)))
    # 1, then two forwards of 3, then 1; backwards of 2 as ever: 1 + 6 + 1, and (m + p - 1)·2 - 0
    assert slow.length == 1 + 2 * 3 + 1 + 4 * 2


def test_overlap_shortens() -> None:
    schedule = SCHEDULES["dualpipe"](4, 8)
    assert simulate(schedule, Costs(overlapped=2.4)).length < simulate(schedule).length
    assert any(isinstance(step, Overlap) for row in schedule.steps for step in row)


def test_v_half() -> None:
    """At most ceil(p/2) + 1 activations, less than any fixed schedule with less idle time than 1F1B needs."""
    for ranks in (4, 8):
        schedule = plan_of(Layout(pp=ranks, schedule="v-half"), 3 * ranks)
        assert schedule.activations == v_half_limit(ranks)
        assert schedule.steps == search(ranks, 3 * ranks, v_half_limit(ranks)).steps
        validate(schedule)
        timeline = simulate(schedule, per_stage(EVEN_COSTS, schedule))
        assert timeline.peak <= v_half_limit(ranks)
        assert timeline.bubble < formulas.bubble("1f1b", ranks, EVEN_COSTS)  # type: ignore[operator]


def test_search_is_never_worse_than_the_fixed() -> None:
    """200 random draws of times; in some it is better."""
    rng = random.Random(0)
    better = 0
    for _ in range(200):
        costs = Costs(rng.uniform(0.3, 2), rng.uniform(0.3, 2), rng.uniform(0.3, 2), rng.choice([0, 0, 0.2]))
        limit = rng.choice([2.5, 3, 4, 6])
        schedule = search(3, 5, limit, costs)
        timeline = simulate(schedule, per_stage(costs, schedule))
        assert timeline.peak <= limit
        others = [simulate(other, per_stage(costs, other)) for other, _ in fixed(3, 5)]
        best = min((other.length for other in others if other.peak <= limit), default=float("inf"))
        assert timeline.length <= best + 1e-9
        better += timeline.length < best - 1e-9
    assert better > 0


def test_search_for_parts_of_unequal_length() -> None:
    """A model whose last eighth takes three times as long: the best of those that fit, at the times of every stage."""
    times = [1.0, 1, 1, 1, 1, 1, 1, 3]
    costs = Costs(times, times, times, 0.2)
    found = search(4, 8, 3, costs)
    timeline = simulate(found, per_stage(costs, found))
    assert timeline.peak <= 3
    even = search(4, 8, 3)
    assert timeline.length <= simulate(even, per_stage(costs, even)).length
    straight = SCHEDULES["1f1b"](4, 8)
    assert per_stage(costs, straight).forward == [2, 2, 2, 4]
    assert per_stage(costs, SCHEDULES["zb-v"](4, 8)).forward == times
    with pytest.raises(ValueError, match="4 numbers for the 8 stages of zb-v"):
        per_stage(Costs(forward=[1, 1, 1, 1]), SCHEDULES["zb-v"](4, 8))


def test_search_says_what_would_fit() -> None:
    with pytest.raises(ValueError, match="the least is"):
        search(4, 8, 0.5)


def test_drawings() -> None:
    schedule = SCHEDULES["dualpipe"](4, 8)
    timeline = simulate(schedule)
    picture = ElementTree.fromstring(svg(timeline))
    titles = [node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == sum(len(schedule.actions(rank)) for rank in range(4))
    events = [event for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(titles)
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(timeline.length * 1000)


def test_plan_and_run_in_one_drawing() -> None:
    """A run that is twice as slow as its plan: both are there, on one scale."""
    schedule = SCHEDULES["zb-v"](2, 4)
    plan, run = simulate(schedule), simulate(schedule, Costs(2, 2, 2))
    actions = sum(len(schedule.actions(rank)) for rank in range(2))
    picture = ElementTree.fromstring(svg(run, plan))
    boxes = [node for node in picture.iter("{http://www.w3.org/2000/svg}rect") if len(node)]
    assert len(boxes) == 2 * actions
    ends = {"13.00": 0.0, "26.00": 0.0}  # by height: plan, run
    for box in boxes:
        ends[box.attrib["height"]] = max(
            ends[box.attrib["height"]], float(box.attrib["x"]) + float(box.attrib["width"])
        )
    assert (ends["26.00"] - LEFT) / (ends["13.00"] - LEFT) == pytest.approx(2, abs=1e-3)
    trace = chrome_trace(run, 1e6, plan)["traceEvents"]
    for threads, length in (((0, 1), run.length), ((2, 3), plan.length)):
        events = [event for event in trace if event["ph"] == "X" and event["tid"] in threads]
        assert len(events) == actions
        assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(length * 1e6)


def test_command(tmp_path) -> None:
    out = tmp_path / "out.svg"
    words = ["schedule", "dualpipe", "--stages", "8", "--microbatches", "20", "--draw"]
    done = CliRunner().invoke(app, [*words, str(out)])
    assert done.exit_code == 0, done.output
    assert "bubble       6   formula 6" in done.output
    assert out.read_text().startswith("<svg")
    trace = tmp_path / "out.json"
    assert CliRunner().invoke(app, ["schedule", "search", "--draw", str(trace)]).exit_code == 0
    assert json.loads(trace.read_text())["traceEvents"]
    wrong = CliRunner().invoke(app, ["schedule", "dualpip"])
    assert "expected search or one of gpipe" in str(wrong.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draw", "nowhere/x.svg"), "there is no folder nowhere"),
        (("--transfer", "inf"), "give a finite number"),
        (("--memory", "nan"), "give a finite number"),
        (("--forward", "9" * 400), "is no time"),
        (("--transfer", "1e308"), "more than a number can hold"),
        (("--link", "0-0=1"), "expected two ranks"),
        (("--stages", "100000"), "ask for a smaller plan"),
    ],
)  # fmt: skip
def test_command_refuses(options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["schedule", "1f1b", *options])
    assert message in str(done.exception)
