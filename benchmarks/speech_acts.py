"""Speech acts: our model on held-out dialogues, beside the majority class and TF-IDF with logistic regression; the
rules for declarations and verdictives on written cases.

    python benchmarks/speech_acts.py --json

trains on the shared DailyDialog and Switchboard dialogues (under 4 minutes on one thread). A fifth of the dialogues,
by a hash of their text, is held out; a tenth chooses the epoch. Intervals: 95 %, from 1,000 resamples of dialogues.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, finish, make_case, parser

from soma.data.acts.acts import LEARNED, Dialogue
from soma.data.acts.dialogues import read_dialogues

DATA = Path(os.environ.get("SOMA_TEST_DATA", ROOT.parent / "shared" / "data"))
FILES = ("en_dev_human.txt", "en_test_human.txt", "switchboard.zip")
CASES = ROOT / "tests" / "data" / "speech_act_cases.jsonl"
RESAMPLES = 1000


def split_dialogues(folder: Path) -> dict[str, dict[str, Dialogue]]:
    """Train, validation and test by dialogue; a dialogue that is there twice counts once."""
    parts: dict[str, dict[str, Dialogue]] = {"train": {}, "validation": {}, "test": {}}
    seen = set()
    for name in FILES:
        for key, dialogue in read_dialogues(folder / name).items():
            digest = hashlib.sha256("\n".join(turn.text for turn in dialogue).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                part = "test" if digest[0] % 10 < 2 else "validation" if digest[0] % 10 == 2 else "train"
                parts[part][key] = dialogue
    return parts


def labelled(dialogues: dict[str, Dialogue]) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Texts, the texts before them, labels, and the number of the dialogue, of all turns that have a label."""
    texts, before, labels, numbers = [], [], [], []
    for number, dialogue in enumerate(dialogues.values()):
        for at, turn in enumerate(dialogue):
            if turn.act is not None:
                texts.append(turn.text)
                before.append(dialogue[at - 1].text if at else "")
                labels.append(LEARNED.index(turn.act))
                numbers.append(number)
    return texts, before, np.array(labels), np.array(numbers)


def logistic(train: list[list[str]], labels: np.ndarray, test: list[list[str]]) -> np.ndarray:
    """Predictions of logistic regression (balanced) on TF-IDF of words and pairs of words, a vectorizer a column."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    sides: list[list[object]] = [[], []]
    for one, other in zip(train, test, strict=True):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
        sides[0].append(words.fit_transform(one))
        sides[1].append(words.transform(other))
    model = LogisticRegression(C=3, max_iter=300, class_weight="balanced")
    model.fit(scipy.sparse.hstack(sides[0]).tocsr(), labels)
    return np.asarray(model.predict(scipy.sparse.hstack(sides[1]).tocsr()))


def resampled(labels: np.ndarray, predictions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Macro-F1 of RESAMPLES draws of whole dialogues, the same draws for every system."""
    classes = len(LEARNED)
    cells = np.zeros((numbers.max() + 1, classes, classes))
    np.add.at(cells, (numbers, labels, predictions), 1)
    generator = np.random.default_rng(7)
    found = []
    for _ in range(RESAMPLES):
        matrix = cells[generator.integers(0, len(cells), len(cells))].sum(0)
        found.append((2 * matrix.diagonal() / np.maximum(1, matrix.sum(0) + matrix.sum(1))).mean())
    return np.array(found)


def rules_on_cases() -> dict[str, dict[str, float]]:
    """Precision and recall of the rules for each act, on the cases that they were written with and on the others."""
    from soma.data.acts.rules import ruled

    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    found = {}
    for act in ("declaration", "verdictive"):
        for part in ("seen", "unseen"):
            own = [row for row in rows if row["for"] == act and row["part"] == part]
            said, true = [ruled(row["text"]) == act for row in own], [row["act"] == act for row in own]
            both = sum(a and b for a, b in zip(said, true, strict=True))
            found[f"{act}, {part} cases"] = {
                "cases": len(own), "positive": sum(true), "precision": both / max(1, sum(said)),
                "recall": both / max(1, sum(true)),
            }  # fmt: skip
    return found


def main() -> None:
    arguments = parser("speech_acts", __doc__.splitlines()[0], rounds=1)
    arguments.add_argument("--model", type=Path, help="also write the model to this folder")
    given = arguments.parse_args()
    if not (DATA / "speech_acts").is_dir():
        sys.exit(f"the labelled dialogues are not here (looked in {DATA / 'speech_acts'}; set SOMA_TEST_DATA)")
    import torch

    from soma.model.acts import ActConfig, save_acts
    from soma.train.acts import f1_scores, train_acts

    torch.set_num_threads(1)
    parts = split_dialogues(DATA / "speech_acts")
    started = time.perf_counter()
    classifier, history = train_acts(parts["train"], parts["validation"], ActConfig(acts=list(LEARNED)))
    seconds = time.perf_counter() - started
    if given.model:
        save_acts(classifier.model, given.model)
    texts, before, labels, numbers = labelled(parts["test"])
    rows = classifier.probabilities(list(parts["test"].values()))
    flat = [
        row.argmax()
        for dialogue, scores in zip(parts["test"].values(), rows, strict=True)
        for turn, row in zip(dialogue, scores, strict=True)
        if turn.act is not None
    ]
    seen = labelled({**parts["train"], **parts["validation"]})
    systems = {
        "ours": np.array(flat),
        "majority class": np.full(len(labels), np.bincount(seen[2]).argmax()),
        "TF-IDF + logistic regression": logistic([seen[0]], seen[2], [texts]),
        "TF-IDF + logistic regression, turn before too": logistic([seen[0], seen[1]], seen[2], [texts, before]),
    }
    draws = {name: resampled(labels, predictions, numbers) for name, predictions in systems.items()}
    notes: dict[str, object] = {
        "training": {"seconds": round(seconds, 1), "threads": 1, "epochs": history},
        "turns": {part: len(labelled(dialogues)[2]) for part, dialogues in parts.items()},
        "dialogues": {part: len(dialogues) for part, dialogues in parts.items()},
        "held out by class": dict(zip(LEARNED, np.bincount(labels, minlength=len(LEARNED)).tolist(), strict=True)),
    }
    cases = []
    for name, predictions in systems.items():
        scores = f1_scores(labels, predictions, len(LEARNED))
        interval = np.quantile(draws[name], [0.025, 0.975]).round(4).tolist()
        notes[name] = {
            "macro_f1": round(float(scores.mean()), 4), "interval": interval,
            "accuracy": round(float((labels == predictions).mean()), 4),
            "f1": dict(zip(LEARNED, scores.round(4).tolist(), strict=True)),
        }  # fmt: skip
        if name != "ours":
            difference = np.quantile(draws["ours"] - draws[name], [0.025, 0.975]).round(4).tolist()
            notes[name]["ours minus this, interval"] = difference  # type: ignore[index]
            ours = float(f1_scores(labels, systems["ours"], len(LEARNED)).mean())
            cases.append(make_case("five labelled acts", "macro-F1", [ours], name, [float(scores.mean())]))
    rules = rules_on_cases()
    notes["rules"] = rules
    for name, figures in rules.items():
        for figure in ("precision", "recall"):
            cases.append(make_case(f"{name}: {figure}", figure, [figures[figure]], "all right", [1.0]))
    print(json.dumps(notes, indent=1))
    finish("speech_acts", given, cases, packages=["torch", "scikit-learn"])
    if given.json:
        (RESULTS / "speech_acts_notes.json").write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main()
