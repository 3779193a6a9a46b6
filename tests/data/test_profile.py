"""The profile of a corpus: sketches against exact figures, schema, duplicates, the card, the page."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus
from soma.data.profile import schema as types
from soma.data.profile.page import cumulative, render
from soma.data.profile.report import data_report
from soma.data.profile.scan import Options, domain_of
from soma.data.profile.sketch import ACCURACY, EXACT, Categories, Numbers, Sample
from soma.data.profile.summary import number_figures

QUICK = Options(signals=("gopher_quality", "language"))
SUBJECTS = [
    "rivers",
    "mountains",
    "engines",
    "letters",
    "gardens",
    "planets",
    "markets",
    "bridges",
    "poems",
    "winters",
    "sailors",
    "teachers",
]
VERBS = ["carry", "describe", "remember", "change", "follow", "reach", "support", "explain", "surprise", "outlive"]
ENDS = ["in the north of the country", "after many years of work", "without any help at all", "to the end of the road"]


def prose(seed: int, sentences: int = 12) -> str:
    """English-looking text that is another for every seed."""
    pick = random.Random(seed)
    lines = []
    for number in range(sentences):
        words = f"{pick.choice(SUBJECTS)} that {pick.choice(VERBS)} {pick.choice(SUBJECTS)} {pick.choice(ENDS)}"
        lines.append(f"The {words}, with {pick.randint(2, 9999)} of them in case {seed}.{number}.")
    return " ".join(lines)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- Sketches ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 7))
def test_numbers_of_parts_are_those_of_the_whole(values: list[float], parts: int) -> None:
    whole = Numbers()
    for part in range(parts):
        piece = Numbers()
        piece.add(values[part::parts])
        whole.merge(piece)
    assert whole.count == len(values)
    assert whole.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    if len(values) > 1:
        assert whole.std == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-3)
    shares = [0.01, 0.25, 0.5, 0.9, 1.0]
    assert whole.quantile(shares) == np.quantile(values, shares, method="inverted_cdf").tolist()


def test_quantiles_of_many_values_are_within_the_stated_error_in_any_order() -> None:
    generator = np.random.default_rng(1)
    values = np.concatenate([generator.lognormal(3, 2, 20_000), -generator.lognormal(1, 1, 5_000), np.zeros(500)])
    sketches = []
    for order in range(2):
        total = Numbers()
        for piece in np.array_split(generator.permutation(values), 7 + 30 * order):
            total.add(piece)
        sketches.append(total)
    assert len(np.unique(values)) > EXACT
    assert sketches[0].bins == sketches[1].bins
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert sketches[0].quantile([share])[0] == pytest.approx(exact, rel=1.01 * ACCURACY, abs=1e-9)
    coarse = np.histogram(values, 20)  # negative control: twenty equal bins are far off at the median
    assert abs(coarse[1][np.searchsorted(np.cumsum(coarse[0]), len(values) / 2)] - np.median(values)) > 1


def test_not_finite_values_are_counted_apart() -> None:
    numbers = Numbers()
    numbers.add([1.0, float("nan"), float("inf"), 3.0], nulls=2)
    assert (numbers.count, numbers.not_finite, numbers.nulls, numbers.mean) == (2, 2, 2, 2.0)
    empty = number_figures(Numbers())
    assert empty["count"] == 0
    assert empty["low"] is None


def test_categories_keep_what_is_frequent_and_say_how_wrong_they_are() -> None:
    pick = random.Random(2)
    stream = ["often"] * 4000 + ["sometimes"] * 1500 + [f"rare {n}" for n in range(8000)]
    pick.shuffle(stream)
    total = Categories(top=200)
    for part in range(9):
        piece = Categories(top=200)
        piece.add(stream[part::9])
        total.merge(piece)
    assert total.count == len(stream)
    assert total.error > 0
    for name, exact in (("often", 4000), ("sometimes", 1500)):
        assert exact - total.error <= total.counts[name] <= exact
    assert total.ranked(2)[0][0] == "often"
    assert total.ranked(2)[1][0] == "sometimes"
    assert total.distinct == pytest.approx(8002, rel=0.12)
    exact_counts = Categories()
    exact_counts.add(["a", "b", "a", None])
    assert (exact_counts.distinct, exact_counts.nulls, exact_counts.counts["a"], exact_counts.error) == (2, 1, 2, 0)


def test_a_sample_does_not_depend_on_parts_or_order() -> None:
    keys = [f"document {n}" for n in range(500)]
    one = Sample(50)
    for key in keys:
        one.add(key, key)
    parts = [Sample(50) for _ in range(3)]
    for place, key in enumerate(reversed(keys)):
        if parts[place % 3].wants(key):
            parts[place % 3].add(key, key)
    for part in parts[1:]:
        parts[0].merge(part)
    assert one.drawn() == parts[0].drawn()
    assert len(one.drawn()) == 50
    other = Sample(50, seed=1)
    for key in keys:
        other.add(key, key)
    assert other.drawn() != one.drawn()


# --- Schema ---


def test_schema_knows_types_nulls_nesting_and_drift_between_files(tmp_path: Path) -> None:
    usual = {"text": "a", "meta": {"url": "x", "tags": ["one", "two"]}, "n": 1}
    for number in range(3):
        write_rows(tmp_path / f"good{number}.jsonl", [usual, {**usual, "n": None}, {**usual, "n": 2.5}])
    write_rows(tmp_path / "odd.jsonl", [{"text": "a", "meta": {"url": 7}, "n": "three", "extra": True}])
    found = types.infer([str(tmp_path)])
    fields = {entry["path"]: entry for entry in found["fields"]}
    assert fields["n"]["types"] == {"integer": 3, "null": 3, "number": 3, "string": 1}
    assert fields["meta.tags[]"]["types"] == {"string": 18}
    assert fields["meta.tags"]["missing"] == 1
    assert fields["text"]["required"]
    assert not fields["extra"]["required"]
    drifts = {(one["path"], one["problem"]): one["files"] for one in found["drift"]}
    assert drifts["n", "number in most files"] == ["odd.jsonl (string)"]
    assert drifts["meta.url", "string in most files"] == ["odd.jsonl (integer)"]
    assert drifts["extra", "only in"] == ["odd.jsonl"]
    assert drifts["meta.tags", "missing in"] == ["odd.jsonl"]
    assert types.infer([str(tmp_path / "good*.jsonl")])["drift"] == []


def test_rows_are_held_against_a_schema(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "n": 1.5}, {"text": "b", "n": 2}])
    schema = types.infer([str(tmp_path / "a.jsonl")])
    assert types.validate([str(tmp_path / "a.jsonl")], schema)["mistakes"] == 0
    path = write_rows(tmp_path / "b.jsonl", [{"text": "a", "n": 3}, {"n": "4", "new": 1}, {"text": None, "n": 1}])
    with open(path, "a") as file:
        file.write("[1, 2]\n{broken\n")
    found = types.validate([str(path)], schema)
    shown = {(one["row"], one["path"]): one["problem"] for one in found["examples"]}
    assert shown[2, "text"] == "missing"
    assert "not in the schema" in shown[2, "new"]
    assert shown[2, "n"] == 'string where integer or number is expected ("4")'
    assert shown[3, "text"].startswith("null where string")
    assert "array" in shown[4, ""]
    assert "bad_json" in shown[5, ""]
    assert found["mistakes"] == 6
    assert (1, "n") not in shown
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not a schema"):
        types.load_schema(tmp_path / "other.json")
    (tmp_path / "only.txt").write_text("words")
    with pytest.raises(UserError, match="no JSONL, JSON or Parquet"):
        types.infer([str(tmp_path / "only.txt")])


# --- The report ---


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with labels and addresses; what stands in both is known."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = [
        {"text": prose(n), "label": "good" if n % 4 else "bad", "url": f"https://www.site{n % 3}.org/{n}"}
        for n in range(60)
    ]  # fmt: skip
    near = {"text": prose(5) + " One more word.", "label": "good"}
    held = [{"text": prose(1000 + n), "label": "good" if n % 4 else "bad"} for n in range(20)]
    write_rows(folder / "train.jsonl", [*rows, rows[7]])
    write_rows(folder / "validation.jsonl", [*held, rows[3], near])
    return folder


@pytest.fixture(scope="module")
def report(labelled: Path) -> dict:
    return data_report([str(labelled)], options=QUICK)


def test_duplicates_across_splits_are_found(report: dict) -> None:
    side = report["a"]
    assert side["documents"] == 83
    assert side["splits"]["train"]["documents"] == 61
    assert side["duplicates"]["duplicates"] == 2
    assert side["duplicates"]["across"] == [{"from": "train", "to": "validation", "documents": 1, "share": 1 / 22}]
    assert side["near_duplicates"]["across"][0]["documents"] == 2
    splits = [{one["split"] for one in pair["documents"]} for pair in side["near_duplicates"]["pairs"]]
    assert {"train", "validation"} in splits


def test_labels_domains_languages_and_words(report: dict) -> None:
    side = report["a"]
    (labels,) = side["labels"]
    assert labels["field"] == "label"
    assert labels["distinct"] == 2
    assert labels["labels"][1] == {"label": "bad", "share": 20 / 83, "counts": {"train": 15, "validation": 5}}
    assert labels["ratio"] == 63 / 20
    assert labels["splits"]["p"] > 0.5
    domains = side["categories"]["domain"]
    assert {one["name"] for one in domains["top"]} == {"site0.org", "site1.org", "site2.org"}
    assert domains["unknown"] == 21
    assert 2.9 < domains["effective"] <= 3
    assert side["categories"]["language"]["top"][0]["name"] == "en"
    assert side["words"]["top"][0]["word"] == "the"
    chars = side["numbers"]["chars"]
    lengths = sorted([len(prose(n)) for n in range(60)] + [len(prose(7)), len(prose(3)), len(prose(5)) + 15]
                     + [len(prose(1000 + n)) for n in range(20)])  # fmt: skip
    assert chars["mean"] == pytest.approx(np.mean(lengths))
    assert chars["p50"] == lengths[41]
    assert sum(chars["counts"]) == 83


def rounded(report: dict) -> dict:
    """Sums come out in another order in other parts, so the last digits may differ."""
    return json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 9))


def test_the_report_is_the_same_for_any_parts(labelled: Path, report: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soma.data.partitions.PARTITION_BYTES", 1)  # a part for each file
    monkeypatch.setattr("soma.data.profile.scan.BATCH_ROWS", 7)
    assert rounded(data_report([str(labelled)], options=QUICK)) == rounded(report)


@pytest.mark.slow
def test_the_report_is_the_same_for_any_number_of_workers(labelled: Path, report: dict) -> None:
    two = Options(signals=QUICK.signals, workers=2)
    assert rounded(data_report([str(labelled)], options=two)) == rounded(report)


def test_a_corpus_comes_with_a_card_and_its_report_reads_it(tmp_path: Path, labelled: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        build_corpus(DataConfig(sources=[str(labelled), "stdlib:"][:1], clean={"mask_personal": True}), folder)
    assert content_hash(folders[0]) == content_hash(folders[1])
    text = (folders[0] / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == ["unknown"]
    assert header["size_categories"] == ["n<1K"]
    count = sum(info["num_examples"] for info in header["dataset_info"]["splits"])
    rows = sum(pq.read_table(path).num_rows for path in folders[0].glob("*-0*.parquet"))
    assert count == rows > 70
    for info in header["configs"][0]["data_files"]:
        assert list(folders[0].glob(info["path"]))
    assert "exact duplicate | 2" in text
    assert "`<email>`" in text
    assert str(labelled) not in text
    assert "Evaluation sets were not looked for" in text
    found = data_report([str(folders[0])], options=QUICK, near=False)["a"]
    assert found["documents"] == rows
    assert set(found["splits"]) == {"train", "validation"}
    assert found["duplicates"]["duplicates"] == 0
    assert "near_duplicates" not in found


def test_card_names_licences_of_the_catalogue(tmp_path: Path) -> None:
    from soma.data.catalogue import CATALOGUE
    from soma.data.profile.card import data_card

    config = DataConfig(
        sources=[*CATALOGUE["c4"].data["sources"], "https://u:secret@example.org/x.jsonl"], filters="gopher"
    )
    facts = {"documents": 2000, "bytes": 10, "chars": 10, "lines": 1}
    made = {
        "corpus_hash": "ab" * 32, "splits": {"train": facts, "validation": dict.fromkeys(facts, 0)}, "steps": [],
        "dropped": [], "document_chars": {"median": 5, "p90": 9, "max": 12}, "characters": {"letters": 10}, "kinds": {},
        "sources": [],
    }  # fmt: skip
    text = data_card(config, made)
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == ["odc-by", "unknown"]
    assert [one["name"] for one in header["dataset_info"]["splits"]] == ["train"]
    assert "ODC-BY 1.0" in text
    assert "secret" not in text
    assert "`gopher_quality.min_words` 50" in text


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(UserError, match=r"no document there \(1 no_text_field\)"):
        data_report([str(tmp_path)], options=QUICK)
    assert domain_of({"url": "http://[broken"}) is None
    assert domain_of({"id": "https://www.a.org/x"}) == "a.org"


# --- The page ---


def test_page_escapes_what_comes_from_the_data(tmp_path: Path) -> None:
    rows = [{"text": prose(n), "label": "<img src=x onerror=alert(1)>", "url": f"https://{n}.org"} for n in range(25)]
    rows[0]["text"] = "<script>alert('x')</script> she & he said\x00 ".replace("\x00", "") * 20
    write_rows(tmp_path / "<b>.jsonl", rows)
    html = render(data_report([str(tmp_path)], options=QUICK))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>.jsonl" not in html
    assert "&lt;script&gt;" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "src=" not in html.replace("&lt;img src=", "")


def test_a_constant_is_a_step_and_not_a_slope() -> None:
    same, spread = Numbers(), Numbers()
    same.add([0.0] * 30)
    spread.add([0.0, 1.0, 2.0, 8.0])
    assert cumulative(number_figures(same), 8.0) == ([0.0, 0.0, 8.0], [0.0, 1.0, 1.0])
    xs, ys = cumulative(number_figures(spread), 9.0)
    assert (xs[0], ys[0]) == (0.0, 0.0)
    assert (xs[-2], ys[-2], xs[-1], ys[-1]) == (8.0, 1.0, 9.0, 1.0)
    assert ys == sorted(ys)


@pytest.mark.page
def test_page_opens_in_a_browser_wide_narrow_and_dark(tmp_path: Path, labelled: Path, report: dict) -> None:
    from browser import open_browser

    other = tmp_path / "other.jsonl"
    write_rows(other, [{"text": prose(2000 + n, 30), "label": "good", "extra": n} for n in range(40)])
    page = tmp_path / "page.html"
    page.write_text(render(data_report([str(labelled)], [str(other)], options=QUICK)))
    for width, dark in ((1280, False), (390, True)):
        with open_browser(width, 900, dark=dark) as driver:
            driver.get(f"file://{page}")
            assert not driver.get_log("browser")
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            links = driver.find_elements("css selector", "nav a")
            assert links
            assert all(driver.find_elements("css selector", link.get_attribute("hash") or "#drift") for link in links)
            details = driver.find_element("css selector", "#anomalies details, #bias details")
            driver.execute_script("arguments[0].open = true", details)
            assert details.find_element("css selector", "pre").is_displayed()


def test_command_line(tmp_path: Path, labelled: Path) -> None:
    from typer.testing import CliRunner

    from soma.cli import app

    def run(*words: object) -> SimpleNamespace:
        return CliRunner().invoke(app, ["data", *map(str, words)])

    out = tmp_path / "r.html"
    done = run("report", labelled, "--out", out, "--no-near")
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("<!doctype html>")
    made = run("schema", labelled, "--out", tmp_path / "s.json")
    assert made.exit_code == 0
    assert "url" in made.stdout
    assert "21 missing" in made.stdout
    assert run("schema", labelled, "--against", tmp_path / "s.json").exit_code == 0
    write_rows(tmp_path / "bad.jsonl", [{"text": 1}])
    assert run("schema", tmp_path / "bad.jsonl", "--against", tmp_path / "s.json").exit_code == 1


ON_RAY = """
import json, sys
from soma.data.profile.report import data_report
from soma.data.profile.scan import Options
options = Options(signals=("gopher_quality", "language"), workers=2, runner="ray")
print(json.dumps(data_report([sys.argv[1]], options=options)))
"""


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_report(labelled: Path, report: dict) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-c", ON_RAY, str(labelled)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    assert rounded(json.loads(done.stdout.strip().splitlines()[-1])) == rounded(report)
