"""`soma adapt`: what data is, its rows tell; the recipe follows."""

import json
from pathlib import Path

import pytest

from soma.adapt import adapt_recipe, data_kind
from soma.base.errors import UserError

ROWS = {
    "instruct": [{"instruction": f"say {n}", "output": "yes"} for n in range(4)],
    "preference": [{"prompt": f"say {n}", "chosen": "a", "rejected": "b"} for n in range(4)],
    "text": [{"text": f"some text number {n} that is long enough"} for n in range(4)],
}
BLOCKS = {
    "instruct": ("instruct", "tune"), "preference": ("preferences", "prefer"), "text": ("data", "train", "evaluate")
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_tell_what_is_done(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    assert data_kind(str(path)) == kind
    recipe = adapt_recipe("mine", "some/model", str(path), ["seed=3"])
    there = {name for name in ("data", "instruct", "preferences", "train", "tune", "prefer", "evaluate")
             if getattr(recipe, name) is not None}  # fmt: skip
    assert there == set(BLOCKS[kind])
    assert (recipe.base, recipe.seed, recipe.name) == ("some/model", 3, "mine")


def test_a_folder_of_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A note\n")
    assert data_kind(str(tmp_path)) == "text"


def test_overrides_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A note\n")
    with pytest.raises(UserError, match="did you mean `steps`"):
        adapt_recipe("mine", "some/model", str(tmp_path), ["train.stepz=3"])
