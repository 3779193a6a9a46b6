"""Agreement: published worked examples, plain definitions on random judgements, files of annotators."""

import json
import math
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.annotation.agreement import agreement, align, cohen_kappa, krippendorff_alpha, span_f1
from soma.data.annotation.record import Record, Span

# Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level: Any, alpha: float) -> None:
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_the_binary_example() -> None:
    """The same paper, section A: two observers, ten articles, alpha 0.095."""
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([first, second]) == pytest.approx(0.095, abs=5e-4)


def test_kappa_of_published_examples() -> None:
    """Fleiss, Levin and Paik (2003), table 18.1: kappa 0.68 of 100 diagnoses; for neurosis alone 0.50."""
    table = [[75, 1, 4], [5, 4, 1], [0, 0, 10]]
    first = [a for a in range(3) for b in range(3) for _ in range(table[a][b])]
    second = [b for a in range(3) for b in range(3) for _ in range(table[a][b])]
    assert cohen_kappa(first, second) == pytest.approx(0.68, abs=5e-3)
    assert cohen_kappa([a == 1 for a in first], [b == 1 for b in second]) == pytest.approx(0.50, abs=5e-3)
    yes_no = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    assert cohen_kappa([a for a, _ in yes_no], [b for _, b in yes_no]) == pytest.approx(0.4)


def plain_alpha(annotators: list[list[Any]], level: str) -> float:
    """1 - D_o / D_e by the definition: over ordered pairs within units, and over all ordered pairs of values."""
    units = [[v for v in column if v is not None] for column in zip(*annotators, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    values = [v for unit in units for v in unit]
    counts = {v: values.count(v) for v in values}

    def difference(a: Any, b: Any) -> float:
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float(a - b) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(count for v, count in counts.items() if low <= v <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    observed = sum(sum(difference(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(difference(a, b) for a, b in permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_its_definition(level: Any, seed: int) -> None:
    generator = random.Random(seed)
    rows = [[generator.choice([1, 2, 3, 5, 8, None]) for _ in range(15)] for _ in range(4)]
    assert krippendorff_alpha(rows, level) == pytest.approx(plain_alpha(rows, level), abs=1e-12)


def test_figures_without_a_value() -> None:
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    assert math.isnan(cohen_kappa([None], [1]))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert krippendorff_alpha([[1, 2, 1, 2], [1, 2, 1, 2]]) == 1
    assert krippendorff_alpha([[1, 2] * 50, [2, 1] * 50]) < -0.9  # worse than chance


def judged(text: str, labels: list[str], answer: Any = "accept") -> Record:
    return Record(text=text, labels=labels, answer=answer)


def test_report_by_label_and_pair_and_the_disputed_first() -> None:
    texts = ["one", "two", "three", "four"]
    said = {
        "ann": [["A"], ["A"], ["B"], ["B"]], "bob": [["A"], ["B"], ["B"], ["B", "A"]],
        "cid": [["A"], ["B"], ["A"], None],
    }  # fmt: skip
    files = {
        name: [
            judged(text, own or [], "ignore" if own is None else "accept")
            for text, own in zip(texts, all_, strict=True)
        ]
        for name, all_ in said.items()
    }
    report = agreement(align(files))
    assert report["part"] == "labels"
    assert report["annotators"] == {"ann": 4, "bob": 4, "cid": 3}
    assert [pair["pair"] for pair in report["pairs"]] == [["ann", "bob"], ["ann", "cid"], ["bob", "cid"]]
    assert report["pairs"][0]["labels"]["A"]["kappa"] == cohen_kappa([1, 1, 0, 0], [1, 0, 0, 1])
    assert report["labels"]["A"]["alpha"] == krippendorff_alpha([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 1, None]])
    assert [(one["text"], round(one["disagreement"], 2)) for one in report["adjudicate"]] == [
        ("four", 1.0), ("two", 0.67), ("three", 0.67),
    ]  # fmt: skip
    assert report["adjudicate"][0]["answers"] == {"ann": ["B"], "bob": ["A", "B"]}


def test_refused_and_passed_over_items() -> None:
    one = [judged("a", ["INSULT"]), judged("b", ["INSULT"], "reject"), judged("c", ["INSULT"], "ignore")]
    two = [judged("a", ["INSULT"]), judged("b", ["INSULT"]), judged("c", ["INSULT"])]
    report = agreement(align({"one": one, "two": two}))
    assert report["pairs"][0]["items"] == 2
    assert [entry["text"] for entry in report["adjudicate"]] == ["b"]


def test_spans_agree_by_code_point_and_exactly() -> None:
    text = "New York City"
    ann = [Record(text=text, spans=[Span(start=0, end=8, label="LOC")], answer="accept")]
    bob = [Record(text=text, spans=[Span(start=0, end=13, label="LOC")], answer="accept")]
    report = agreement(align({"ann": ann, "bob": bob}))
    assert report["part"] == "spans"
    assert report["pairs"][0]["f1"] == 0
    inside = [[True] * 8 + [False] * 5, [True] * 13]
    assert report["labels"]["LOC"]["alpha"] == krippendorff_alpha(inside)
    ann[0].spans.append(Span(start=0, end=13, label="LOC"))
    assert span_f1(ann, bob) == pytest.approx(2 / 3)


def test_levels_need_numbers() -> None:
    files = {"ann": [judged("a", ["1"]), judged("b", ["5"])], "bob": [judged("a", ["2"]), judged("b", ["5"])]}
    report = agreement(align(files), "interval")
    assert report["alpha"] == krippendorff_alpha([[1, 5], [2, 5]], "interval")
    assert report["adjudicate"][0]["disagreement"] == 0.25
    files["ann"][0].labels = ["good"]
    with pytest.raises(UserError, match="'good' is no number"):
        agreement(align(files), "ordinal")


def test_the_command(tmp_path: Path) -> None:
    rows = [[["a"], ["b"], ["b"]], [["a"], ["a"], ["b"]]]
    paths = [tmp_path / "ann.jsonl", tmp_path / "bob.jsonl"]
    for path, labels in zip(paths, rows, strict=True):
        path.write_text(
            "".join(json.dumps({"id": at, "text": f"t{at}", "label": own}) + "\n" for at, own in enumerate(labels))
        )
    out, again = tmp_path / "report.json", tmp_path / "again.jsonl"
    command = ["data", "agreement", *map(str, paths), "--out", str(out), "--adjudicate", str(again)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "kappa  0.400" in result.output
    assert "1 of 3 items are disputed" in result.output
    assert json.loads(out.read_text())["pairs"][0]["kappa"] == pytest.approx(0.4)
    assert json.loads(again.read_text()) == {
        "text": "t1", "meta": {"disagreement": 1.0, "ann.jsonl": ["b"], "bob.jsonl": ["a"]},
    }  # fmt: skip
    with pytest.raises(UserError, match="two annotators"):
        align({"ann": [judged("a", [])]})
    with pytest.raises(UserError, match="no item was judged by two"):
        align({"ann": [judged("a", [])], "bob": [judged("b", [])]})
    both = [Record(text="a", extra={"_annotator_id": who, "_input_hash": 1}) for who in ("x", "y")]
    assert list(align({"file": both})) == ["x", "y"]
