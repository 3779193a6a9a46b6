"""The quality classifier: worked numbers, what it learns, the same bytes from any order, and in a recipe."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from soma.base.errors import UserError
from soma.data.corpus import source_fingerprint
from soma.data.signals.linear import LinearScorer, auc, features, fit, probability
from soma.data.signals.scorers import open_scorer
from tests.data.test_against import build, dropped, kept

GOOD_TEXT = "the history of science describes how methods of inquiry were found tested and refined over centuries"
GOOD = GOOD_TEXT.split()
OTHER_TEXT = "click here buy now best cheap offer subscribe today free shipping login cart terms cookies"
OTHER = OTHER_TEXT.split()


def page(words: list[str], number: int) -> str:
    """Mostly of its own words, some of the other's."""
    draw = random.Random(number)
    both = GOOD + OTHER
    return " ".join(draw.choice(words if draw.random() < 0.7 else both) for _ in range(60))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    good = write(folder / "good.jsonl", [page(GOOD, n) for n in range(200)])
    other = write(folder / "other.jsonl", [page(OTHER, 1000 + n) for n in range(150)])
    found = fit([good], [other], folder / "quality.npz", buckets=1 << 14)
    assert (found.good, found.other) == (200, 150)
    assert found.held_out > 20
    assert found.auc > 0.97
    return folder / "quality.npz"


def test_worked_numbers() -> None:
    weights = np.full(4, np.log(3) / 2, np.float32)
    assert probability(weights, 0.0, np.arange(4)) == pytest.approx(0.75)
    assert auc(np.array([0.9, 0.4, 0.5, 0.1]), np.array([True, True, False, False])) == 0.75
    assert auc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    one, two, none, again = features(["a b", "b a", "", "A  b"], 1 << 20)
    assert (len(one), len(two), len(none)) == (3, 3, 0)
    assert len(set(one.tolist()) & set(two.tolist())) == 2  # the words, not the pair
    assert one.tolist() == again.tolist()


def test_it_tells_them_apart_and_chance_does_not(fitted: Path, tmp_path: Path) -> None:
    scorer = open_scorer(f"linear:{fitted}")
    good, other = (np.array(scorer.score([page(words, 5000 + n) for n in range(50)])) for words in (GOOD, OTHER))
    assert (good > 0.5).mean() > 0.9
    assert (other < 0.5).mean() > 0.9
    halves = [write(tmp_path / f"{name}.jsonl", [page(GOOD, start + n) for n in range(150)])
              for name, start in (("a", 0), ("b", 500))]  # fmt: skip
    found = fit([halves[0]], [halves[1]], tmp_path / "chance.npz", buckets=1 << 14)
    assert 0.2 < found.auc < 0.8


def test_the_same_bytes_from_any_order(tmp_path: Path) -> None:
    good, other = [page(GOOD, n) for n in range(40)], [page(OTHER, n) for n in range(40)]
    made = []
    for name, step in (("there", 1), ("back", -1)):
        sources = [
            [write(tmp_path / f"{name}-{kind}.jsonl", texts[::step])] for kind, texts in (("g", good), ("o", other))
        ]
        fit(sources[0], sources[1], tmp_path / f"{name}.npz", buckets=1 << 12)
        made.append((tmp_path / f"{name}.npz").read_bytes())
    assert made[0] == made[1]
    assert LinearScorer(tmp_path / "back.npz").name == LinearScorer(tmp_path / "there.npz").name


def test_a_recipe_filters_by_it(fitted: Path, tmp_path: Path) -> None:
    texts = {"good": page(GOOD, 7000), "other": page(OTHER, 7001)}
    filters = {"quality": {"scorer": f"linear:{fitted}", "min_score": 0.5}}
    corpus = build(tmp_path, "filtered", texts, filters=filters)
    assert set(kept(corpus)) == {"good"}
    assert dropped(corpus)["2"][0] == "quality.min_score"


def test_mistakes(tmp_path: Path, fitted: Path) -> None:
    from soma.data.config import DataConfig

    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(UserError, match="no classifier of `soma data quality`"):
        open_scorer(f"linear:{tmp_path / 'no.npz'}")
    few = write(tmp_path / "few.jsonl", [page(GOOD, 1)])
    with pytest.raises(UserError, match="GOOD: 1 documents are too few"):
        fit([few], [write(tmp_path / "o.jsonl", [page(OTHER, n) for n in range(40)])], tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"OTHER .*there is no text"):
        fit([few], [write(tmp_path / "empty.jsonl", [])], tmp_path / "x.npz")
    copy = tmp_path / "copy.npz"
    copy.write_bytes(fitted.read_bytes())
    config = DataConfig(sources=few, filters={"quality": {"scorer": f"linear:{copy}", "min_score": 0.1}})  # type: ignore[arg-type]
    before = source_fingerprint(config)
    with np.load(fitted) as file:
        np.savez_compressed(copy, **{**file, "bias": np.float64(1.0)})
    assert source_fingerprint(config) != before
