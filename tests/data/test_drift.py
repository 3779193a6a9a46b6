"""Drift, anomalies and bias: nothing where there is nothing, what is planted where it is planted."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soma.data.profile import anomalies as unusual
from soma.data.profile import significance as tests
from soma.data.profile.bias import Bias, coverage, log_odds, mentions, terms, tone
from soma.data.profile.drift import _number, drift
from soma.data.profile.scan import Options, Summary, scan
from soma.data.profile.sketch import Categories, Numbers
from soma.data.signals.scorers import WordList

PLAIN = Options(signals=("gopher_quality",), bias=False)
TOPICS = {
    "sea": ["harbour", "sailor", "storm", "anchor", "tide", "deck", "captain", "island", "wave", "net"],
    "town": ["market", "street", "bridge", "tower", "square", "tram", "baker", "mayor", "station", "school"],
    "law": ["court", "judge", "contract", "clause", "appeal", "verdict", "statute", "witness", "claim", "trial"],
}
GLUE = ["the", "of", "and", "to", "that", "with", "have", "was", "after", "before", "near", "some", "every", "new"]


def document(pick: random.Random, topics: tuple[str, ...] = ("sea", "town"), scale: float = 1.0) -> dict[str, object]:
    """Words in bursts, as real texts have them: a document keeps to few words of one topic."""
    topic = TOPICS[pick.choice(topics)]
    own = pick.sample(topic, 5)
    words = [
        pick.choice(own if pick.random() < 0.4 else GLUE) for _ in range(int(scale * pick.lognormvariate(4.5, 0.6)))
    ]
    return {
        "text": " ".join(["It", *words]) + ".",
        "label": pick.choice("ab"),
        "url": f"https://{pick.choice('xyz')}.org/",
    }


def summary_of(tmp_path: Path, rows: list[dict[str, object]], options: Options = PLAIN) -> Summary:
    place = tmp_path / f"v{len(list(tmp_path.iterdir()))}"
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scan([str(place / "rows.jsonl")], place / "work", options)[0]


def verdicts(found: dict) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in [*found["attributes"], found["words"]]}


# --- Statistics against their definitions ---


def test_tails_and_worked_numbers() -> None:
    assert tests.chi2_tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert tests.chi2_tail(11.0705, 5) == pytest.approx(0.05, abs=1e-6)
    assert tests.chi2_tail(124.3421, 100) == pytest.approx(0.05, abs=1e-6)
    assert tests.chi2_tail(4000, 3) == 0.0
    assert tests.chi2_quantile(0.95, 1) == pytest.approx(3.841459, abs=1e-5)
    assert tests.kolmogorov_tail(1.3581) == pytest.approx(0.05, abs=1e-5)
    assert tests.psi([500, 500], [600, 400])[0] == pytest.approx(0.0404, abs=2e-4)
    v, p = tests.chi_square([10, 90], [20, 80])
    assert (round(v, 3), round(p, 4)) == (0.140, 0.0477)
    assert tests.wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert tests.holm([0.01, 0.04]) == [0.02, 0.04]
    assert tests.holm([0.04, 0.03, 0.01]) == pytest.approx([0.06, 0.06, 0.03])
    same, apart = np.array([3, 1, 0]), np.array([0, 0, 5])
    assert tests.js_divergence(same, 2 * same) == 0
    assert tests.js_divergence(same, apart) == 1


def test_tails_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(50):
        x, freedom = float(generator.uniform(0.01, 200)), int(generator.integers(1, 150))
        assert tests.chi2_tail(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-9, abs=1e-300)
    for x in (0.3, 0.8, 1.7):
        assert tests.kolmogorov_tail(x) == pytest.approx(stats.kstwobign.sf(x), rel=1e-9)
    left, right = generator.normal(size=300), generator.normal(0.2, size=400)
    steps = [np.unique(side, return_counts=True) for side in (left, right)]
    found = stats.ks_2samp(left, right, method="asymp")
    assert tests.ks(*steps)[0] == pytest.approx(found.statistic)
    assert tests.ks(*steps)[1] == pytest.approx(found.pvalue, rel=0.25)


# --- Drift ---


def test_random_halves_of_one_corpus_do_not_drift(tmp_path: Path) -> None:
    for seed in range(6):
        pick = random.Random(seed)
        rows = [document(pick) for _ in range(240)]
        found = drift(summary_of(tmp_path, rows[:120]), summary_of(tmp_path, rows[120:]))
        assert found["verdict"] == "none", verdicts(found)


def test_planted_drift_is_found_where_it_is(tmp_path: Path) -> None:
    pick = random.Random(7)
    base = summary_of(tmp_path, [document(pick) for _ in range(150)])
    longer = drift(base, summary_of(tmp_path, [document(pick, scale=2.2) for _ in range(150)]))
    assert verdicts(longer)["chars"] == "large"
    assert longer["words"]["verdict"] == "none"
    assert verdicts(longer)["domain"] == "none"
    topic = drift(base, summary_of(tmp_path, [document(pick, ("sea", "law")) for _ in range(150)]))
    assert topic["words"]["verdict"] in ("medium", "large")
    assert {one["name"] for one in topic["words"]["changed"][:12]} <= {*TOPICS["law"], *TOPICS["town"], *TOPICS["sea"]}
    assert set(topic["words"]["new"]) == set(TOPICS["law"])
    assert verdicts(topic)["domain"] == "none"
    moved = [document(pick) | {"url": "https://new.org/", "label": "a", "extra": 1} for _ in range(150)]
    other = drift(base, summary_of(tmp_path, moved))
    assert verdicts(other)["domain"] == "large"
    assert verdicts(other)["label label"] in ("medium", "large")
    (domains,) = (row for row in other["attributes"] if row["name"] == "domain")
    assert domains["new"] == ["new.org"]
    assert set(domains["missing"]) == {"x.org", "y.org", "z.org"}
    assert other["fields"] == {"new": ["extra"], "missing": [], "changed": []}


def test_a_verdict_needs_both_significance_and_size() -> None:
    generator = np.random.default_rng(3)

    def numbers(count: int, mean: float) -> Numbers:
        found = Numbers()
        found.add(generator.normal(mean, 1, count))
        return found

    many = _number("x", numbers(60_000, 0), numbers(60_000, 0.05))
    assert many["p"] < 1e-6
    assert many["size"] == 0
    few = [_number("x", numbers(25, 0), numbers(25, 0)) for _ in range(40)]  # chance alone makes a large effect
    assert all(row["size"] > 0 for row in few)
    assert sum(row["p"] > 0.01 for row in few) >= 38
    assert _number("x", numbers(3, 0), numbers(90, 9))["verdict"] == "unknown"
    # d deviations apart: D is 2 Φ(d/2) − 1, PSI about d²; the larger of the two words counts.
    half = _number("x", numbers(60_000, 0), numbers(60_000, 0.45))
    assert half["ks"] == pytest.approx(2 * tests.NORMAL.cdf(0.225) - 1, abs=0.01)
    assert half["psi"] == pytest.approx(0.45**2, rel=0.1)
    assert half["size"] == 2


@pytest.mark.slow
def test_halves_of_c4_do_not_drift_and_wikitext_is_something_else(
    tmp_path: Path, shared_data: Callable[[str], Path]
) -> None:
    rows = [json.loads(line) for line in shared_data("web_jsonl/c4_demo.jsonl").open()]
    random.Random(1).shuffle(rows)
    options = Options(bias=False)
    halves = [summary_of(tmp_path, part, options) for part in (rows[:150], rows[150:])]
    assert drift(*halves)["verdict"] == "none"
    (tmp_path / "wiki.raw").write_bytes(shared_data("wikitext2/test.txt").read_bytes())
    wiki = scan([str(tmp_path / "wiki.raw")], tmp_path / "w", options)[0]
    found = drift(halves[0], wiki)
    assert found["verdict"] == "large"
    assert found["words"]["verdict"] == "large"


# --- Anomalies ---


def test_planted_anomalies_are_found_with_their_reasons() -> None:
    generator = np.random.default_rng(5)
    count, planted = 1000, 12
    length = generator.lognormal(7, 0.8, count)
    values = {
        "chars": length, "words": length / 5.5 * generator.normal(1, 0.03, count),
        "alpha_words": 1 - generator.beta(2, 20, count),
        "emails": (generator.random(count) < 0.05) * generator.integers(1, 4, count).astype(float),
    }  # fmt: skip
    places = generator.choice(count, planted, replace=False)
    for number, place in enumerate(places):
        if number % 3 == 0:
            values["emails"][place] = 80.0
        elif number % 3 == 1:
            values["alpha_words"][place] = 0.1
        else:  # each value is usual alone, together they are not: four times as many characters for a word
            values["words"][place] = values["chars"][place] / 22
    model = unusual.fit(values)
    assert model is not None
    score_N, z_NA = model.scores(values)
    top = np.argsort(-score_N)[:planted]
    assert len(set(top.tolist()) & set(places.tolist())) / planted >= 0.9  # precision at k
    assert (score_N > model.threshold).mean() < 0.03
    reasons = [model.reasons(z_NA[place])[0][0] for place in places]
    assert reasons[0::3] == ["emails"] * 4
    assert reasons[1::3] == ["alpha_words"] * 4
    assert set(reasons[2::3]) <= {"words", "chars"}
    # Negative control: by plain z-scores of each attribute alone those of the third kind are not seen.
    plain = np.abs(np.stack([(v - v.mean()) / v.std() for v in values.values()], 1)).max(1)
    assert not set(np.argsort(-plain)[:planted].tolist()) >= set(places[2::3].tolist())


def test_shrunk_covariance_is_that_of_scikit_learn() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    x_NA = np.random.default_rng(2).normal(size=(80, 6)) @ np.random.default_rng(3).normal(size=(6, 6))
    x_NA -= x_NA.mean(0)
    ours = unusual.shrunk_covariance(x_NA)
    theirs = covariance.ledoit_wolf(x_NA, assume_centered=True)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_too_few_or_equal_documents_have_no_anomalies() -> None:
    assert unusual.fit({"a": np.arange(10.0)}) is None
    assert unusual.fit({"a": np.ones(100)}) is None
    assert unusual.fit({}) is None


# --- Bias ---


def test_terms_and_tone() -> None:
    words = "the Trans woman and her gay friends met two old people".lower().split()
    assert mentions(words) == [
        ("orientation and trans", "transgender"), ("gender", "women"), ("orientation and trans", "gay"), ("age", "old"),
    ]  # fmt: skip
    assert tone("a good and honest man".split()) == 1  # noqa: SIM905
    assert tone(["not", "good"]) == -1
    assert tone(["nothing"]) == 0
    assert tone(["kind", "but", "lazy"]) == 0
    lists = json.loads((Path(unusual.__file__).parent / "sentiment_words.json").read_text())
    toned = {*lists["positive"], *lists["negative"]}
    assert not set(lists["positive"]) & set(lists["negative"])
    assert not toned & set(terms()[0])  # naming a group must not be praise or blame in itself


def test_planted_bias_is_measured() -> None:
    pick = random.Random(4)
    bias = Bias()
    for number in range(120):
        lines = [f"She was a {pick.choice(['lazy', 'quiet'])} nurse in the house."] if number % 2 else []
        lines += [f"He was a {pick.choice(['brilliant', 'tall'])} engineer of the works." for _ in range(2)]
        bias.add(f"{number}", "made", " ".join(lines))
    gender = {one["group"]: one for one in bias.report()["axes"][0]["groups"]}
    assert (gender["women"]["mentions"], gender["women"]["documents"], gender["men"]["mentions"]) == (60, 60, 240)
    assert gender["women"]["share"] == 0.5
    low, high = gender["women"]["interval"]
    assert low < 0.5 < high
    assert high - low < 0.2
    assert gender["women"]["beside"][0]["word"] == "nurse" or gender["women"]["beside"][0]["word"] == "house"
    assert "engineer" in [one["word"] for one in gender["men"]["beside"]]
    assert gender["women"]["tone_interval"][1] < 0 < gender["men"]["tone_interval"][0]
    assert gender["women"]["examples"][0]["tone"] == -1
    assert bias.report()["axes"][0]["absent"] == ["non-binary"]


def test_parts_merge_and_a_scorer_judges_sentences(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("nurse\n")
    halves, whole = [Bias(), Bias()], Bias()
    for number in range(40):
        text = f"She is the nurse of ward {number}. He waits."
        halves[number % 2].add(str(number), "made", text)
        whole.add(str(number), "made", text)
    halves[0].merge(halves[1])
    scorer = WordList(tmp_path / "words.txt")
    assert halves[0].report(scorer) == whole.report(scorer)
    women, men = whole.report(scorer)["axes"][0]["groups"]
    assert women["score"]["mean"] == pytest.approx(1 / 7)
    assert men["score"]["mean"] == 0


def test_log_odds_and_coverage_by_hand() -> None:
    group, rest = Categories(), Categories()
    group.add_counts({"nurse": 30, "work": 50})
    rest.add_counts({"engineer": 40, "work": 60})
    word, _ = log_odds(group, rest)
    prior = 500 * 30 / 180
    odds = math.log((30 + prior) / (80 + 500 - 30 - prior)) - math.log(prior / (100 + 500 - prior))
    assert word["word"] == "nurse"
    assert word["z"] == pytest.approx(odds / math.sqrt(1 / (30 + prior) + 1 / prior))
    even = Categories()
    even.add(["a", "b", "c", "d", None])
    assert coverage(even)["effective"] == pytest.approx(4)
    assert coverage(even)["unknown"] == 1
