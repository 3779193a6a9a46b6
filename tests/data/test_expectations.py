"""Expectations in a recipe: mistakes are named, what holds is written, what does not stops the run."""

import json
from pathlib import Path

import pytest

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.data.config import DataConfig
from soma.data.expect import ATTRIBUTES, read_expectations
from soma.data.profile.scan import ALL_SIGNALS
from soma.data.signals.measure import Measurer
from soma.recipe import load
from soma.run import run


def write_docs(folder: Path) -> Path:
    folder.mkdir()
    for number in range(30):
        text = f"The report number {number} says that the bridge over the river was closed for {number * 7} days. "
        (folder / f"{number:02d}.md").write_text(text * (3 + number % 5))
    french = "Le pont de la rivière est fermé depuis plusieurs jours et les habitants de la ville attendent. "
    for number in range(6):
        (folder / f"fr{number}.md").write_text(french * (2 + number) + str(number) * 40)
    (folder / "copy.md").write_text((folder / "03.md").read_text())
    return folder


def write_recipe(tmp_path: Path, expect: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: r\ntracking: {{enabled: false}}\ntokenizer: {{vocab_size: 300}}\ndata:\n  sources: {tmp_path}/docs\n"
        f"  min_documents: 1\n  dedup: {{near: false}}\n  expect:\n{expect}"
    )
    return path


def test_names_are_checked_as_other_mistakes_of_a_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "    mean_lenght: [1, 2]\n")
    with pytest.raises(UserError, match=r"recipe.yaml:8: data.expect: `mean_lenght` is no figure.*`mean_length`"):
        load(path)
    for block, hint in (
        ({"language.en": [0, 1]}, "`languages.en`"),
        ({"attributes": {"wrds": {"mean": [0, 1]}}}, "`attributes.words.mean`"),
        ({"duplicates": 0.1}, "expected .least, most., null for an open side, got 0.1"),
        ({"duplicates": [0.2, 0.1]}, "the least .0.2. is above the most .0.1."),
        ({"duplicates": [None, None]}, "expected .least"),
        ({"duplicates": [True, 1]}, "expected .least"),
        ([1], "expected names with bounds"),
    ):
        with pytest.raises(ValueError, match=hint):
            read_expectations(block)
    assert read_expectations({"languages": {"en": [0.9, None]}, "words": [1, 2]}) == {
        "languages.en": (0.9, None), "words": (1.0, 2.0),
    }  # fmt: skip


def test_attributes_that_can_be_expected_are_those_that_are_measured() -> None:
    for signal in ALL_SIGNALS:
        measured = Measurer([signal]).measure(["A short text."])
        assert set(measured) - {"language"} == set(ATTRIBUTES[signal])


def test_expectations_do_not_change_the_corpus() -> None:
    plain, bounded = (DataConfig(sources=["a"], expect=bounds) for bounds in ({}, {"words": [1, 2]}))
    assert plain.content() == bounded.content()


def test_what_holds_is_written_and_shown_and_what_does_not_stops_the_run(tmp_path: Path) -> None:
    write_docs(tmp_path / "docs")
    good = (
        "    mean_length: [200, 800]\n    duplicates: [0, 0.03]\n    languages.en: [0.8, 0.9]\n"
        "    documents: [36, 36]\n    attributes: {words: {p50: [20, null]}}\n    characters: {digits: [null, 0.1]}\n"
        "    validation: [0.001, 0.3]\n    dropped: [0.02, 0.03]\n    anomalies: [0, 0.5]\n    kinds.markdown: [1, 1]\n"
        "    words: [100, 10000]\n    bytes: [1, null]\n    near_duplicates: [0, 0]\n    dominant_file: [0, 0.1]\n"
    )
    done = run(load(write_recipe(tmp_path, good)), tmp_path / "runs")
    rows = {row["name"]: row for row in read_json(done.artefacts["expect"] / "expectations.json")["expectations"]}
    assert len(rows) == 14
    assert all(row["met"] for row in rows.values())
    assert rows["duplicates"]["value"] == pytest.approx(1 / 37)
    assert rows["languages.en"]["value"] == pytest.approx(30 / 36)
    page = (tmp_path / "runs" / "r" / "report.html").read_text()
    assert "Expectations" in page
    assert "languages.en" in page
    bad = good.replace("[0.8, 0.9]", "[0.95, 1]").replace("[200, 800]", "[20, 100]").replace("[0, 0.03]", "[0, 0.01]")
    with pytest.raises(UserError) as caught:
        run(load(write_recipe(tmp_path, bad)), tmp_path / "runs")
    message = str(caught.value)
    assert "3 of 14 expectations are not met" in message
    assert "languages.en is 0.8333, expected 0.95 to 1" in message
    assert "(fr): Le pont" in message
    assert "mean_length is" in message
    assert "exact_duplicate same as" in message
    status = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert status["status"] != "finished"
    assert [stage["stage"] for stage in status["stages"]] == ["corpus"]
    again = run(load(write_recipe(tmp_path, good)), tmp_path / "runs")
    assert {stage["stage"]: stage["cached"] for stage in again.record["stages"]}["corpus"]
