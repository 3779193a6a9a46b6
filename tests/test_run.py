"""The runner where what it keeps was touched by other hands."""

from pathlib import Path

import pytest

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
