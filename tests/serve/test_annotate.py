"""`soma data annotate`: decisions that survive kill -9, the formats that come out, and the page in a real browser."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from browser import open_browser
from http_tools import call, post, wait_for
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.base.locks import lock
from soma.cli import app
from soma.data.annotation.files import read_records
from soma.serve.annotate.app import create_app, serve_annotate
from soma.serve.annotate.session import Decision, Session
from soma.serve.listener import base_url, listen

SMILE = "Anna 😀 met Bob in New York City."
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
ENTER, ESCAPE = "\ue007", "\ue00c"
SERVE = """
import json, sys
from pathlib import Path
from soma.serve.annotate.app import serve_annotate
from soma.serve.annotate.session import Session
given = json.loads(sys.argv[1])
session = Session(Path(given.pop("source")), Path(given.pop("out")), **given)
serve_annotate(session, port=0, ready=lambda url: print(url, flush=True))
"""


def write_texts(folder: Path, *rows: Any) -> Path:
    path = folder / "texts.jsonl"
    whole = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def served(source: Path, out: Path, work: str, **given: Any) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    options = json.dumps({"source": str(source), "out": str(out), "work": work, **given})
    process = subprocess.Popen([sys.executable, "-c", SERVE, options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def here(session: Session) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of the page, served by a thread, and what ends it."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(session), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join()
        listener.close()

    try:
        yield base_url(listener), stop
    finally:
        stop()


# --- The session ---


def test_decisions_of_every_work_in_both_formats(tmp_path: Path) -> None:
    spans = [{"start": 0, "end": 4, "label": "PER", "id": 0}, {"start": 11, "end": 14, "label": "PER", "id": 1}]
    ends = [{"start": span["start"], "end": span["end"], "label": "PER"} for span in spans]
    given: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "classification": (
            {"labels": ["a"]}, {"accept": ["a"], "options": [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}]},
            {"label": ["a"]},
        ),
        "multilabel": ({"labels": ["b", "a"]}, {"accept": ["b", "a"]}, {"label": ["b", "a"]}),
        "spans": (
            {"spans": [{**span, "id": None} for span in spans]},
            {"spans": [{key: span[key] for key in ("start", "end", "label")} for span in spans]},
            {"label": [[0, 4, "PER"], [11, 14, "PER"]]},
        ),
        "relations": (
            {"spans": spans, "relations": [{"head": 0, "child": 1, "label": "met"}]},
            {"relations": [{"head_span": ends[0], "child_span": ends[1], "label": "met"}]},
            {"relations": [{"from_id": 0, "to_id": 1, "type": "met"}]},
        ),
        "seq2seq": ({"targets": ["So war es."]}, {"user_input": "So war es."}, {"label": ["So war es."]}),
    }  # fmt: skip
    source = write_texts(tmp_path, {"text": SMILE, "meta": {"from": "x"}, "mine": 7})
    for work, (said, of_prodigy, of_doccano) in given.items():
        for form, expected in (("prodigy", of_prodigy), ("doccano", of_doccano)):
            out = tmp_path / f"{work}-{form}.jsonl"
            labels = ["a", "b"] if "labels" in said else ["PER"]
            session = Session(source, out, work, labels, ["met"], form=form, annotator="ann")  # type: ignore[arg-type]
            session.decide(0, Decision(answer="accept", **said))
            (row,) = rows_of(out)
            common = {"text": SMILE, "meta": {"from": "x"}, "mine": 7, "answer": "accept", "_annotator_id": "ann"}
            assert {**row, **common, **expected} == row, (work, form)
            (record,) = read_records(out, form, session.task)  # type: ignore[arg-type]
            assert record.content() == session.decisions[0].content()
            assert session.next() is None


def test_resume_after_a_torn_line_and_changes(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, "one", "same", "same", "four"), tmp_path / "out.jsonl"
    session = Session(source, out, "classification", ["a", "b"])
    for number in (2, 0):
        session.decide(number, Decision(answer="accept", labels=["a"]))
    assert session.next(2) == 3
    before = out.read_bytes()
    out.write_bytes(before + b'{"text": "four", "acc')  # killed in the middle of a line
    session = Session(source, out, "classification", ["a", "b"])
    assert out.read_bytes() == before
    assert list(session.decisions) == [2, 0]  # the second "same" is not the first
    session.decide(2, Decision(answer="reject"))
    assert [(row["text"], row["answer"]) for row in rows_of(out)] == [("one", "accept"), ("same", "reject")]
    assert session.undo() == 2
    assert [row["text"] for row in rows_of(out)] == ["one"]
    assert list(Session(source, out, "classification", ["a", "b"]).decisions) == [0]
    assert (session.undo(), session.undo()) == (0, None)


def test_what_the_file_proposes_and_its_other_fields_stay(tmp_path: Path) -> None:
    proposed = {"start": 0, "end": 4, "token_start": 0, "token_end": 0, "label": "PER", "score": 0.5}
    row = {"text": SMILE, "_input_hash": 5, "_task_hash": 6, "tokens": [{"id": 0}], "spans": [proposed]}
    source, out = write_texts(tmp_path, row), tmp_path / "out.jsonl"
    session = Session(source, out, "spans", ["PER", "LOC"])
    assert session.item(0)["spans"] == [{"start": 0, "end": 4, "label": "PER", "id": None}]
    kept = {"start": 0, "end": 4, "label": "PER"}
    session.decide(0, Decision(answer="accept", spans=[kept, {"start": 5, "end": 6, "label": "LOC"}]))  # type: ignore[list-item]
    (done,) = rows_of(out)
    assert done["spans"] == [proposed, {"start": 5, "end": 6, "label": "LOC"}]
    assert {key: done[key] for key in ("_input_hash", "_task_hash", "tokens")} == {
        "_input_hash": 5, "_task_hash": 6, "tokens": [{"id": 0}],
    }  # fmt: skip


def test_mistakes_are_said(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, "one", "two"), tmp_path / "out.jsonl"
    for work, labels, given, words in (
        ("classification", [], {}, "needs labels"), ("relations", ["a"], {}, "relation labels"),
        ("spans", ["a", "a"], {}, "each one once"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            Session(source, out, work, labels, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="take another"):
        Session(source, source, "classification", ["a"])
    with pytest.raises(UserError, match=r"appended to a \.jsonl"):
        Session(source, tmp_path / "out.csv", "classification", ["a"])
    session = Session(source, out, "classification", ["a", "b"])
    for decision in (Decision(answer="accept", labels=["c"]), Decision(answer="accept", labels=["a", "b"])):
        with pytest.raises(ValueError, match="expected classification"):
            session.decide(0, decision)
    far = Decision(answer="accept", spans=[{"start": 0, "end": 9, "label": "X"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="lies outside"):
        Session(source, out, "spans", ["X"]).decide(0, far)
    assert not out.exists()
    session.decide(0, Decision(answer="accept", labels=["a"]))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="other items than those"):
        Session(write_texts(other, "three"), out, "classification", ["a"])
    with lock(out.with_name(f".{out.name}.lock")), pytest.raises(UserError, match="one at a time"):
        serve_annotate(session, port=0)
    with pytest.raises(UserError, match="other machines could reach"):
        serve_annotate(session, "0.0.0.0", 0)
    bad = CliRunner().invoke(app, ["data", "annotate", str(source), "--out", str(out), "--work", "poetry"])
    assert isinstance(bad.exception, UserError)


# --- The listener ---


def test_kill_9_loses_no_answered_decision(tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, *map(str, range(8))), tmp_path / "out.jsonl"
    with served(source, out, "classification", labels=["a", "b"]) as (url, process):
        for number in range(5):
            status, body = post(url, f"/api/items/{number}", {"answer": "accept", "labels": ["ab"[number % 2]]})
            assert (status, body["decided"]) == (200, number + 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [row["accept"] for row in rows_of(out)] == [["a"], ["b"], ["a"], ["b"], ["a"]]
    with served(source, out, "classification", labels=["a", "b"]) as (url, _):
        status, _, body = call(url, "GET", "/api/session")
        assert (status, json.loads(body)["next"]) == (200, 5)
        # Other sites in the same browser, and names that are pointed here, do not get through.
        good = {"Content-Type": "application/json"}
        said = json.dumps({"answer": "accept", "labels": ["a"]})
        for headers, expected in (
            (good | {"Host": "evil.example"}, 403), (good | {"Origin": "http://evil.example"}, 403),
            ({"Content-Type": "text/plain"}, 415), (good | {"Origin": url}, 200),
        ):  # fmt: skip
            assert call(url, "POST", "/api/items/6", said, headers)[0] == expected
        assert post(url, "/api/items/7", {"answer": "maybe"})[0] == 422
        assert post(url, "/api/items/8", {"answer": "accept"})[0] == 404
        status, headers, _ = call(url, "GET", "/")
        assert "default-src 'none'" in {key.lower(): value for key, value in headers.items()}["content-security-policy"]
    assert len(rows_of(out)) == 6


# --- The page ---


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


def press(driver: Any, *keys: str) -> None:
    driver.find_element("css selector", "body").send_keys(*keys)


def mark(driver: Any, start: int, end: int) -> None:
    """Select code points of the shown text as a mouse would, across the page's own elements, and let go."""
    driver.execute_script(
        """const box = document.getElementById("text"), walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
        const place = wanted => { walk.currentNode = box; let passed = 0, node;
          while ((node = walk.nextNode())) { if (node.parentElement.closest(".tag")) continue;
            const points = Array.from(node.data);
            if (passed + points.length >= wanted) return [node, points.slice(0, wanted - passed).join("").length];
            passed += points.length; } };
        const range = document.createRange();
        range.setStart(...place(arguments[0])); range.setEnd(...place(arguments[1]));
        getSelection().removeAllRanges(); getSelection().addRange(range);
        document.dispatchEvent(new MouseEvent("mouseup", {bubbles: true}));""",
        start, end,
    )  # fmt: skip


def shown(driver: Any, selector: str) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )


def click(driver: Any, selector: str, number: int = 0) -> None:
    """Click at once: what is drawn anew between finding and clicking is no failure."""
    driver.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)


def opened(driver: Any, url: str, words: str) -> None:
    driver.get(url)
    assert wait_for(lambda: shown(driver, "#count") == [words]), shown(driver, "#error")


def decided(driver: Any, words: str) -> None:
    assert wait_for(lambda: shown(driver, "#count") == [words]), (shown(driver, "#count"), shown(driver, "#error"))


def problems(driver: Any) -> list[str]:
    return [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"]


def fits(driver: Any) -> bool:
    return bool(driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.page
def test_page_classifies_with_keys_and_undoes(page: Any, tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, HOSTILE, "two", "three"), tmp_path / "out.jsonl"
    with here(Session(source, out, "classification", ["good", HOSTILE])) as (url, stop):
        opened(page, url, "0 of 3")
        assert shown(page, "#text") == [HOSTILE]
        assert page.title == "texts.jsonl"
        press(page, "2")
        decided(page, "1 of 3")
        press(page, "1")
        decided(page, "2 of 3")
        press(page, "u")
        decided(page, "1 of 3")
        assert shown(page, "#text") == ["two"]
        press(page, "s")
        decided(page, "2 of 3")
        press(page, "x")
        decided(page, "3 of 3")
        assert page.find_element("id", "done").is_displayed()
        press(page, "[")
        assert wait_for(lambda: shown(page, "#state") == ["#3 rejected"])
        assert [(row["accept"], row["answer"]) for row in rows_of(out)] == [
            ([HOSTILE], "accept"), ([], "ignore"), ([], "reject"),
        ]  # fmt: skip
        assert page.title == "texts.jsonl"
        assert problems(page) == []
        stop()
        press(page, "1")  # the server is gone: it says so and keeps what is there
        assert wait_for(lambda: page.find_element("id", "error").is_displayed())
        assert "does not answer" in shown(page, "#error")[0]
        assert all("ERR_CONNECTION_REFUSED" in message for message in problems(page))


@pytest.mark.page
def test_page_marks_spans_over_emoji_and_over_each_other(page: Any, tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, SMILE), tmp_path / "out.jsonl"
    with here(Session(source, out, "spans", ["PER", "LOC", HOSTILE], form="doccano")) as (url, _):
        opened(page, url, "0 of 1")
        mark(page, 11, 15)  # "Bob ": the space is not taken
        assert wait_for(lambda: shown(page, ".tag span") == ["PER"])
        press(page, "2")
        mark(page, 18, 26)
        assert wait_for(lambda: len(shown(page, ".tag")) == 2)
        mark(page, 18, 31)  # over the first one, its chip in between
        assert wait_for(lambda: len(shown(page, ".tag")) == 3)
        press(page, "3")
        mark(page, 5, 6)
        assert wait_for(lambda: len(shown(page, ".tag")) == 4)
        press(page, "u")
        assert wait_for(lambda: len(shown(page, ".tag")) == 3)
        press(page, "\ue014", "\ue014", "1")  # two times right: the word after the first, then its label
        assert wait_for(lambda: len(shown(page, ".tag")) == 4)
        assert "".join(shown(page, ".seg")) == SMILE
        press(page, ENTER)
        decided(page, "1 of 1")
        (row,) = rows_of(out)
        spans = [(SMILE[start:end], label) for start, end, label in row["label"]]
        assert sorted(spans) == sorted([("Bob", "PER"), ("New York", "LOC"), ("New York City", "LOC"), ("😀", "PER")])
        assert problems(page) == []


@pytest.mark.page
def test_page_links_spans(page: Any, tmp_path: Path) -> None:
    row = {"text": SMILE, "spans": [{"start": 0, "end": 4, "label": "PER"}, {"start": 11, "end": 14, "label": "PER"}]}
    source, out = write_texts(tmp_path, row, "next"), tmp_path / "out.jsonl"
    with here(Session(source, out, "relations", ["PER"], ["met", "knows"])) as (url, _):
        opened(page, url, "0 of 2")
        click(page, "#relation-labels .label", 1)
        click(page, ".tag", 0)
        assert shown(page, ".tag.head span") == ["PER"]
        click(page, ".tag", 1)
        assert shown(page, "#relations li") == ["Annaknows →Bob×"]
        click(page, ".tag button")  # a span takes its relations along
        assert shown(page, "#relations li") == []
        press(page, "u")
        assert wait_for(lambda: shown(page, "#relations li") == ["Annaknows →Bob×"])
        press(page, ENTER)
        decided(page, "1 of 2")
        (record,) = read_records(out)
        ends = {span.id: span.start for span in record.spans}
        assert [(ends[one.head], one.label, ends[one.child]) for one in record.relations] == [(0, "knows", 11)]
        assert problems(page) == []


@pytest.mark.page
def test_page_writes_texts_on_a_narrow_screen(page: Any, tmp_path: Path) -> None:
    source, out = write_texts(tmp_path, "hello " * 60, "bye"), tmp_path / "out.jsonl"
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    with here(Session(source, out, "seq2seq")) as (url, _):
        opened(page, url, "0 of 2")
        assert wait_for(lambda: shown(page, "textarea") == [""])
        assert fits(page)
        assert page.find_element("id", "accept").is_displayed()
        page.find_element("css selector", "textarea").send_keys("hallo 1 x s u")  # letters are text here, no commands
        click(page, "#accept")
        decided(page, "1 of 2")
        assert rows_of(out)[0]["user_input"] == "hallo 1 x s u"
        click(page, "#helper")
        assert page.find_element("id", "help").is_displayed()
        assert fits(page)
        assert problems(page) == []
