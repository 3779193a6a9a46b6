"""The README's commands, with a recipe that extends the quickstart and trains for 20 steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOMA = [sys.executable, "-m", "soma.cli"]
SMALL = {
    "train": {"max_seconds": 20, "steps": 20, "compile": False, "evaluate_every": 0},
    "tune": {"max_seconds": 8, "steps": 4, "compile": False},
    "evaluate": {"max_bytes": 20000},
    "probe": {"max_tokens": 16},
}


def soma(folder: Path, *arguments: str, status: int = 0, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "SOMA_"))}
    done = subprocess.run(
        [*SOMA, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == status, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small quickstart has run once."""
    folder = tmp_path_factory.mktemp("quickstart")
    recipe = {"extends": str(ROOT / "recipes" / "quickstart.yaml"), **SMALL}
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    done = soma(folder, "run", "small.yaml")
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_what_it_leaves(quickstart: Path) -> None:
    run = quickstart / "runs" / "quickstart"
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    names = [entry["stage"] for entry in record["stages"]]
    assert names == [
        "corpus", "tokenizer", "tokens", "train", "instruct", "instruct_tokens", "tune", "evaluate", "evaluate_tuned",
        "probe",
    ]  # fmt: skip
    assert max(entry["peak_memory_bytes"] for entry in record["stages"]) < 4 * 2**30
    assert record["registered"] == "quickstart@1"
    probe = json.loads((run / "probe" / "logs" / "probe.json").read_text())
    assert probe["succeeded"] == len(probe["requests"]) > 0
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert 0 < scores["bits_per_byte"]["value"] < 8
    assert scores["baselines"]["xz"]["bits_per_byte"] > 0
    assert scores["parameters"] <= 5_000_000


def test_what_it_says(quickstart: Path) -> None:
    said = (quickstart / "said.txt").read_text()
    assert "runs/quickstart/report.html" in said
    assert "soma chat runs/quickstart/tune/model" in said
    assert "soma serve runs/quickstart/tune/model" in said
    python = ".".join(map(str, sys.version_info[:3]))
    for line in said.splitlines():
        if "bits per byte" in line:
            assert f"Python {python}" in line
            assert re.search(r"corpus [0-9a-f]{12}", line)


def test_report_is_whole_and_offline(quickstart: Path) -> None:
    page = (quickstart / "runs" / "quickstart" / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "<svg" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_a_second_run_does_nothing_twice(quickstart: Path) -> None:
    explained = soma(quickstart, "run", "small.yaml", "--explain", "--json")
    assert all(json.loads(line)["cached"] for line in explained.stdout.splitlines())
    changed = soma(quickstart, "run", "small.yaml", "--set", "tune.learning_rate=0.01", "--explain")
    assert "tune.learning_rate: 0.001 → 0.01" in changed.stdout
    states = {line.split()[0]: line.split()[1] for line in changed.stdout.splitlines() if not line.startswith(" ")}
    assert (states["train"], states["tune"]) == ("cached", "runs")
    assert (states["evaluate"], states["probe"]) == ("cached", "runs")


def test_model_opens_in_transformers(quickstart: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = quickstart / "runs" / "quickstart" / "tune" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = transformers.AutoTokenizer.from_pretrained(folder)
    text = names.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    ids = names(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert model(ids).logits.shape[-1] == model.config.vocab_size


def test_commands_after_it(quickstart: Path) -> None:
    listed = json.loads(soma(quickstart, "runs", "list", "--json").stdout)
    assert [run["name"] for run in listed] == ["quickstart"]
    chat = subprocess.run(
        [*SOMA, "chat", "registry:quickstart@1", "--max-tokens", "8"], cwd=quickstart, input="Say hi.\n", text=True,
        capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr


def test_adapt_to_pairs(quickstart: Path) -> None:
    rows = [{"instruction": f"Say the number {n}.", "output": f"The number is {n}."} for n in range(60)]
    (quickstart / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    soma(
        quickstart, "adapt", "runs/quickstart/train/model", "pairs.jsonl", "--set", "tune.steps=4", "--set",
        "tune.sequence_length=128", "--set", "tune.compile=false", "--name", "numbers",
    )  # fmt: skip
    assert (quickstart / "runs" / "numbers" / "tune" / "model" / "config.json").exists()


def test_adapt_to_text(quickstart: Path) -> None:
    docs = quickstart / "my_docs"
    docs.mkdir()
    for number in range(30):
        (docs / f"{number}.md").write_text("\n\n".join(f"# Part {part}\n\nText {number * part}." for part in range(40)))
    soma(
        quickstart, "adapt", "registry:quickstart", "my_docs", "--set", "train.steps=3", "--set",
        "train.sequence_length=128", "--set", "train.compile=false",
    )  # fmt: skip
    scores = json.loads((quickstart / "runs" / "adapt" / "evaluate" / "scores.json").read_text())
    assert scores["bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nothing.yaml"], "no such recipe"),
        (["run", "small.yaml", "--from", "tokens2"], "no such stage"),
        (["run", "small.yaml", "--from", "tune", "--to", "train"], "comes after"),
        (["run", "small.yaml", "--set", "data.sources=./nowhere"], "nowhere"),
        (["chat", "runs/nothing"], "runs/nothing"),
        (["run", "small.yaml", "--runs", "small.yaml"], "small.yaml"),
        (["adapt", "runs/quickstart/train/model", "nowhere.jsonl"], "nowhere.jsonl"),
        (["runs", "compare", "quickstart", "quickstrat"], "did you mean"),
    ],
)
def test_mistakes_on_the_command_line(quickstart: Path, arguments: list[str], expected: str) -> None:
    done = soma(quickstart, *arguments, status=2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    helped = soma(ROOT, "--help").stdout
    commands = set(re.findall(r"\.venv/bin/soma (\w+)", readme))
    assert commands
    for command in commands:
        assert command in helped
    assert "make quickstart" in readme
    assert "make test" in readme


def test_doctor() -> None:
    report = json.loads(soma(ROOT, "doctor", "--json").stdout)
    assert report
