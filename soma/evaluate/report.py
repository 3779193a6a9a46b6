"""The report of a run: one self-contained HTML file that opens offline, drawn from `ReportFacts`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from soma.base.artefact import write_text
from soma.base.axes import number, percent, time_span
from soma.base.charts import (
    Series,
    bar_chart,
    histogram,
    line_chart,
    percentile_strip,
    share_bar,
)
from soma.base.page import HALF, NARROW, WIDE, known, page_environment, page_style, responsive, size
from soma.base.scatter import word_map
from soma.evaluate.facts import Evaluation, Json, ReportFacts, Training, collect
from soma.evaluate.lineage import lineage_chart

TITLES = {
    "train": "Pretraining",
    "tune": "Instruction tuning",
    "prefer": "Preference tuning",
    "evaluate": "Base model",
    "evaluate_tuned": "Tuned model",
    "tune_scores": "Instruction tuning on held-out answers",
    "prefer_scores": "Preference tuning on held-out pairs",
}

STEPS = {"clean": "cleaned", "exact": "no duplicates", "near": "no near-duplicates"}


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top: what it is, its value, and what to compare it with."""

    name: str
    value: str
    note: str = ""


def write_report(folder: Path, artefacts: Mapping[str, Path]) -> Path:
    """Write `report.html` into a run's folder from its record and its stages' artefacts; missing parts are left out."""
    path = folder / "report.html"
    write_text(path, render(collect(folder, artefacts)))
    return path


def render(facts: ReportFacts) -> str:
    """The report as HTML. Everything that comes from the run is escaped; nothing is loaded from elsewhere."""
    environment = page_environment("soma.evaluate")
    environment.filters |= {"flops": known(flops), "stage_title": stage_title, "yaml": yaml}
    return environment.get_template("report.html.jinja").render(
        facts=facts, style=page_style(), headlines=list(headlines(facts)), provenance=provenance(facts),
        result=result_charts(facts), data=data_charts(facts.corpus), pairs=pair_charts(facts.pairs),
        training=[(one, training_charts(one)) for one in facts.training], exchanges=exchanges(facts.evaluations),
        answers=answer_tables(facts.answers),
        service=service_charts(facts.probe), run=run_charts(facts), first=first_scores(facts),
    )  # fmt: skip


def stage_title(name: str) -> str:
    """`evaluate_tuned` → `Tuned model`."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def flops(rate: float | None) -> str:
    """FLOP/s with the prefix at the unit: 8.8e11 → `880 GFLOP/s`."""
    text = number(rate)
    return f"{text[:-1]} {text[-1]}FLOP/s" if text[-1].isalpha() else f"{text} FLOP/s"


def yaml(text: str) -> Markup:
    """YAML with its keys and comments marked up."""
    lines = []
    for line in text.splitlines():
        match = re.match(r"^(\s*(?:- )?)([\w.-]+)(:)(.*)$", line)
        if line.lstrip().startswith("#"):
            lines.append(Markup("<i>{}</i>").format(line))
        elif match:
            lines.append(Markup("{}<b>{}</b>{}{}").format(*match.groups()))
        else:
            lines.append(escape(line))
    return Markup("\n").join(lines)


def provenance(facts: ReportFacts) -> str:
    """`Python 3.11.7 · corpus 1a2b3c4d5e6f`: stands beside every figure taken on the corpus."""
    scores = first_scores(facts) or {}
    source = facts.corpus or scores
    python = source.get("python") or facts.versions.get("python")
    parts = [f"Python {python}"] if python else []
    if source.get("corpus_hash"):
        parts.append(f"corpus {str(source['corpus_hash'])[:12]}")
    return " · ".join(parts)


def first_scores(facts: ReportFacts) -> Json | None:
    """The scores of the model that was trained first: the one that bits per byte are about."""
    return facts.evaluations[0].scores if facts.evaluations else None


def headlines(facts: ReportFacts) -> Iterator[Headline]:
    """The figures that a person asks for first; what is not known is left out."""
    scores = first_scores(facts)
    if scores:
        bars = scores.get("baselines", {})
        note = " · ".join(f"{name} −9 {number(bars[name]['bits_per_byte'])}" for name in ("xz", "gzip") if name in bars)
        yield Headline("Bits per byte", number(scores["bits_per_byte"]["value"]), note)
        yield Headline("Parameters", number(scores.get("parameters")))
    if facts.training:
        first = facts.training[0].summary
        if first.get("tokens_per_second"):
            mfu = f"{percent(first['mfu'])} of the matmul peak" if first.get("mfu") else ""
            yield Headline("Training tokens/s", number(first["tokens_per_second"]), mfu)
        tokens = sum(one.summary.get("tokens", 0) for one in facts.training)
        if tokens:
            yield Headline("Tokens trained on", number(tokens))
    if facts.probe:
        ttft = (facts.probe.get("percentiles") or {}).get("ttft_seconds", {}).get("p50")
        note = f"first token after {time_span(ttft)}" if ttft is not None else ""
        yield Headline("Serving tokens/s", number(facts.probe.get("tokens_per_second")), note)
    seconds = [stage.seconds for stage in facts.stages if stage.seconds is not None]
    if seconds:
        cached = sum(stage.cached for stage in facts.stages)
        note = f"{len(seconds)} stages" + (f", {cached} of them cached" if cached else "")
        yield Headline("Wall time", time_span(sum(seconds)), note)
    peaks = [(stage.peak_memory_bytes, stage.stage) for stage in facts.stages if stage.peak_memory_bytes]
    if peaks:
        yield Headline("Peak memory", size(max(peaks)[0]), f"in {stage_title(max(peaks)[1]).lower()}")


# --- The parts ---


def result_charts(facts: ReportFacts) -> dict[str, Markup]:
    """Bits per byte against the compressors, and by kind of document; words on a plane."""
    if not facts.evaluations:
        return {}
    ours = [(stage_title(one.stage), one.scores["bits_per_byte"]["value"]) for one in facts.evaluations]
    scores = facts.evaluations[0].scores
    theirs = [(f"{name} -9", bar["bits_per_byte"]) for name, bar in scores.get("baselines", {}).items()]
    bars = sorted(ours + theirs, key=lambda item: item[1])
    found = {
        "bits": responsive(
            lambda width: bar_chart(
                bars, title="Bits per byte on held-out text (less is better)", width=width,
                highlight=[name for name, _ in ours],
            )
        )
    }  # fmt: skip
    kinds = [(kind, one["bits_per_byte"]) for kind, one in scores.get("kinds", {}).items()]
    if len(kinds) > 1:
        found["kinds"] = responsive(
            lambda width: bar_chart(kinds[:12], title="Bits per byte by kind of document", width=width), HALF
        )
    if words := facts.evaluations[0].words:
        first, second = (percent(share) for share in words["shares"])
        found["words"] = responsive(
            lambda width: word_map(
                words["words"], words["points"], title="Words by their input embeddings, principal components",
                x_label=f"first: {first} of the variance", y_label=f"second: {second}", width=width,
            )
        )  # fmt: skip
    return found


def data_charts(corpus: Json | None) -> list[Markup]:
    """What came in, what was left after each step, and how it is distributed."""
    if not corpus:
        return []
    steps = [(STEPS.get(step["step"], step["step"]), step["bytes"]) for step in corpus.get("steps", [])]
    kinds = [(kind, one["bytes"]) for kind, one in corpus.get("kinds", {}).items()]
    charts: list[Callable[[int], str]] = [
        lambda width: bar_chart(steps, title="Text left after each step", width=width, format_value=size),
        lambda width: share_bar(kinds, title="Kinds of document, by bytes", width=width, format_value=size),
    ]
    for key, title, label in (
        ("document_chars", "Length of documents", "characters"),
        ("line_bytes", "Length of lines", "bytes"),
    ):
        if corpus.get(key):
            charts.append(lengths(corpus[key], title, label))
    characters = list(corpus.get("characters", {}).items())
    charts.append(lambda width: share_bar(_spaced(characters), title="Characters", width=width))
    return [responsive(draw, HALF) for draw in charts]


def _spaced(items: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), value) for name, value in items]


def lengths(facts: Json, title: str, label: str) -> Callable[[int], str]:
    """A histogram of lengths as the corpus report keeps them."""
    return lambda width: histogram(
        facts["edges"], facts["counts"], title=title, x_label=label, width=width, log_x=True,
        marks=[("median", facts["median"])],
    )  # fmt: skip


def pair_charts(pairs: Mapping[str, Json]) -> dict[str, list[Markup]]:
    """Lengths of questions and answers of instruction and preference pairs."""
    return {
        name: [
            responsive(lengths(facts[key], title, "characters"), HALF)
            for key, title in (("prompt_chars", "Length of prompts"), ("answer_chars", "Length of answers"))
            if facts.get(key)
        ]
        for name, facts in pairs.items()
    }


def answer_tables(answers: Mapping[str, Json]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """What tuning did to held-out answers (`soma.evaluate.tuned`): title, and rows of (figure, before, after)."""
    tables = []
    for stage, facts in answers.items():
        before, after = facts.get("before"), facts.get("after")
        if not before or not after:
            continue
        if facts["kind"] == "answers":
            rows = [
                ("Nats per token", number(before["nats_per_token"], 4), number(after["nats_per_token"], 4)),
                ("95 % interval", _between(before.get("interval")), _between(after.get("interval"))),
                ("Perplexity", number(before["perplexity"], 4), number(after["perplexity"], 4)),
                ("Conversations", number(before["conversations"]), number(after["conversations"])),
            ]
        else:
            sides = [
                (f"{side.capitalize()} answers, nats per token", before[key], after[key])
                for side in ("chosen", "rejected")
                if (key := f"{side}_nats_per_token") in before
            ]
            rows = [(name, number(left, 4), number(right, 4)) for name, left, right in sides]
            rows += [
                ("Pairs whose chosen answer is the likelier", percent(facts["start_plain_accuracy"]),
                 percent(facts["plain_accuracy"])),
                ("Pairs that moved towards the chosen answer", "–", percent(facts["accuracy"])),
                ("Margin, nats", "0", f"{number(facts['margin'], 3)} ({_between(facts.get('interval'))})"),
                ("DPO loss", number(facts["start_loss"], 4), number(facts["loss"], 4)),
                ("Pairs", number(facts["pairs"]), number(facts["pairs"])),
            ]  # fmt: skip
        tables.append((stage_title(stage), rows))
    return tables


def _between(interval: Sequence[float] | None) -> str:
    return f"{number(interval[0], 4)} to {number(interval[1], 4)}" if interval else "–"


def training_charts(training: Training) -> dict[str, Any]:
    """Loss, learning rate, speed and MFU of one stage over its steps."""
    steps = training.steps
    xs = [record["step"] for record in steps]

    def column(name: str) -> list[float | None]:
        return [record.get(name) for record in steps]

    loss = [Series("training", xs, column("loss"), band=len(xs) > 60)]
    if training.validations:
        at = [record["step"] for record in training.validations]
        loss.append(Series("held out", at, [record.get("validation_loss") for record in training.validations]))
    small: list[Callable[[int], str]] = [
        lambda width: line_chart(
            [Series("tokens/s", xs, column("tokens_per_second"))], title="Speed", y_label="tokens per second",
            x_label="step", width=width, height=220, zero=True,
        ),
        lambda width: line_chart(
            [Series("learning rate", xs, column("learning_rate"))], title="Learning rate", x_label="step", width=width,
            height=220, zero=True,
        ),
        lambda width: line_chart(
            [Series("MFU", xs, column("mfu"))], title="Model FLOPs utilization", y_label="share of the measured peak",
            x_label="step", width=width, height=220, zero=True, format_y=percent,
        ),
        lambda width: line_chart(
            [Series("gradient norm", xs, column("grad_norm"))], title="Gradient norm before clipping", x_label="step",
            width=width, height=220, log_y=True,
        ),
    ]  # fmt: skip
    large = responsive(
        lambda width: line_chart(
            loss, title="Loss", y_label="nats per token", x_label="step", width=width,
            height=340 if width == WIDE else 260, log_y=True,
        )
    )  # fmt: skip
    return {"loss": large, "small": [responsive(draw, HALF) for draw in small] if steps else []}


def exchanges(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Each prompt once, with what every evaluated model made of it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for evaluation in evaluations:
        for sample in evaluation.samples:
            entry = found.setdefault((sample["origin"], sample["prompt"]), {**sample, "answers": []})
            entry["answers"].append((stage_title(evaluation.stage), sample))
    return list(found.values())


def service_charts(probe: Json | None) -> dict[str, Any]:
    """Latencies of the requests that were sent to the service, in milliseconds."""
    if not probe:
        return {}
    rows = [row for row in probe.get("requests", []) if not row.get("error")]
    strips = [
        (name, [None if row.get(key) is None else 1000 * row[key] for row in rows])
        for name, key in (
            ("first token", "ttft_seconds"),
            ("each next token", "itl_seconds"),
            ("whole answer", "e2e_seconds"),
        )
    ]
    return {
        "latency": responsive(
            lambda width: percentile_strip(
                strips, title="Latency", x_label="milliseconds (log scale)", width=width, log_x=True,
                format_value=lambda value: time_span(value / 1000),
            )
        )
    }  # fmt: skip


def run_charts(facts: ReportFacts) -> dict[str, Markup]:
    """Wall time by stage, and the lineage."""
    if not facts.stages:
        return {}
    times = [(stage.stage.replace("_", " "), stage.seconds) for stage in facts.stages]
    return {
        "time": responsive(
            lambda width: bar_chart(times, title="Wall time by stage", width=width, format_value=time_span)
        ),
        "lineage": responsive(
            lambda width: lineage_chart(facts.stages, title="Lineage", width=width, down=width == NARROW)
        ),
    }
