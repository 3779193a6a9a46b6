"""The report: every part as stages leave it, parts missing, hostile text, and the page in a browser."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import open_browser
from made_run import EVIL, INPUTS, SECONDS, key, make_run

from soma.base.artefact import read_json, write_json
from soma.evaluate.facts import Evaluation, ReportFacts, Stage, Training, collect
from soma.evaluate.lineage import depths, lineage_chart, places
from soma.evaluate.report import flops, headlines, provenance, render, write_report, yaml

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps text, ids and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "action", "data", "poster", "srcset", "xlink:href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(run: tuple[Path, dict[str, Path]]) -> str:
    return write_report(*run).read_text(encoding="utf-8")


def test_everything_is_there(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for words in (
        "A small Llama on the Python standard library",
        "Python 3.11.7 · corpus 1a2b3c4d5e6f",
        "xz −9 1.65 · gzip −9 1.98",
        "Words by their input embeddings",
        "5 min 34 s",
        "10 stages, 2 of them cached",
        "2.15 GB",
        "4.1M",
        "1.548",
        "1.508 to 1.588",
        "def read_lines(path):",
        "Anything with __fspath__",
        "Held-out answers, nats per token",
        "580 of 1,160 planned",
        "580 steps in place of 1160",
        "near duplicate 32",
        "82 % in",
        "3 documents hold items of evaluation sets and were dropped",
        "14 spans of at least 50 words",
        "Lib/encodings/cp1250.py",
        "5,100 in train",
        "Return the sum",
        "APIError: overloaded",
        "learning_rate: 6.0e-3",
        key("train")[:8],
        "probe does not give the same bytes again",
        "880 GFLOP/s",
        "3.44M",
    ):
        assert words in text, words
    assert {"quality", "samples", "training", "data", "service", "run", "recipe", "environment"} <= set(Page(html).ids)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_one_file_that_loads_nothing(html: str) -> None:
    page = Page(html)
    assert all(address == "data:," or address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\(|https?://|//[a-z]", html)
    assert "<script" not in html


def test_what_tuning_did_to_answers(tmp_path: Path) -> None:
    folder, artefacts = make_run(tmp_path)
    score = {"conversations": 40, "longer_than_window": 0, "tokens": 900, "interval": [1.5, 1.75]}
    before, after = ({**score, "nats_per_token": nats, "perplexity": 9.0} for nats in (2.125, 1.625))
    pairs = {
        "kind": "pairs", "pairs": 25, "accuracy": 0.84, "margin": 3.5, "interval": [2.5, 4.5], "loss": 0.5,
        "start_loss": 0.6931, "plain_accuracy": 0.76, "start_plain_accuracy": 0.52,
        "after": {"chosen_nats_per_token": 1.25, "rejected_nats_per_token": 2.5},
        "before": {"chosen_nats_per_token": 1.5, "rejected_nats_per_token": 1.75},
    }  # fmt: skip
    nothing = {"kind": "answers", "before": None, "after": None}
    for name, facts in (
        ("tune_scores", {"kind": "answers", "before": before, "after": after}), ("prefer_scores", pairs),
        ("other_scores", nothing),
    ):  # fmt: skip
        artefacts[name] = tmp_path / name
        artefacts[name].mkdir()
        write_json(artefacts[name] / "answers.json", facts)
    page = Page(render(collect(folder, artefacts)))
    text = " ".join(page.text.split())
    assert "answers" in page.ids
    assert "Instruction tuning on held-out answers BeforeAfter Nats per token2.1251.625" in text
    assert "Chosen answers, nats per token1.51.25" in text
    assert "Pairs that moved towards the chosen answer–84 %" in text
    assert "3.5 (2.5 to 4.5)" in text
    assert "Other scores" not in text, "nothing was held out"


def test_hostile_text_is_shown_and_not_run(html: str) -> None:
    assert EVIL not in html
    assert Page(html).text.count(EVIL) >= 4, "the sample, the excerpt, the answer"


def test_headlines(run: tuple[Path, dict[str, Path]]) -> None:
    facts = collect(*run)
    found = {one.name: one.value for one in headlines(facts)}
    assert found == {
        "Bits per byte": "1.55",
        "Parameters": "4.1M",
        "Training tokens/s": "10.7k",
        "Tokens trained on": "2.79M",
        "Serving tokens/s": "171",
        "Wall time": "5 min 34 s",
        "Peak memory": "2.15 GB",
    }
    assert provenance(facts) == "Python 3.11.7 · corpus 1a2b3c4d5e6f"


@pytest.mark.parametrize("stages", [[], ["corpus"], ["train"], ["evaluate"], ["probe"], ["corpus", "tokens", "tune"]])
def test_parts_may_be_missing(run: tuple[Path, dict[str, Path]], tmp_path: Path, stages: list[str]) -> None:
    _, artefacts = run
    page = Page(write_report(tmp_path, {stage: artefacts[stage] for stage in stages}).read_text())
    sections = {"corpus": "data", "train": "training", "tune": "training", "evaluate": "quality", "probe": "service"}
    wanted = {sections[stage] for stage in stages if stage in sections}
    assert wanted == set(page.ids) & {"data", "training", "quality", "service"}
    assert tmp_path.name in page.text


def test_artefacts_that_say_less_still_show(run: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, artefacts = run
    copy = tmp_path / "train"
    shutil.copytree(artefacts["train"], copy)
    write_json(copy / "logs" / "summary.json", {"steps": 3})
    scores = tmp_path / "evaluate"
    scores.mkdir()
    write_json(scores / "scores.json", {"bits_per_byte": {"value": 1.5, "low": None, "high": None}})
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_json(corpus / "report.json", {"steps": []})
    Page(write_report(folder, {"train": copy, "evaluate": scores, "corpus": corpus}).read_text())


def test_training_log_cut_off_in_the_middle_of_a_line_is_read(run: tuple[Path, dict[str, Path]]) -> None:
    training = collect(*run).training
    assert [(one.stage, len(one.steps), len(one.validations)) for one in training] == [
        ("train", 580, 5),
        ("tune", 100, 5),
    ]


def test_nan_losses_are_gaps() -> None:
    steps = [{"step": n, "loss": float("nan") if n == 2 else 3.0, "learning_rate": 1e-3} for n in range(1, 5)]
    html = render(ReportFacts(training=[Training(stage="train", steps=steps)]))
    Page(html)
    assert "nan" not in html.lower().replace("nanosecond", "")


def test_samples_of_one_prompt_stand_together() -> None:
    sample = {
        "origin": "prompt",
        "prompt": "p",
        "continuation": "c",
        "reference": None,
        "source": None,
        "temperature": 0.0,
        "seed": 0,
        "tokens": 1,
        "finish_reason": "stop",
    }
    scores = {"bits_per_byte": {"value": 1.0, "low": None, "high": None}}
    models = [Evaluation(stage=name, scores=scores, samples=[sample]) for name in ("evaluate", "evaluate_tuned")]
    html = render(ReportFacts(evaluations=models))
    assert html.count('<pre class="prompt">p</pre>') == 1
    assert html.count("<figcaption>Base model") == html.count("<figcaption>Tuned model") == 1


def test_yaml_is_marked_up_and_unchanged() -> None:
    text = "a: 1\n# note <b>\nlist:\n  - name: <x>\n  - plain & simple"
    assert Page(str(yaml(text))).text == text
    assert "<b>name</b>" in yaml(text)
    assert "<i># note &lt;b&gt;</i>" in yaml(text)


def test_flops() -> None:
    assert [flops(8.8e11), flops(12.0), flops(None)] == ["880 GFLOP/s", "12 FLOP/s", "– FLOP/s"]


# --- Lineage ---


def test_lineage_places_follow_the_inputs() -> None:
    stages = [Stage(stage=name, key=key(name), inputs=INPUTS.get(name, {})) for name in SECONDS]
    depth = depths(stages)
    assert depth["corpus"] == 0
    assert all(depth[stage.stage] > depth[name] for stage in stages for name in stage.inputs.values())
    assert len(set(places(stages).values())) == len(stages), "no two stages in one place"


@pytest.mark.parametrize("down", [False, True])
def test_lineage_boxes_do_not_overlap(down: bool) -> None:
    stages = [Stage(stage=name, key=key(name), seconds=1.0, inputs=INPUTS.get(name, {})) for name in SECONDS]
    stages[0] = stages[0].model_copy(update={"cached": True})
    width = 358 if down else 1000
    root = ElementTree.fromstring(lineage_chart(stages, width=width, down=down))
    boxes = [[float(rect.attrib[name]) for name in ("x", "y", "width", "height")] for rect in root.iter("rect")]
    assert len(boxes) == len(stages)
    for index, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x <= x + w <= width
        for x2, y2, w2, h2 in boxes[:index]:
            assert x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h
    assert len(list(root.iter("path"))) == sum(len(set(inputs.values())) for inputs in INPUTS.values())
    assert "".join(root.itertext()).count("cached") >= 1
    assert "no data" in lineage_chart([])


# --- In a browser ---


@pytest.mark.page
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True), (360, False)])
def test_page(run: tuple[Path, dict[str, Path]], html: str, width: int, dark: bool) -> None:
    with open_browser(width, 900, dark=dark) as driver:
        driver.get((run[0] / "report.html").as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert driver.get_log("browser") == []
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        for kind, shown in (("wide", width > 640), ("narrow", width <= 640)):
            heights = driver.execute_script(
                f"return [...document.querySelectorAll('.{kind} svg')].map(one => one.getBoundingClientRect().height)"
            )
            assert len(heights) > 10
            assert all((height > 20) == shown for height in heights)
        clipped = driver.execute_script(
            "return [...document.querySelectorAll('svg text')].filter(one => { const a = one.getBoundingClientRect(),"
            " b = one.ownerSVGElement.getBoundingClientRect(); return a.width && (a.left < b.left - 1 ||"
            " a.right > b.right + 1 || a.bottom > b.bottom + 1) }).map(one => one.textContent)"
        )
        assert clipped == [], "text that reaches out of its chart"
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is not dark


def test_the_run_record_is_left_alone(run: tuple[Path, dict[str, Path]], html: str) -> None:
    assert read_json(run[0] / "run.json")["status"] == "running"
