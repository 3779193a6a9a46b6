"""How far annotators agree: Cohen's kappa for pairs, Krippendorff's alpha for any number with gaps; what to adjudicate.

The value of an item is its class (or the set of its classes); for a label it is whether the label was given; for spans
the items of a label are the code points of the texts, and exact spans are counted as F1 besides.
"""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from soma.base.errors import UserError
from soma.data.annotation.files import line
from soma.data.annotation.record import Record

Level = Literal["nominal", "ordinal", "interval"]
LEVELS = ("nominal", "ordinal", "interval")
Values = Sequence[Hashable | None]  # None: the annotator did not say
Part = Literal["labels", "spans", "targets"]


def cohen_kappa(one: Values, other: Values) -> float:
    """Cohen's kappa (1960) over the items that both judged: (p_o - p_e) / (1 - p_e). NaN where it has no value.

    p_o is the share of equal judgements, p_e what two annotators with these shares of classes would have by chance.
    Of 50 items with 20 both yes, 15 both no, 5 and 10 otherwise: p_o = 0.7, p_e = 0.5, kappa 0.4.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return math.nan
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / len(pairs)
    expected = sum(count * second[value] for value, count in first.items()) / len(pairs) ** 2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(annotators: Sequence[Values], level: Level = "nominal") -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability"): 1 - D_o / D_e. NaN without variation.

    annotators: for each the values of all units, None where missing; ordinal and interval values are numbers. From the
    coincidence matrix o_ck (each unit's pairs of values, weighted by 1 / (m_u - 1)) and its margins n_c:
    D_o = sum o_ck d_ck / n, D_e = sum n_c n_k d_ck / (n (n - 1)).
    """
    units = [[value for value in column if value is not None] for column in zip(*annotators, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    found = {value for unit in units for value in unit}
    values: list[Any] = sorted(found, key=(lambda v: float(v)) if level != "nominal" else str)
    if len(values) < 2:
        return math.nan
    index = {value: number for number, value in enumerate(values)}
    o_CC = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount([index[value] for value in unit], minlength=len(values)).astype(float)
        o_CC += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    n_C = o_CC.sum(1)
    d_CC = _distances(values, n_C, level)
    expected = (np.outer(n_C, n_C) * d_CC).sum() / (n_C.sum() - 1)
    return float(1 - (o_CC * d_CC).sum() / expected)


def _distances(values: Sequence[Any], n_C: np.ndarray, level: Level) -> np.ndarray:
    """Squared differences between values: 0 or 1; (sum of n from c to k, less half of both ends)²; (c - k)²."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        numbers = np.array(values, float)
        return (numbers[:, None] - numbers[None, :]) ** 2
    middle = np.cumsum(n_C) - n_C / 2
    return (middle[:, None] - middle[None, :]) ** 2


def span_f1(one: Sequence[Record | None], other: Sequence[Record | None], label: str | None = None) -> float:
    """F1 of exact spans (start, end, label) between two annotators over the items that both judged; NaN without any."""
    both = total = 0
    for a, b in zip(one, other, strict=True):
        if a is not None and b is not None:
            first, second = (_spans(record, label) for record in (a, b))
            both += (first & second).total()
            total += first.total() + second.total()
    return 2 * both / total if total else math.nan


def _spans(record: Record, label: str | None) -> Counter[tuple[int, int, str | None]]:
    found = record.spans if record.classes() is not None and record.answer != "reject" else []
    return Counter((span.start, span.end, span.label) for span in found if label in (None, span.label))


# --- Files of several annotators ---


def align(files: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Record]]:
    """{annotator: {item: record}}. A file whose records name their annotator (`_annotator_id`) holds several.

    Of an item that an annotator has twice the last counts. Raises UserError for fewer than two annotators and for
    files that share no item.
    """
    found: dict[str, dict[str, Record]] = {}
    for name, records in files.items():
        own = {str(record.extra["_annotator_id"]) for record in records if record.extra.get("_annotator_id")}
        for record in records:
            who = str(record.extra.get("_annotator_id") or name) if len(own) > 1 else name
            found.setdefault(who, {})[record.identity()] = record
    if len(found) < 2:
        raise UserError(f"agreement needs two annotators or more; found {', '.join(found) or 'none'}")
    counts = Counter(item for items in found.values() for item in items)
    if max(counts.values()) < 2:
        raise UserError(f"no item was judged by two of {', '.join(found)} (items are matched by hash, id or text)")
    return found


def agreement(annotators: Mapping[str, Mapping[str, Record]], level: Level = "nominal") -> dict[str, Any]:
    """What `soma data agreement` reports: alpha and kappas overall, by label and by pair, and the adjudication list.

    Raises UserError for classes that are no numbers where the level asks for them.
    """
    items = list(dict.fromkeys(item for own in annotators.values() for item in own))
    rows = {name: [own.get(item) for item in items] for name, own in annotators.items()}
    part = part_of([record for own in rows.values() for record in own if record is not None])
    values = {name: [_value(record, part, level) for record in own] for name, own in rows.items()}
    labels = _labels(rows, part)
    by_label = {label: _judgements(rows, part, label) for label in labels}
    pairs = []
    for one, other in combinations(rows, 2):
        entry = {"pair": [one, other], "items": _shared(values[one], values[other])}
        entry["kappa"] = cohen_kappa(values[one], values[other])
        if part == "spans":
            entry["f1"] = span_f1(rows[one], rows[other])
        entry["labels"] = {
            label: {"kappa": cohen_kappa(judged[one], judged[other])}
            | ({"f1": span_f1(rows[one], rows[other], label)} if part == "spans" else {})
            for label, judged in by_label.items()
        }
        pairs.append(entry)
    return {
        "part": part, "level": level, "annotators": {name: _judged(own) for name, own in values.items()},
        "items": len(items), "alpha": krippendorff_alpha(list(values.values()), level),
        "labels": {
            label: {"alpha": krippendorff_alpha(list(judged.values())), "given": _given(judged)}
            for label, judged in by_label.items()
        },
        "pairs": pairs, "adjudicate": adjudication(items, rows, values, level),
    }  # fmt: skip


def part_of(records: Sequence[Record]) -> Part:
    """What the annotators said most of: spans, target texts or classes."""
    counts = {
        "spans": sum(bool(record.spans) for record in records),
        "targets": sum(bool(record.targets) for record in records),
        "labels": sum(bool(record.labels) or (record.answer == "reject" and not record.spans) for record in records),
    }
    best = max(counts, key=lambda part: counts[part])
    return best if counts[best] else "labels"  # type: ignore[return-value]


def adjudication(
    items: Sequence[str], rows: Mapping[str, Sequence[Record | None]], values: Mapping[str, Values], level: Level
) -> list[dict[str, Any]]:
    """Items on which annotators differ, the most disputed first: the mean difference over pairs of annotators.

    A difference is 0 or 1, for interval and ordinal classes the distance over the widest one in the data.
    """
    numbers = [float(v) for own in values.values() for v in own if v is not None] if level != "nominal" else [0.0]  # type: ignore[arg-type]
    width = (max(numbers) - min(numbers)) or 1.0
    found = []
    for at, item in enumerate(items):
        said = {name: own[at] for name, own in values.items() if own[at] is not None}
        differences = [
            float(a != b) if level == "nominal" else abs(float(a) - float(b)) / width  # type: ignore[arg-type]
            for a, b in combinations(said.values(), 2)
        ]
        if any(differences):
            record = next(own[at] for own in rows.values() if own[at] is not None)
            assert record is not None
            disagreement = sum(differences) / len(differences)
            answers = {name: _shown(value) for name, value in said.items()}
            found.append({"item": item, "disagreement": disagreement, "text": record.text, "answers": answers})
    return sorted(found, key=lambda entry: -entry["disagreement"])


def adjudication_lines(report: Mapping[str, Any]) -> str:
    """The adjudication list as JSONL that `soma data annotate` takes in: the text and, as meta, who said what."""
    rows = [
        {"text": entry["text"], "meta": {"disagreement": round(entry["disagreement"], 4), **entry["answers"]}}
        for entry in report["adjudicate"]
    ]
    return "".join(line(row) + "\n" for row in rows)


def shown(report: Mapping[str, Any], items: int) -> list[str]:
    """The report for the screen, with that many disputed items."""
    lines = [f"{name}: judged {count:,} items" for name, count in report["annotators"].items()]
    lines += ["", f"Krippendorff's alpha ({report['level']}, {report['part']})  {_figure(report['alpha'])}"]
    width = max([len(label) for label in report["labels"]], default=0)
    lines += [
        f"  {label:<{width}}  {_figure(one['alpha'])}  given {' / '.join(map(str, one['given'].values()))} times"
        for label, one in report["labels"].items()
    ]
    for pair in report["pairs"]:
        f1 = f", F1 of spans {_figure(pair['f1'])}" if "f1" in pair else ""
        lines += ["", f"{' and '.join(pair['pair'])}: {pair['items']:,} items, kappa {_figure(pair['kappa'])}{f1}"]
        lines += [f"  {label:<{width}}  {_figure(one['kappa'])}" for label, one in pair["labels"].items()]
    lines += ["", f"{len(report['adjudicate']):,} of {report['items']:,} items are disputed"]
    for entry in report["adjudicate"][:items]:
        lines.append(f"  {entry['disagreement']:.2f}  {' '.join(entry['text'].split())[:90]!r}")
        lines += [
            f"        {name}: {json.dumps(answer, ensure_ascii=False)}" for name, answer in entry["answers"].items()
        ]
    return lines


def without_nan(value: Any) -> Any:
    """The same with null for figures that have no value, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _figure(value: float) -> str:
    return "   –  " if math.isnan(value) else f"{value:6.3f}"


def _value(record: Record | None, part: Part, level: Level) -> Hashable | None:
    """What an annotator said of an item, as one value; None: nothing."""
    if record is None or (classes := record.classes()) is None:
        return None
    if part == "spans":
        return frozenset(_spans(record, None).items())
    if part == "targets":
        return tuple(record.targets)
    if level == "nominal":
        return frozenset(classes)
    if not classes:
        return None
    try:
        return float(classes[0])
    except ValueError:
        raise UserError(f"class {classes[0]!r} is no number, which the level {level} asks for") from None


def _labels(rows: Mapping[str, Sequence[Record | None]], part: Part) -> list[str]:
    records = [record for own in rows.values() for record in own if record is not None]
    if part == "spans":
        return sorted({str(span.label) for record in records for span in record.spans})
    return sorted({str(label) for record in records for label in record.labels}) if part == "labels" else []


def _judgements(rows: Mapping[str, Sequence[Record | None]], part: Part, label: str) -> dict[str, list[bool | None]]:
    """For each annotator whether the label was given: for each item, or for each code point of each text."""
    found: dict[str, list[bool | None]] = {name: [] for name in rows}
    for column in zip(*rows.values(), strict=True):
        length = max(len(record.text) for record in column if record is not None) if part == "spans" else 1
        for name, record in zip(rows, column, strict=True):
            if record is None or (classes := record.classes()) is None:
                found[name] += [None] * length
            elif part == "labels":
                found[name].append(label in map(str, classes))
            else:
                inside = [False] * length
                for start, end, _ in _spans(record, label):
                    inside[start:end] = [True] * (end - start)
                found[name] += inside
    return found


def _judged(values: Values) -> int:
    return sum(value is not None for value in values)


def _given(judged: Mapping[str, Sequence[bool | None]]) -> dict[str, int]:
    return {name: sum(value is True for value in own) for name, own in judged.items()}


def _shared(one: Values, other: Values) -> int:
    return sum(a is not None and b is not None for a, b in zip(one, other, strict=True))


def _shown(value: Any) -> Any:
    """A value as JSON shows it."""
    if not isinstance(value, frozenset):
        return list(value) if isinstance(value, tuple) else value
    if any(isinstance(entry, tuple) for entry in value):
        return sorted([*span, count] if count > 1 else [*span] for span, count in value)
    return sorted(value, key=str)
