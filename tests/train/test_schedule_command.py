"""Lowered schedules drawn, asked for by `soma schedule`, and on the page about them."""

import json
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from soma.cli import app
from soma.train.parallel.pipeline.costs import Costs, Memory
from soma.train.parallel.pipeline.draw import chrome_trace, svg
from soma.train.parallel.pipeline.lower import lower
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.simulate import Timeline, simulate


def test_lanes_are_drawn() -> None:
    plan = lower(SCHEDULES["dualpipe-v"](2, 4), 2)
    timeline = simulate(plan, Costs(1, 1, 1, 0.3, None, 0.4, 0.5, 0.6), Memory(1e9, 2e9, 4e9, 1e7, 2))
    titles = [
        node.text or "" for node in ElementTree.fromstring(svg(timeline)).iter("{http://www.w3.org/2000/svg}title")
    ]
    traffic = [entry for row in timeline.traffic for entry in row]
    for lane in ("send", "receive", "shards", "all-to-all"):
        drawn = sum(title.startswith(f"{lane}: ") for title in titles)
        assert drawn == sum(entry.lane == lane for entry in traffic) > 0
    assert "GB" in svg(timeline).split("</text>")[0]
    events = chrome_trace(timeline)["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        "send", "receive", "shards", "all-to-all",
    }  # fmt: skip
    assert sum(event["ph"] == "X" and event["tid"] >= 4 for event in events) == len(traffic)
    most = [max(event["args"]["bytes"] for event in events if event["ph"] == "C" and event["pid"] == r) for r in (0, 1)]
    assert most == timeline.peak_bytes


def test_links_of_a_plan_above_its_run() -> None:
    plan = simulate(SCHEDULES["1f1b"](2, 4), Costs(1, 1, 1, 0.5))
    run = Timeline(plan.schedule, simulate(plan.schedule, Costs(2, 2, 2)).spans, plan.peaks)
    picture = ElementTree.fromstring(svg(run, plan))
    titles = [node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(title.startswith("send: ") for title in titles) == 8
    events = chrome_trace(run, 1e6, plan)["traceEvents"]
    assert sum(event["ph"] == "X" and event["cat"] == "receive" for event in events) == 8


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run, and the first prints what stands below it."""
    page = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text().replace("\\\n", "")
    lines = [shlex.split(line, comments=True) for line in page.split("\n") if line.startswith("soma schedule ")]
    assert len(lines) >= 4
    monkeypatch.chdir(tmp_path)
    outputs = []
    for words in lines:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output, done.exception)
        outputs.append(done.output.replace("drawn: out.svg\n", ""))
    assert f"```\n{outputs[0]}```" in page


def said_by(*words: str) -> str:
    done = CliRunner().invoke(app, ["schedule", *words])
    return done.output + ("" if done.exception is None else str(done.exception))


def test_command_of_a_sharded_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["zb-v", "--stages", "2", "--zero", "3", "--shards", "4", "--unshard", "0.2", "--reduce", "0.3"]
    words += ["--transfer", "0.1", "--link", "0-1=0.4", "--all-to-all", "0.5", "--parameter-bytes", "8GB"]
    output = said_by(*words, "--gradient-bytes", "16GB", "--message-bytes", "1MB", "--draw", str(out))
    assert "all-to-all   " in output
    assert "memory       " in output
    assert "at most 2 promised" in output
    assert "4 shards" in output
    names = {event["name"] for event in json.loads(out.read_text())["traceEvents"]}
    assert {"unshard0", "reduce3", "F0.0 to rank 1", "dispatch"} <= names
    listed = said_by("--list")
    assert all(name in listed for name in [*SCHEDULES, "search"])
    assert "formula none" in said_by("1f1b", "--forward", "1,2,1,1")
    assert "(p-1)(F+B), for free transfers" in said_by("1f1b", "--transfer", "0.1")
    assert "formula 3 " in said_by("interleaved", "--virtual-stages", "3")
    pairs = [said_by("dualpipe", "--overlapped", time).split("\n")[1] for time in ("3", "2")]
    assert pairs[0] == said_by("dualpipe").split("\n")[1]  # as long as their parts
    assert float(pairs[1].removeprefix("step")) < float(pairs[0].removeprefix("step"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1f1b", "--forward", "1,2"], "--forward: 2 numbers, 1f1b has 4 stages"),
        (["1f1b", "--weight", "1,x"], "'x' is no time; write one number, or one for each stage"),
        (["1f1b", "--link", "0-4=1"], "expected two ranks below 4 and a time"),
        (["1f1b", "--activation-bytes", "many"], "--activation-bytes: 'many' is not a size"),
        (["search", "--forward", "1,1,1,1"], "search: 4 times: give one, or those of 8 parts of the model"),
        (["search", "--memory", "0.1"], "the least is"),
        (["dualpipe", "--stages", "3"], "use 4 and 8"),
        (["1f1b", "--forward", "0", "--backward", "0", "--weight", "0"], "all are 0"),
        (["1f1b", "--draw", "out.png"], "ends in .svg or .json"),
        ([], "expected search or one of gpipe"),
    ],
)
def test_command_says_what_is_wrong(words: list[str], said: str) -> None:
    assert said in said_by(*words)


def test_the_page_is_fresh() -> None:
    """Its table and its pictures are those of `python tools/schedules.py`."""
    root = Path(__file__).parents[2]
    tool = runpy.run_path(str(root / "tools" / "schedules.py"))
    page = (root / "docs" / "schedules.md").read_text()
    assert tool["written"](page) == page
    for name, picture in tool["pictures"]().items():
        assert (root / "docs" / "schedules" / name).read_text() == picture, f"{name}: run python tools/schedules.py"
        assert f"(schedules/{name})" in page
