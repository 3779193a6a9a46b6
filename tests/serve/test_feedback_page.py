"""Thumbs and corrections: from the page in a real browser, by the API with keys, to training data, to a tuned model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from browser import open_browser
from http_tools import call, post, wait_for
from tiny import make_model
from typer.testing import CliRunner

from soma.adapt import adapt_recipe, data_kind
from soma.cli import app as cli
from soma.data.feedback import export_feedback
from soma.run import run
from soma.serve.database import Database
from soma.serve.keys.store import KeyStore
from soma.serve.running import running_service

TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("liked"), initializer_range=0.02)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A database of keys and two of them."""
    path = tmp_path_factory.mktemp("keys") / "keys.db"
    store = KeyStore(Database(str(path), create=True))
    return path, store.create("ada")[1].text, store.create("bob")[1].text


@pytest.fixture(scope="module")
def url(model: Path, log: Path, keys: tuple[Path, str, str]) -> Iterator[str]:
    with running_service(model, keys=str(keys[0]), request_log=str(log), request_log_seconds=0.1) as made:
        yield made


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    return [row for file in (folder / table).glob("[!.]*.parquet") for row in pq.read_table(file).to_pylist()]


def ask(url: str, key: str, text: str, **changes: Any) -> tuple[str, str]:
    """Request id and answer."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0,
            "ignore_eos": True, **changes}  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    status, told, data = call(url, "POST", "/v1/chat/completions", json.dumps(body), headers)
    assert status == 200, data
    return told["x-request-id"], json.loads(data)["choices"][0]["message"]["content"]


def give(url: str, key: str, **value: Any) -> int:
    return post(url, "/v1/feedback", value, Authorization=f"Bearer {key}")[0]


def test_feedback_needs_a_key(url: str) -> None:
    assert post(url, "/v1/feedback", {"request_id": "req-" + "0" * 24, "rating": "up"})[0] == 401


@pytest.mark.page
@pytest.mark.parametrize("width", [1280, 390])
def test_thumbs_and_correction_by_keyboard(url: str, log: Path, keys: tuple[Path, str, str], width: int) -> None:
    """No mouse: Tab reaches the buttons, Enter presses them, Escape leaves the correction."""
    with open_browser(width, 800) as page:
        page.get(url)
        assert wait_for(lambda: page.find_element("id", "key").is_displayed())
        page.find_element("id", "key").send_keys(keys[1] + ENTER)
        assert wait_for(lambda: page.find_element("id", "input").is_enabled())
        page.execute_script("document.getElementById('max_tokens').value = 8")
        page.find_element("id", "input").send_keys("hello" + ENTER)
        assert wait_for(lambda: page.find_elements("css selector", ".feedback"))
        answer = page.find_element("css selector", ".assistant .answer").get_property("textContent")
        buttons = page.find_elements("css selector", ".feedback > button")
        assert [each.get_attribute("aria-label") for each in buttons[:2]] == ["Good answer", "Bad answer"]
        page.execute_script("arguments[0].focus()", buttons[0])
        page.switch_to.active_element.send_keys(TAB)
        assert page.switch_to.active_element == buttons[1]
        page.switch_to.active_element.send_keys(ENTER)
        assert wait_for(lambda: buttons[1].get_attribute("aria-pressed") == "true")
        assert buttons[0].get_attribute("aria-pressed") == "false"
        buttons[1].send_keys(TAB)
        page.switch_to.active_element.send_keys(ENTER)
        text = page.switch_to.active_element
        shown = answer.replace("\r\n", "\n").replace("\r", "\n")  # a textarea has one kind of line end
        assert (text.tag_name, text.get_property("value")) == ("textarea", shown)
        text.send_keys("\ue00c")  # Escape
        assert page.switch_to.active_element == buttons[2]
        buttons[2].send_keys(ENTER)
        text = page.switch_to.active_element
        text.clear()
        text.send_keys(f"as it should be, {width}")
        text.send_keys(TAB)
        page.switch_to.active_element.send_keys(ENTER)
        assert wait_for(lambda: not page.find_elements("css selector", ".correction"))
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        rows = [row for row in page.get_log("browser") if row["level"] == "SEVERE" and row["source"] != "network"]
        assert rows == []

    def pair() -> list[Any]:
        return [row for row in rows_of(log, "feedback") if row["correction"] == f"as it should be, {width}"]

    assert wait_for(pair)
    (row,) = pair()
    request_id = row["request_id"]
    assert {(each["rating"], each["correction"]) for each in rows_of(log, "feedback")
            if each["request_id"] == request_id} == {("down", None), (None, row["correction"])}  # fmt: skip
    assert wait_for(lambda: [each for each in rows_of(log, "requests") if each["request_id"] == request_id])
    (asked,) = [each for each in rows_of(log, "requests") if each["request_id"] == request_id]
    assert asked["completion"] == answer
    assert asked["key_id"] == row["key_id"] is not None


@pytest.fixture(scope="module")
def exported(url: str, log: Path, keys: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corrections by API, and what `soma feedback export` makes of them."""
    tmp_path = tmp_path_factory.mktemp("exported")
    _, ada, bob = keys
    wanted = "hello world"
    answers = {}
    for number in range(24):
        request_id, answer = ask(url, ada, f"say {number}")
        answers[request_id] = answer
        assert give(url, ada, request_id=request_id, rating="down") == 200
        assert give(url, ada, request_id=request_id, correction="never mind") == 200
        assert give(url, ada, request_id=request_id, correction=wanted) == 200  # the last counts
    liked, answer = ask(url, ada, "what do you like", ignore_eos=False)
    foreign, _ = ask(url, ada, "not yours")
    assert give(url, ada, request_id=liked, rating="up") == 200
    assert give(url, bob, request_id=foreign, rating="up") == 200
    assert give(url, bob, request_id="req-" + "f" * 24, rating="up") == 200
    expected = {*answers, liked, foreign}
    assert wait_for(lambda: expected <= {row["request_id"] for row in rows_of(log, "requests")})
    assert wait_for(lambda: {liked, foreign, "req-" + "f" * 24} <= {r["request_id"] for r in rows_of(log, "feedback")})
    told = CliRunner().invoke(cli, ["feedback", "export", str(log), "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    assert "left out 1: the request was another key's" in told.output
    assert "left out 1: the request is not in the log" in told.output
    sft = [json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    dpo = [json.loads(line) for line in (tmp_path / "out" / "dpo.jsonl").read_text().splitlines()]
    asked = {f"say {number}" for number in range(24)}
    pairs = {row["prompt"][0]["content"]: row for row in dpo}
    assert asked <= pairs.keys()
    assert all(pairs[each]["chosen"] == wanted for each in asked)
    assert {pairs[each]["rejected"] for each in asked} == set(answers.values())
    turns = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in sft}
    assert all(turns[each] == wanted for each in asked)
    assert turns.get("what do you like", answer) == answer
    assert "not yours" not in turns
    assert data_kind(str(tmp_path / "out" / "sft.jsonl")) == "instruct"
    assert data_kind(str(tmp_path / "out" / "dpo.jsonl")) == "preference"
    return tmp_path / "out"


def test_feedback_is_training_data(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["dpo.jsonl", "sft.jsonl"]


@pytest.mark.slow
def test_from_feedback_to_a_tuned_model(exported: Path, model: Path, tmp_path: Path) -> None:
    """The corrected answer has become likelier than the one that was given."""
    short = {"steps": 8, "sequence_length": 32, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0,
             "precision": "fp32", "compile": "false", "threads": 1, "device": "cpu"}  # fmt: skip
    overrides = [f"prefer.{key}={value}" for key, value in short.items()]
    recipe = adapt_recipe("liked", str(model), str(exported / "dpo.jsonl"),
                          [*overrides, "preferences.validation_fraction=0.3"])  # fmt: skip
    result = run(recipe, tmp_path / "runs")
    facts = json.loads((result.artefacts["prefer_scores"] / "answers.json").read_text())
    assert facts["loss"] < facts["start_loss"]
    assert facts["margin"] > 0


def test_liked_and_disliked_answers_to_one_question_are_a_pair(tmp_path: Path) -> None:
    from soma.serve.calls import Call, Usage
    from soma.serve.requestlog.config import RequestLogConfig
    from soma.serve.requestlog.gate import RequestLog
    from soma.serve.requestlog.record import Record

    kept = RequestLog(RequestLogConfig(folder=tmp_path / "log"))
    said = {"a": ("good", "up"), "b": ("bad", "down"), "c": ("", "up"), "d": ("same", "up"), "e": ("aborted", "up")}
    for id_, (text, rating) in said.items():
        record = Record(Call("/v1/completions", "m", "::1", id=id_), is_sampled=True)
        question = "other" if id_ == "d" else "which?"
        record.asked(prompts=[question])
        record.said(0, text, "stop")
        kept.ended(record, Usage(outcome="abort" if id_ == "e" else "ok"))
        kept.feedback(None, {"request_id": id_, "choice": 0, "rating": rating})
    kept.close()
    made = export_feedback(tmp_path / "log", tmp_path / "out")
    user = [{"role": "user", "content": "which?"}]
    assert made.dpo == [{"prompt": user, "chosen": "good", "rejected": "bad"}]
    assert sorted(row["messages"][1]["content"] for row in made.sft) == ["good", "same"]
    assert made.left_out == {"messages[1].content: empty": 1,
                             "the request is not in the log, or did not end well": 1}  # fmt: skip
