"""Self-Instruct and Evol-Instruct against a scripted endpoint that answers sensibly, and against Soma's own server."""

import http.server
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.instruct.generate import evolve, prompts, self_instruct
from soma.data.instruct.generate.caller import retry_after
from soma.data.instruct.generate.output import generate
from soma.data.instruct.generate.rouge import Novelty, lcs, rouge_l, tokens
from soma.data.instruct.generate.settings import Budget, Settings

# --- The novelty filter ---

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "the-cat", "Don't", "ünï", "3,5"]), max_size=14).map(" ".join)


def plain_lcs(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        before = row[:]
        for index, b in enumerate(right):
            row[index + 1] = before[index] + 1 if a == b else max(row[index], before[index + 1])
    return row[-1]


@settings(max_examples=40, deadline=None)
@given(WORDS, WORDS)
def test_rouge_is_rouge_score(left: str, right: str) -> None:
    from rouge_score import rouge_scorer

    assert lcs(tokens(left), tokens(right)) == plain_lcs(tokens(left), tokens(right))
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(left, right)["rougeL"].fmeasure
    assert rouge_l(left, right) == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=8), WORDS, st.sampled_from([0.3, 0.7]))
def test_the_nearest_of_all_is_found(pool: list[str], text: str, threshold: float) -> None:
    scores = [rouge_l(text, other) for other in pool]
    best = max(scores, default=0.0)
    found = Novelty(pool).nearest(text, threshold)
    if best <= threshold:
        assert found is None
    else:
        assert found is not None
        assert (found.index, found.score) == (scores.index(best), best)


def test_worked_numbers() -> None:
    assert rouge_l("the cat sat", "the cat ran off") == pytest.approx(4 / 7)
    assert lcs(list("abcd"), list("bxd")) == 2
    assert Budget(price_in=Decimal("0.5"), price_out=Decimal("1.5")).cost(1000, 200) == Decimal("0.0008")


# --- What is taken of answers ---


def test_lists_and_filters() -> None:
    assert self_instruct.new_instructions(" Name a river.\n10. Sort the\n   words.\n11) Why?") == [
        "Name a river.", "Sort the words.", "Why?"
    ]  # fmt: skip
    reasons = {
        "Name a long river here.": None, "Why is that?": "too_short", "w " * 151: "too_long",
        "Draw a house by the sea.": "keyword", "Describe the image I gave.": "keyword", "Imagine a quiet forest.": None,
        "Write a program that sorts numbers.": "program", "- name a long river": "first_character",
        "Écris un poème en français.": "first_character",
    }  # fmt: skip
    assert {text: self_instruct.filtered(text) for text in reasons} == reasons


def test_instances() -> None:
    said = "Input: none\nOutput: 4\nInput: x\nOutput: x\nInput: y\nOutput: as follows:\nInput: a\nb\nOutput: c\nd"
    assert self_instruct.instances(said, False) == [{"input": "", "output": "4"}, {"input": "a\nb", "output": "c\nd"}]
    said = "Label: good\nInput: Fine!\nLabel: bad\nInput: Awful\nLabel: bad\nInput: Awful"
    assert self_instruct.instances(said, True) == [
        {"input": "Fine!", "output": "good"}, {"input": "Awful", "output": "bad"}
    ]  # fmt: skip
    assert self_instruct.instances("Input: a\nOutput: b\nInput: a\nOutput: c", False) == []  # they contradict
    assert self_instruct.instances("I cannot do that.", False) == []


def test_the_four_conditions_of_elimination() -> None:
    said = ["Equal", "equal.", "Different", "Not Equal", "They are not equal", "unequal", "hm"]
    assert [evolve.gains_nothing(one) for one in said] == [True, True, False, False, False, False, False]
    assert evolve.failed_answer("I'm sorry, I cannot help.") == "sorry"
    assert evolve.failed_answer("I am sorry for the loss. " + "word " * 80) is None
    assert [evolve.failed_answer(one) for one in ("", "...!", "And the, of it.", "Yes: 4")] == [
        "no_words", "no_words", "no_words", None
    ]  # fmt: skip
    copies = ["#Harder Task#: Add 1.", "Add 1 as in the given prompt.", "The rewritten task: add.", "#Task#"]
    assert all(evolve.COPIED.search(one) for one in copies)
    assert not any(evolve.COPIED.search(one) for one in ("# Task list\nSort it.", "Give a task to each.", "Add 1."))


# --- A scripted endpoint ---


class Script(http.server.BaseHTTPRequestHandler):
    """Answers by the form of the prompt; the words depend on nothing but the prompt."""

    def do_POST(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with state["lock"]:
            state["asked"][prompt] += 1
            holds = state["asked"].total() > state["free"]
            refusal = state["refuse"].pop(0) if state["refuse"] else None
        if refusal:
            self.send_response(refusal[0])
            for name, value in refusal[1].items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if holds:
            assert state["go_on"].wait(60)
        said = answer(prompt)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(said) // 4}
        reply = json.dumps({"choices": [{"message": {"content": said}}], "usage": usage}).encode()
        with state["lock"]:
            state["tokens"] += sum(usage.values())
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: Any) -> None:
        pass


VERBS = ["Explain", "Compare", "List", "Summarise", "Translate", "Invent", "Judge", "Order", "Count", "Rhyme"]
THINGS = [
    "rivers",
    "taxes",
    "poems",
    "engines",
    "salads",
    "treaties",
    "proofs",
    "dreams",
    "bridges",
    "verbs",
    "planets",
    "contracts",
    "birds",
]


def answer(prompt: str) -> str:
    dice = random.Random(prompt)
    if prompt.startswith("Here is a numbered list"):
        made = [f"{dice.choice(VERBS)} {' '.join(dice.sample(THINGS, 4))} for {dice.choice(THINGS)}." for _ in range(3)]
        return f" {made[0]}\n10. {made[1]}\n11. {made[2]}\n12. Draw me a picture of {made[0]}\n13. Why?"
    if prompt.startswith("Is the answer"):
        return " Yes." if dice.random() < 0.5 else " No."
    if prompt.startswith("Name the labels"):
        return f"Label: good\nInput: {' '.join(dice.sample(THINGS, 3))}\nLabel: bad\nInput: none of it"
    if prompt.startswith("Give up to three"):
        return "no idea" if dice.random() < 0.2 else f"Input: none\nOutput: {' '.join(dice.sample(THINGS, 5))}"
    if prompt.startswith("Do these two tasks"):
        return dice.choice(["Equal", "Different", "Different"])
    if re.match("Rewrite the task|Take the task", prompt):
        task = prompt.split(f"{prompts.GIVEN}:\n")[1].split("\n\n#")[0]
        return "#Harder Task#: x" if dice.random() < 0.2 else f"{task} Mind {' and '.join(dice.sample(THINGS, 3))}."
    return dice.choice(["Sorry, no.", "...", *[" ".join(dice.sample(THINGS, 6)) for _ in range(4)]])


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5 a connection may be reset, and the try counts as a request


@pytest.fixture
def endpoint() -> Iterator[tuple[str, dict[str, Any]]]:
    with Server(("127.0.0.1", 0), Script) as server:
        state = {"asked": Counter(), "refuse": [], "tokens": 0, "free": math.inf, "lock": threading.Lock(),
                 "go_on": threading.Event()}  # fmt: skip
        server.state = state  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", state
        server.shutdown()


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    rows = [
        {"id": f"s{i}", "instruction": f"{VERBS[i]} the {THINGS[i]} near {THINGS[-i]} today.",
         "is_classification": i % 3 == 0, "instances": [{"input": f"number {i}", "output": f"result {i}"}]}
        for i in range(10)
    ]  # fmt: skip
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(out: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"provenance": row["provenance"] | {"time": "", "url_host": ""}} for row in rows]


@pytest.mark.parametrize("method", ["self-instruct", "evol-instruct"])
def test_any_concurrency_gives_the_same_rows(
    endpoint: tuple[str, dict[str, Any]], seeds: str, tmp_path: Path, method: Any
) -> None:
    url, state = endpoint
    results = []
    for concurrency in (1, 7):
        out = tmp_path / f"out{concurrency}"
        given = Settings(method, "m", url, round=4, rows=14, epochs=2, concurrency=concurrency)
        report = generate(seeds, given, out)
        results.append((timeless(rows_of(out)), report["left_out"], report["spent"]))
        asked = state["asked"].total()
        assert generate(seeds, given, out) == report  # again: nothing is asked
        assert state["asked"].total() == asked
    assert results[0] == results[1]
    rows, left_out, spent = results[0]
    assert len(rows) > 5
    assert len({row["id"] for row in rows}) == len(rows)
    known = {row["id"] for row in rows} | {f"s{i}" for i in range(10)}
    for row in rows:
        origin = row["provenance"]
        assert origin["model"] == "m"
        assert len(origin["prompt_hashes"]) == 3
        assert origin["tokens_in"] > 0
        # A parent may be a row that was a duplicate and left out.
        left = {one["row"]["id"] for one in rows_of(out, "dropped.jsonl")}
        assert set(origin["parents"]) <= known | left
    if method == "self-instruct":
        assert {"keyword", "too_short", "no_instance"} <= set(left_out)
        assert {row["is_classification"] for row in rows} == {True, False}
        pool = [json.loads(line)["instruction"] for line in Path(seeds).read_text().splitlines()]
        pool += [row["instruction"] for row in rows]
        pairs = [(a, b) for i, a in enumerate(pool) for b in pool[:i] if i >= 10]
        assert max(rouge_l(a, b) for a, b in pairs) <= 0.7
    else:
        assert {"copied", "no_gain", "sorry", "no_words"} <= set(left_out)
        assert {row["provenance"]["operator"] for row in rows} <= set(prompts.OPERATORS)
        assert len({row["provenance"]["operator"] for row in rows}) >= 3
    assert spent["requests"] == spent["answers"]


def test_budgets_are_exact(endpoint: tuple[str, dict[str, Any]], seeds: str, tmp_path: Path) -> None:
    url, state = endpoint
    prices = {"price_in": Decimal(2), "price_out": Decimal(8)}
    for name, budget in (
        ("requests", Budget(requests=23)), ("tokens", Budget(tokens=9000)),
        ("money", Budget(money=Decimal("0.02"), **prices)),
    ):  # fmt: skip
        state["asked"].clear()
        state["tokens"] = 0
        given = Settings("self-instruct", "m", url, round=4, max_tokens=200, budget=budget)
        report = generate(seeds, given, tmp_path / name)
        spent = report["spent"]
        assert report["over_budget"]
        assert spent["requests"] == state["asked"].total()
        assert spent["tokens_in"] + spent["tokens_out"] == state["tokens"]
        if name == "requests":
            assert spent["requests"] == 23
        if name == "tokens":
            assert 9000 - 3000 < state["tokens"] <= 9000
        if name == "money":
            paid = Decimal(spent["money"])
            assert paid == (spent["tokens_in"] * 2 + spent["tokens_out"] * 8) / Decimal(1_000_000)
            assert Decimal("0.008") < paid <= Decimal("0.02")
    more = generate(seeds, Settings("self-instruct", "m", url, round=4, max_tokens=200, budget=Budget(requests=40)),
                    tmp_path / "requests")  # fmt: skip
    assert more["spent"]["requests"] == 40
    whole = generate(seeds, Settings("self-instruct", "m", url, round=4, max_tokens=200, budget=Budget(requests=40)),
                     tmp_path / "at once")  # fmt: skip
    assert timeless(rows_of(tmp_path / "requests")) == timeless(rows_of(tmp_path / "at once"))
    assert more["left_out"] == whole["left_out"]


def test_a_busy_endpoint_is_asked_again(
    endpoint: tuple[str, dict[str, Any]], seeds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, state = endpoint
    pauses: list[float] = []
    from soma.data.instruct.generate import caller

    monkeypatch.setattr(caller.time, "sleep", lambda seconds: pauses.append(seconds))
    state["refuse"] = [(429, {"Retry-After": "7"}), (503, {}), (400, {})]
    given = Settings("self-instruct", "m", url, round=4, concurrency=1, budget=Budget(requests=12))
    report = generate(seeds, given, tmp_path / "out")
    assert pauses[:2] == [7.0, 0.5]
    assert report["spent"] | {"tokens_in": 0, "tokens_out": 0, "money": ""} == {
        "requests": 12, "answers": 9, "refused": 1, "tokens_in": 0, "tokens_out": 0, "money": ""
    }  # fmt: skip
    assert report["left_out"]["refused"] == 1
    now = 1_700_000_000.0
    assert retry_after("Tue, 14 Nov 2023 22:13:30 GMT", now) == 10.0
    assert (retry_after("soon", now), retry_after(None, now)) == (None, None)
    state["refuse"] = [(401, {})] * 3
    with pytest.raises(UserError, match=r"model m\): 401 .*the same command goes on"):
        generate(seeds, Settings("self-instruct", "m", url, round=4), tmp_path / "refused")
    with pytest.raises(UserError, match="was begun with model 'm', now it is 'n'"):
        generate(seeds, Settings("self-instruct", "n", url, round=4), tmp_path / "out")


def test_killed_and_resumed(endpoint: tuple[str, dict[str, Any]], seeds: str, tmp_path: Path) -> None:
    url, state = endpoint
    state["free"] = 30  # the calls after these are in flight when it is killed
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from soma.cli import app; app()", "data", "generate", "evol-instruct", "--seeds",
               seeds, "--url", url, "--model", "m", "--out", str(out), "--rows", "25",
               "--concurrency", "4"]  # fmt: skip
    journal = out / "calls.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 20):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    state["free"] = math.inf
    state["go_on"].set()
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answered = [line for line in rows_of(out, "calls.jsonl") if "key" in line]
    assert len({line["key"] for line in answered}) == len(answered)  # nothing was paid for twice
    asked = state["asked"].total()
    generate(seeds, Settings("evol-instruct", "m", url, rows=25), tmp_path / "whole")
    assert 2 * asked - state["asked"].total() <= 4  # but what was in flight
    assert timeless(rows_of(out)) == timeless(rows_of(tmp_path / "whole"))
    assert len(rows_of(out)) > 5


def test_duplicates_and_evaluation_items_leave(
    endpoint: tuple[str, dict[str, Any]], seeds: str, tmp_path: Path
) -> None:
    url, _ = endpoint
    first = tmp_path / "first"
    generate(seeds, Settings("self-instruct", "m", url, round=4, rows=12), first)
    rows = rows_of(first)
    # What the first run made is a seed of the next, and one of its rows an evaluation item.
    target = rows[0]["instances"][0]
    item = f"{rows[0]['instruction']} {target['input']} {target['output']}"
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": item}))
    given = Settings("self-instruct", "m", url, round=4, rows=12, decontaminate=(str(tmp_path / "eval.jsonl"),))
    report = generate(seeds, given, first)
    dropped = rows_of(first, "dropped.jsonl")
    assert report["left_out"]["contaminated"] == 1
    assert [(one["reason"], one["row"]["id"]) for one in dropped if one["reason"] == "contaminated"] == [
        ("contaminated", rows[0]["id"])
    ]  # fmt: skip
    from soma.data.instruct.generate.output import Made, _chosen

    made = [Made({"id": str(i), "instruction": text, "input": "", "output": "o"}) for i, text in enumerate(
        ["a b c d e f g h", "a b c d e f g h ", "one two three four five six seven eight nine ten eleven twelve",
         "one two three four five six seven eight nine ten eleven twelve thirteen"])]  # fmt: skip
    kept, left = _chosen(made, ["seed"], Settings("evol-instruct", "m", url, near=0.6))
    assert [one.row["id"] for one in kept] == ["0", "2"]
    assert [(one["reason"], one["detail"]) for one in left] == [
        ("exact_duplicate", "like 0"), ("near_duplicate", "like 2")
    ]  # fmt: skip


def test_the_command_asks_for_a_limit(seeds: str, tmp_path: Path) -> None:
    command = ["data", "generate", "self-instruct", "--seeds", seeds, "--url", "http://x", "--model", "m"]
    command += ["--out", str(tmp_path)]
    with pytest.raises(UserError, match="say how much"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    with pytest.raises(UserError, match="needs --price-in"):
        CliRunner().invoke(app, [*command, "--budget-money", "1"], catch_exceptions=False)
