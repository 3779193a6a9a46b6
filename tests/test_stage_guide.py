"""docs/stages.md is followed to the letter: its code makes a stage that the runner makes, caches and records."""

import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from soma.base.artefact import read_json
from soma.run import Planned, make

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def guide() -> dict[str, Any]:
    """The names that the guide's Python blocks define."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "stages.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/stages.md", "exec"), names)
    return names


def test_the_guides_stage_runs(guide: dict[str, Any], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b a b", "c b a"]}), corpus / "train-00000.parquet")
    stage = guide["words_stage"](guide["WordsConfig"](top=2))
    identity = {"stage": stage.name, "format": 1, "config": stage.config, "outside": "", "inputs": {"corpus": "x"}}
    item = Planned(stage, identity, tmp_path / "store" / "words-0")
    make(item, {"corpus": corpus}, tmp_path, tracking=None)  # type: ignore[arg-type]
    assert read_json(item.path / "words.json") == {"b": 3, "a": 2}
    assert read_json(item.path / "run.json")["config"] == {"top": 2}
    assert stage.metrics(item.path) == {"words_kept": 2}
    assert not item.work.exists()


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
