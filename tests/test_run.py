"""The runner where what it keeps was touched by other hands."""

from pathlib import Path

import pytest

from soma import cli
from soma.base.errors import UserError
from soma.recipe import Recipe
from soma.run import run


def test_a_damaged_input_is_named(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(12):
        (docs / f"{number}.md").write_text(f"# {number}\n\n" + f"Document {number} says {number * number}. " * 40)

    def recipe(size: int) -> Recipe:
        values = {
            "name": "r", "data": {"sources": str(docs), "min_documents": 1}, "tokenizer": {"vocab_size": size},
            "tracking": {"enabled": False},
        }  # fmt: skip
        return Recipe.model_validate(values)

    done = run(recipe(300), tmp_path / "runs")
    (shard,) = done.artefacts["corpus"].glob("train-*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"corpus-\w+ was changed after it was made: remove that folder"):
        run(recipe(310), tmp_path / "runs")
    shard.write_bytes(whole)
    assert run(recipe(310), tmp_path / "runs").record["status"] == "finished"


def test_a_layout_that_does_not_fit_is_said_before_anything_is_made(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(4):
        (docs / f"{number}.md").write_text(f"# {number}\n\n" + f"Document {number} says {number * number}. " * 40)
    recipe = Recipe.model_validate({
        "name": "r", "data": {"sources": str(docs), "min_documents": 1}, "tokenizer": {"vocab_size": 300},
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        "train": {"layout": {"tp": 2}}, "tracking": {"enabled": False},
    })  # fmt: skip
    with pytest.raises(UserError, match=r"^train: layout: .*take tp 1, or start 2 ranks with torchrun"):
        run(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert "corpus" in run(recipe, tmp_path / "runs", last="corpus").artefacts  # no training is asked for


def test_ctrl_c_says_that_the_work_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.schedules, "show_list", interrupted)
    monkeypatch.setattr("sys.argv", ["soma", "schedule", "--list"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "soma: interrupted; the same command goes on from here\n"
