"""Offline batches: right answers, bad rows by number, and an interrupted run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from adapter_folders import greedy_alone, make_adapter
from typer.testing import CliRunner

from soma.base import progress
from soma.base.errors import UserError
from soma.cli import app
from soma.engine import load, offline
from soma.engine.engine import Engine
from soma.engine.offline import Summary, generate_file
from soma.engine.params import SamplingParams
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import QuantizedLinear
from soma.model.tokenizer import Tokenizer

PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=12)
MESSAGES = [{"role": "user", "content": "hello"}]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"hello {number}"}) + "\n" for number in range(count)))
    return path


@pytest.fixture
def batch(make_engine: Callable[..., Engine], tokenizer: Tokenizer) -> Callable[..., Summary]:
    engine = make_engine(max_running=4, max_waiting=4)

    def run(source: Path, out: Path, params: SamplingParams = PARAMS, identity: str = "") -> Summary:
        return generate_file(engine, tokenizer, source, out, params, encode, identity)

    return run


def test_answers_are_those_of_the_engine(
    batch: Callable[..., Summary], make_engine: Callable[..., Engine], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(write_rows(tmp_path / "in.jsonl", 21), out).rows == 21
    engine = make_engine()
    for number, row in enumerate(rows_of(out), start=1):
        ids = tokenizer.encode(f"hello {number - 1}")
        done = engine.generate(ids, replace(PARAMS, seed=5 + number))
        assert row == {
            "row": number, "text": done.text, "finish_reason": done.finish_reason, "prompt_tokens": len(ids),
            "completion_tokens": len(done.ids), "error": None,
        }  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [tmp_path / "in.jsonl", out]


def test_with_an_adapter(tiny_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = make_adapter(tiny_folder, tmp_path / "adapter", LoRAConfig(r=4), 1)
    source = write_rows(tmp_path / "in.jsonl", 3)
    command = [sys.executable, "-m", "soma.cli", "generate", str(tiny_folder), str(source), "--max-tokens", "6",
               "--adapter", str(folder)]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    for number, row in enumerate(rows_of(tmp_path / "in.answers.jsonl")):
        prompt = tokenizer.encode(f"hello {number}")
        ids = greedy_alone(tiny_folder, folder, prompt, 6)
        assert row["text"] == tokenizer.decode(ids) != tokenizer.decode(greedy_alone(tiny_folder, None, prompt, 6))


@pytest.mark.parametrize("options", [["--speculate", "ngram", "--draft-tokens", "3"], ["--weights", "int8"]])
def test_options_of_the_engine(
    tiny_folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """From the command line to the engine, and the answers are those of such an engine; guesses change none."""
    made: list[Engine] = []
    real = load.load_engine

    def remember(*given: Any, **more: Any) -> Any:
        made.append((loaded := real(*given, **more))[0])
        return loaded

    monkeypatch.setattr(load, "load_engine", remember)
    source = write_rows(tmp_path / "in.jsonl", 3)
    command = ["generate", str(tiny_folder), str(source), "--precision", "fp32", "--max-tokens", "40", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (engine,) = made
    if "--speculate" in options:
        assert engine.speculator is not None
        assert engine.speculator.most == 3
    weights = "int8" if "--weights" in options else None
    assert any(isinstance(module, QuantizedLinear) for module in engine.runner.model.modules()) == bool(weights)
    plain, _, _ = real(tiny_folder, precision="fp32", weights=weights)
    for number, row in enumerate(rows_of(tmp_path / "in.answers.jsonl")):
        prompt = tokenizer.encode(f"hello {number}")
        assert row["text"] == plain.generate(prompt, SamplingParams(temperature=0, max_tokens=40)).text
    plain.close()


def test_bad_rows_are_reported_and_stop_nobody(batch: Callable[..., Summary], tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": "hello"}), "{nonsense", "", json.dumps({"text": "x"}), json.dumps({"prompt": 5}),
        json.dumps({"messages": MESSAGES}), json.dumps({"messages": [{"role": "user"}]}), "[1]",
        json.dumps({"prompt": "x" * 9000}), json.dumps({"prompt": "a", "messages": MESSAGES}),
        json.dumps({"prompt": ""}), json.dumps({"messages": "[half"}), json.dumps({"messages": json.dumps(MESSAGES)}),
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    heard: list[str] = []

    class Ear(progress.Reporter):
        def note(self, text: str) -> None:
            heard.append(text)

    with progress.use(Ear()):
        summary = batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(temperature=0, max_tokens=5))
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == list(range(1, 13))
    assert [row["row"] for row in rows if row["error"] is None] == [1, 5, 12]
    assert rows[4]["text"] == rows[11]["text"] != rows[0]["text"]
    words = {
        2: "JSON", 3: "prompt or messages", 4: "must be text", 6: "role and content", 7: "object", 8: "context",
        9: "either", 10: "no tokens", 11: "JSON",
    }  # fmt: skip
    assert set(summary.failed) == set(words)
    for number, word in words.items():
        assert word in summary.failed[number]
    assert heard[-1].startswith("9 of 12 rows could not be answered: 2, 3, 4, 6, 7, 8, 9, 10, 11 (row 2: not valid")


def test_parquet(batch: Callable[..., Summary], tmp_path: Path) -> None:
    table = pa.table({"prompt": ["hello 0", None, "hello 2"], "messages": [None, MESSAGES, None]})
    pq.write_table(table, tmp_path / "in.parquet")
    batch(tmp_path / "in.parquet", tmp_path / "out.parquet")
    write_rows(tmp_path / "in.jsonl", 3)
    batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    made, lines = pq.read_table(tmp_path / "out.parquet").to_pylist(), rows_of(tmp_path / "out.jsonl")
    assert tuple(made[0]) == offline.COLUMNS
    assert (made[0], made[2]) == (lines[0], lines[2])
    assert made[1]["completion_tokens"] > 0
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="not a Parquet file"):
        batch(tmp_path / "broken.parquet", tmp_path / "other.jsonl")


def test_an_interrupted_run_goes_on(
    batch: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is that of a run that was not interrupted, and no row is made twice."""
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    batch(source, tmp_path / "whole.jsonl")
    run_rows, made = offline.run_rows, []

    def counted(*given: Any) -> Any:
        for row in run_rows(*given):
            made.append(row["row"])
            yield row
            if len(made) == 7:
                raise KeyboardInterrupt

    monkeypatch.setattr(offline, "run_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        batch(source, out)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"row": 19, "te')  # the power went here
    with pytest.raises(UserError, match="another input, model or settings"):
        batch(source, out, replace(PARAMS, max_tokens=5))
    with pytest.raises(UserError, match="another input, model or settings"):
        batch(source, out, identity="another model")
    summary = batch(source, out)
    assert (summary.rows, summary.reused) == (20, 7)
    assert sorted(made) == list(range(1, 21))
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()
    with pytest.raises(UserError, match="is there already"):
        batch(source, out)


def test_what_is_wrong_with_the_files(batch: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.jsonl or \.parquet"):
        batch(tmp_path / "in.csv", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"ends in \.jsonl or \.parquet"):
        batch(tmp_path / "in.jsonl", tmp_path / "out.txt")
    with pytest.raises(UserError, match="no such file"):
        batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "in.jsonl").write_text("")
    assert batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").rows == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_the_command_killed_and_run_again(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "in.answers.jsonl"
    partial = out.with_name(out.name + ".partial")
    command = [sys.executable, "-m", "soma.cli", "generate", str(tiny_folder), str(source), "--max-tokens", "300",
               "--max-running", "2"]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not out.exists()
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=True)
    assert "going on after" in again.stderr
    assert "60 answers" in again.stderr
    assert [row["row"] for row in rows_of(out)] == list(range(1, 61))
