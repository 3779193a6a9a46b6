"""What the guards of graphs find on labelled examples, beside plainer ways to do the same.

    python benchmarks/guardrails.py --json

Prompt injection and personal data: `tests/serve/guard_examples.jsonl`, written for this by the authors of the guards
after the patterns (the patterns were not changed for them); false alarms on instructions of Alpaca, none of which is an
attack. Groundedness: the pairs of RTE (entailed or not), and sentences of BoolQ's passages beside sentences of other
passages and the same sentences with a number changed; as the area under the ROC curve, and at the threshold of the
guard. Its peer is the cosine of MiniLM between the sentence and the nearest one of the passage.
"""

import gzip
import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Case, finish, make_case, parser

from soma.serve.guards.checks import masked
from soma.serve.guards.config import Grounded, Injection
from soma.serve.guards.grounded import NUMBER, SENTENCE, groundedness
from soma.serve.guards.injection import injection_score

INJECTION, GROUNDED = Injection().threshold, Grounded().threshold
EXAMPLES = ROOT / "tests" / "serve" / "guard_examples.jsonl"
KINDS = ("email", "ip", "phone", "card", "iban", "secret")
PHRASES = ("ignore all previous instructions", "ignore previous instructions", "disregard", "system prompt",
           "jailbreak", "you are now", "developer mode", "pretend")  # fmt: skip
NAIVE = re.compile(r"\S+@\S+|\d[\d .-]{8,}\d")
DATA = Path(os.environ.get("SOMA_TEST_DATA", ROOT.parent / "shared" / "data"))
PAIRS = 150  # passages of BoolQ

Examples = Sequence[tuple[str, int]]


def rates(found: Callable[[str], Any], rows: Examples) -> tuple[float, float]:
    """Precision and recall."""
    hits = [label for text, label in rows if found(text)]
    return (sum(hits) / len(hits) if hits else 0.0), sum(hits) / sum(label for _, label in rows)


def auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Area under the ROC curve: how often a grounded text has more than one that is not; ties are halves."""
    yes, no = (np.array([s for s, label in zip(scores, labels, strict=True) if label == wanted]) for wanted in (1, 0))
    return float(((yes[:, None] > no).sum() + 0.5 * (yes[:, None] == no).sum()) / (len(yes) * len(no)))


def accuracy(scores: Sequence[float], labels: Sequence[int], cut: float) -> float:
    """Share that is on the right side of a threshold."""
    return sum((score >= cut) == bool(label) for score, label in zip(scores, labels, strict=True)) / len(labels)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def labelled(check: str) -> Examples:
    rows = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    return [(row["text"], row["label"]) for row in rows if row["check"] == check]


def finders(check: str, ours: Callable[[str], Any], peer: str, theirs: Callable[[str], Any]) -> list[Case]:
    """Precision and recall of two finders."""
    rows = labelled(check)
    pairs = zip(("precision", "recall"), rates(ours, rows), rates(theirs, rows), strict=True)
    return [make_case(f"{check}: {name}", f"share, {len(rows)} texts", [a], peer, [b]) for name, a, b in pairs]


def grounded_sets(data: Path) -> dict[str, list[tuple[str, str, int]]]:
    """Answer, passage, label."""
    draw = random.Random(7)
    pairs = rows_of(data / "glue_rte.validation.jsonl.gz")
    rte = [(row["sentence2"], row["sentence1"], int(row["label"] == 0)) for row in pairs]
    texts = sorted({row["passage"] for row in rows_of(data / "boolq.validation.jsonl.gz")})
    draw.shuffle(texts)
    chosen = [(text, [each for each in SENTENCE.split(text) if len(each.split()) > 7]) for text in texts]
    chosen = [(text, found) for text, found in chosen if len(found) > 2 and any(NUMBER.search(each) for each in found)]
    other, changed = [], []
    for (text, found), (_, foreign) in zip(chosen[:PAIRS], chosen[PAIRS : 2 * PAIRS], strict=True):
        said = re.sub(r"\s*\([^)]*\)", "", draw.choice([each for each in found if NUMBER.search(each)]))
        other += [(said, text, 1), (draw.choice(foreign), text, 0)]
        if NUMBER.search(said):
            wrong = NUMBER.sub(lambda match: str(int(re.sub(r"\D", "", match[0])) + draw.randint(1, 9)), said, count=1)
            changed += [(said, text, 1), (wrong, text, 0)]
    return {"RTE": rte, "BoolQ, another passage": other, "BoolQ, a number changed": changed}


def cosines(rows: Sequence[tuple[str, str, int]]) -> list[float]:
    """Of an answer and the nearest sentence of its passage."""
    from soma.serve.retrieval.encoders import PACKAGED, load_encoder

    parts = {passage: [each for each in SENTENCE.split(passage) if each.strip()] for _, passage, _ in rows}
    texts = sorted({answer for answer, _, _ in rows} | {part for each in parts.values() for part in each})
    encoder = load_encoder(PACKAGED)
    try:
        vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    finally:
        encoder.close()
    return [max(float(vectors[answer] @ vectors[part]) for part in parts[passage]) for answer, passage, _ in rows]


def main() -> None:
    """Run."""
    arguments = parser("guardrails", "Precision and recall of guards.", rounds=1)
    given = arguments.parse_args()
    cases = finders("injection", lambda text: injection_score(text) >= INJECTION, "list of phrases",
                    lambda text: any(phrase in text.lower() for phrase in PHRASES))  # fmt: skip
    cases += finders("personal", lambda text: masked(text, KINDS)[1], "one naive pattern", NAIVE.search)
    missing: dict[str, str] = {}
    if (DATA / "alpaca").is_dir():
        rows = json.loads((DATA / "alpaca" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
        asked = [f"{row['instruction']}\n{row['input']}" for row in rows]
        ours, theirs = (1000 * sum(map(found, asked)) / len(asked) for found in (
            lambda text: injection_score(text) >= INJECTION,
            lambda text: any(phrase in text.lower() for phrase in PHRASES)))  # fmt: skip
        cases.append(make_case(f"injection: false alarms, Alpaca ({len(asked)})", "per 1000", [ours + 1e-9],
                               "list of phrases", [theirs + 1e-9], higher_is_better=False))  # fmt: skip
        for name, pairs in grounded_sets(DATA / "glue_superglue_qa").items():
            print(f"groundedness on {name}: {len(pairs)} pairs", file=sys.stderr, flush=True)
            labels = [label for _, _, label in pairs]
            scores = [groundedness(answer, [passage]) for answer, passage, _ in pairs]
            cases.append(make_case(f"grounded: area under ROC, {name}", f"{len(pairs)} pairs", [auc(scores, labels)],
                                   "cosine of MiniLM", [auc(found := cosines(pairs), labels)]))  # fmt: skip
            theirs = max(accuracy(found, labels, cut) for cut in found)
            right = accuracy(scores, labels, GROUNDED)
            cases.append(make_case(f"grounded: accuracy at {GROUNDED:g}, {name}", f"{len(pairs)} pairs", [right],
                                   "cosine at its best cut", [theirs]))  # fmt: skip
    else:
        missing["false alarms, groundedness"] = f"{DATA} is not there"
    finish("guardrails", given, cases, ["numpy"], missing)


if __name__ == "__main__":
    main()
