"""Chunks, BM25 and rank fusion, each against its definition."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from soma.serve.retrieval.chunks import cut, headings
from soma.serve.retrieval.encoders import estimate
from soma.serve.retrieval.search import fuse, read_where
from soma.serve.retrieval.words import document_weights, query_weights, term_id, words

GUIDE = """Intro line.

# Guide

## Install

Run pip. It takes a minute.

```
# no heading
```

## Use

First sentence here. Second sentence here.
Third line.
"""


def by_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def random_text(rng: random.Random, kind: str) -> str:
    parts = []
    for _ in range(rng.randint(1, 25)):
        sentence = " ".join(
            rng.choice(["word", "Fluß", "数据", "a" * rng.randint(1, 40)]) for _ in range(rng.randint(1, 30))
        )
        parts.append(rng.choice(["", "# ", "## ", "- "]) + sentence + rng.choice([". ", "\n", "\n\n", "。", "! "]))
    return "".join(parts)


def test_headings_cut_and_name_the_chunks() -> None:
    pieces = list(cut(GUIDE, "markdown", "Book", by_words, 30, 0))
    assert [piece.title for piece in pieces] == ["Book", "Book > Guide > Install", "Book > Guide > Use"]
    assert (
        GUIDE[pieces[1].start : pieces[1].end]
        == "# Guide\n\n## Install\n\nRun pip. It takes a minute.\n\n```\n# no heading\n```"
    )
    assert [piece.title for piece in cut(GUIDE, "python", "", by_words, 100, 0)] == [""], "# is a comment there"
    rst = "Guide\n=====\n\nHello there.\n\nInstall\n-------\n\nRun pip.\n"
    assert [found[2:] for found in headings(rst, "rst")] == [(1, "Guide"), (2, "Install")]
    assert [found[2:] for found in headings("Guide\n===\n\n| a |\n|---|\n", "markdown")] == [], "too short an underline"
    assert [found[2:] for found in headings("== Guide\ntext\n# no\n", "asciidoc")] == [(2, "Guide")]


@pytest.mark.parametrize("kind", ["markdown", "text", "python"])
def test_chunks_cover_the_text_within_the_budget(kind: str) -> None:
    rng = random.Random(7)
    for _ in range(60):
        text, budget = random_text(rng, kind), rng.randint(16, 60)
        overlap = rng.choice([0, budget // 4, budget // 2])
        pieces = list(cut(text, kind, "", by_words, budget, overlap))
        covered = set()
        for piece in pieces:
            body = text[piece.start : piece.end]
            assert body == body.strip() != ""
            # A sentence's tokens are counted alone, and words do not cross its borders: the sum is exact.
            assert len(body.split()) + len(piece.title.split()) <= budget
            covered |= set(range(piece.start, piece.end))
        assert all(one.start < two.start for one, two in pairwise(pieces))
        assert not "".join(letter for place, letter in enumerate(text) if place not in covered).strip(), "all of it"


def test_overlap_repeats_the_last_sentences_and_never_crosses_a_heading() -> None:
    text = "One two three. Four five six. Seven eight nine. Ten eleven twelve."
    made = [text[piece.start : piece.end] for piece in cut(text, "text", "", by_words, 6, 3)]
    assert made == [
        "One two three. Four five six.",
        "Four five six. Seven eight nine.",
        "Seven eight nine. Ten eleven twelve.",
    ]
    plain = [text[piece.start : piece.end] for piece in cut(text, "text", "", by_words, 6, 0)]
    assert plain == ["One two three. Four five six.", "Seven eight nine. Ten eleven twelve."]
    both = "# A\nOne two three.\n# B\nFour five six."
    assert [both[piece.start : piece.end] for piece in cut(both, "markdown", "", by_words, 8, 4)] == [
        "# A\nOne two three.", "# B\nFour five six.",
    ]  # fmt: skip


def test_a_paragraph_ends_a_full_chunk() -> None:
    text = "One two three. Four five.\n\nSix seven. Eight nine ten eleven."
    assert [text[piece.start : piece.end] for piece in cut(text, "text", "", by_words, 8, 0)] == [
        "One two three. Four five.", "Six seven. Eight nine ten eleven.",
    ]  # fmt: skip


def test_words() -> None:
    assert words("The Ｄanube's end: Straße, x_1 3.14") == ["the", "danube", "s", "end", "strasse", "x_1", "3", "14"]
    assert words("数据库abc 库") == ["数据", "据库", "abc", "库"]
    assert words("  ...  ") == []
    plurals = "Cities skies ties cats houses glass bus gas toes movies dies this canoes"
    assert words(plurals) == [
        "city",
        "sky",
        "tie",
        "cat",
        "house",
        "glass",
        "bus",
        "gas",
        "toe",
        "movy",
        "die",
        "thi",
        "canoe",
    ]
    assert estimate("a river") == 2
    assert estimate("数据") == 2
    assert estimate("") == 0


def test_bm25_is_the_formula() -> None:
    """Σ idf · tf (k1+1) / (tf + k1 (1 − b + b len/avg)) with the collection's own average, term by term."""
    rng = random.Random(3)
    texts = [
        " ".join(rng.choice(["river", "sea", "danube", "cat", "mat"]) for _ in range(rng.randint(3, 20)))
        for _ in range(30)
    ]
    average = sum(len(text.split()) for text in texts) / len(texts)
    question = "danube sea sea"
    for text in texts:
        score = 0.0
        for term in question.split():
            have = sum(term in other.split() for other in texts)
            idf = math.log(1 + (len(texts) - have + 0.5) / (have + 0.5))
            times = Counter(text.split())[term]
            score += idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * len(text.split()) / average))
        weights, asked = document_weights(text, average), query_weights(question)
        idfs = {
            term_id(term): math.log(1 + (len(texts) - have + 0.5) / (have + 0.5))
            for term in ("danube", "sea") for have in [sum(term in other.split() for other in texts)]
        }  # fmt: skip
        assert score == pytest.approx(sum(value * idfs[term] * weights.get(term, 0.0) for term, value in asked.items()))
    assert document_weights("river", 1.0) == {term_id("river"): pytest.approx(1.0)}


def test_fusion_is_reciprocal_ranks() -> None:
    assert fuse([["a", "b"], ["b"]]) == {"b": 1 / 12 + 1 / 11, "a": 1 / 11}
    assert list(fuse([["a", "b"], ["b", "a"]])) == ["a", "b"], "ties stay in order"
    assert fuse([]) == {}
    rng = random.Random(1)
    rankings = [rng.sample(range(20), 10) for _ in range(3)]
    for each, score in fuse(rankings, k=5).items():
        assert score == pytest.approx(sum(1 / (6 + ranking.index(each)) for ranking in rankings if each in ranking))


def test_filters_of_the_command_line() -> None:
    given = ["source=guide", "meta.year=2024", "meta.year=2025", "meta.name=x=y", "meta.list=[1]"]
    assert read_where(given) == {"source": "guide", "meta.year": [2024, 2025], "meta.name": "x=y", "meta.list": "[1]"}
