"""Signals against a plain reference on random texts, the published thresholds, and decisions apart from measuring."""

import json
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from soma.data.signals import gopher, web
from soma.data.signals.config import FiltersConfig, GopherQuality
from soma.data.signals.language import identifier, sample
from soma.data.signals.measure import Measurer, decide
from soma.data.signals.parse import Parser
from soma.data.signals.words import SENTENCE_ENDS, STOP_WORDS, SYMBOLS, cut_chunk

CUTS = {
    "don't": "do n't", "Don't,": "Do n't ,", '("Hello,"': '( " Hello , "', "cannot": "can not", "Mr.": "Mr.",
    "end.": "end .",
    "U.S.": "U.S.", "NASA.": "NASA .", "well-known": "well - known", "10am": "10 am", "5km": "5 km", "$5": "$ 5",
    "www.example.com/a?b=1": "www.example.com/a?b=1", "end.The": "end . The", "wait...": "wait ...", "and/or": "and/or",
    "him/her": "him / her", "John's": "John 's", "1,000": "1,000", "a,b": "a , b", "3.14": "3.14", "…": "…",
    "its": "its",
    "she'll've": "she 'll 've", "日本。": "日本 。", "20°C": "20 ° C", "--": "--", "e-mail@x.org": "e-mail@x.org",
}  # fmt: skip


@pytest.mark.parametrize("chunk", CUTS)
def test_words_are_cut_as_spacy_cuts_them(chunk: str) -> None:
    assert " ".join(cut_chunk(chunk)) == CUTS[chunk]  # taken from spaCy 3.8, spacy.blank("en")


def test_a_cut_loses_nothing() -> None:
    generator = random.Random(5)
    letters = "ab.Z9'’\"-,:/…(°☃$%s漢+"
    for _ in range(3000):
        chunk = "".join(generator.choice(letters) for _ in range(generator.randrange(1, 12)))
        assert "".join(cut_chunk(chunk)) == chunk
        assert all(cut_chunk(chunk))


# --- The plain reference: one document at a time, as the papers and datatrove say it ---


def words_of(text: str) -> list[str]:
    return [word for chunk in text.split() for word in cut_chunk(chunk)]


def seen_before(parts: Sequence[str]) -> tuple[int, int]:
    seen: set[str] = set()
    again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return len(again), sum(map(len, again))


def top(words: list[str], n: int) -> int:
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(gram) * count


def duplicate(words: list[str], n: int) -> int:
    seen, chars, i = set(), 0, 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        if gram in seen:
            chars, i = chars + len("".join(gram)), i + n
        else:
            seen.add(gram)
            i += 1
    return chars


def reference(text: str) -> dict[str, float]:
    words, lines = words_of(text), text.splitlines() or [""]
    plain = [word for word in words if not SYMBOLS.issuperset(word)]
    count = max(1, len(words))
    found: dict[str, float] = {
        "words": len(words), "plain_words": len(plain), "mean_word_chars": sum(map(len, plain)) / max(1, len(plain)),
        "hashes_per_word": text.count("#") / count, "ellipses_per_word": (text.count("...") + text.count("…")) / count,
        "bullet_lines": sum(line.lstrip()[:1] in ("•", "-") and bool(line.strip()) for line in lines) / len(lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines),
        "alpha_words": sum(any(c.isalpha() for c in word) for word in words) / count,
        "stop_words": len(set(words) & set(STOP_WORDS)),
    }  # fmt: skip
    import re

    parts = re.split("\n+", text)
    found["dup_lines"], found["dup_line_chars"] = (
        a / b for a, b in zip(seen_before(parts), (len(parts), len(text)), strict=True)
    )
    parts = re.split("\n{2,}", text.strip())
    again = seen_before(parts)
    found["dup_paragraphs"], found["dup_paragraph_chars"] = again[0] / len(parts), again[1] / len(text)
    found |= {f"top_{n}gram": top(words, n) / len(text) for n in gopher.TOP}
    found |= {f"dup_{n}gram": duplicate(words, n) / len(text) for n in gopher.DUPLICATE}
    full = [line for line in text.split("\n") if line.strip()]
    found["lines_ending_sentence"] = sum(line.endswith(web.STOP_CHARS) for line in full) / max(1, len(full))
    found["short_lines"] = sum(len(line) <= 30 for line in full) / max(1, len(full))
    found["dup_line_chars_flat"] = seen_before(full)[1] / max(1, len(text.replace("\n", "")))
    found["line_ends_per_word"] = text.count("\n") / count
    return found | {f"c4_{name}": value for name, value in reference_c4(text).items()}


def reference_c4(text: str) -> dict[str, float]:
    lorem, curly, sentences, kept = 0, 0, 0, 0
    for line in text.split("\n"):
        words = line.split()
        line = web.CITATION.sub("", line.strip())
        if any(len(word) > 1000 for word in words) or not line.endswith((".", "?", "!", '"', "'")):
            continue
        if line.endswith("...") or len(words) < 3:
            continue
        lorem += "lorem ipsum" in line.lower()
        if "javascript" in line.lower():
            continue
        curly += "{" in line
        if any(phrase in line.lower() for phrase in web.POLICY):
            continue
        kept += 1
        sentences += reference_sentences(line)
    return {
        "lorem_ipsum": lorem, "curly": curly, "sentences": sentences, "lines": kept / len(text.split("\n")),
    }  # fmt: skip


def reference_sentences(line: str) -> int:
    import unicodedata

    count, ended = 1, False
    for word in words_of(line):
        if word in SENTENCE_ENDS:
            ended = True
        elif ended and not all(unicodedata.category(c)[0] == "P" for c in word):
            count, ended = count + 1, False
    return count


PIECES = [
    "the", "and", "to be", "cat", "Dog", "12", "#", "...", "…", "word", "That's", "it.", "No!", '"', "{", "[1]", "a-b",
    "–", "日本", "lorem ipsum", "JavaScript", "privacy policy", "- item", "• item", "one two three four five six",
    "x" * 1001,
]  # fmt: skip
ENDS = [" ", " ", " ", " ", " ", "\n", ".\n", "\n\n", "...\n", ". ", "\n- "]


def random_text(generator: random.Random) -> str:
    pieces = generator.sample(PIECES, generator.randrange(2, len(PIECES)))
    text = "".join(generator.choice(pieces) + generator.choice(ENDS) for _ in range(generator.randrange(1, 120)))
    return text.strip() or "word"


def measured(texts: list[str], signals: list[str]) -> list[dict[str, float]]:
    columns = Measurer(signals).measure(texts)
    return [{name: values[row] for name, values in columns.items()} for row in range(len(texts))]


ALL = ["gopher_quality", "gopher_repetition", "c4", "fineweb"]


def test_a_batch_agrees_with_the_plain_reference() -> None:
    generator = random.Random(random.randrange(10**9))
    texts = [random_text(generator) for _ in range(150)] + ["a", "one.", "#", "a\nb", "…"]
    for text, found in zip(texts, measured(texts, ALL), strict=True):
        expected = reference(text)
        assert set(found) == set(expected)
        wrong = {name: (found[name], value) for name, value in expected.items() if found[name] != pytest.approx(value)}
        assert not wrong, text
    # Negative control: n-grams counted over the whole batch, not by document, are other figures.
    together = measured([" ".join(texts[:20])], ["gopher_repetition"])[0]
    assert any(together["dup_5gram"] != pytest.approx(reference(text)["dup_5gram"]) for text in texts[:20])


def test_the_company_of_a_text_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(11)
    texts = [random_text(generator) for _ in range(30)]
    signals = [*ALL, "refinedweb", "c4_any"]
    whole = measured(texts, signals)
    alone = [measured([text], signals)[0] for text in texts]
    assert whole == alone
    monkeypatch.setattr("soma.data.signals.parse.MAX_TYPES", 5)  # the memory of words is emptied all the time
    measurer = Measurer(signals)
    forgetful = [measurer.measure(texts[i : i + 3]) for i in range(0, 30, 3)]
    for name in whole[0]:
        assert np.concatenate([part[name] for part in forgetful]).tolist() == [row[name] for row in whole]
    assert measured([], ALL) == []
    assert [row["words"] for row in measured(["", "  \n "], ALL)] == [0, 0]


def test_text_that_c4_and_refinedweb_leave() -> None:
    text = (
        "Home\nA sentence that stays [12] here.\nWe use cookies on this page.\nTurn on JavaScript now.\n"
        '"Quoted to the end"\nno end'
    )
    assert web.c4_text(text) == 'A sentence that stays  here.\n"Quoted to the end"'
    assert web.c4_text("no end at all", terminal=False) == "no end at all"
    lines = [
        "3 likes",
        "SUBSCRIBE TO OUR LIST",
        "12:30 45",
        "Home",
        "Sign in to your account",
        "A report. Read more...",
        "A normal line of text.",
    ]
    assert [web.refinedweb_line(line) for line in lines] == [True] * 6 + [False]
    assert web.refinedweb_text("\n".join(lines)) == lines[-1]
    found = measured(["one two three four\nHome", "\n".join(lines)], ["refinedweb"])
    assert found[0]["flagged_words"] == pytest.approx(1 / 5)
    assert found[1]["flagged_words"] == pytest.approx(18 / 23)


# --- Decisions ---


def test_presets_carry_the_published_thresholds() -> None:
    gopher_ = FiltersConfig(presets=["gopher"])
    assert gopher_.gopher_quality == GopherQuality()
    assert gopher_.families == ["gopher_repetition", "gopher_quality"]
    fineweb = FiltersConfig(presets=["fineweb"], fineweb={"max_short_lines": 0.5}, language={"keep": ["de"]})  # type: ignore[arg-type]
    assert fineweb.fineweb is not None
    assert (fineweb.fineweb.max_short_lines, fineweb.fineweb.min_lines_ending_sentence) == (0.5, 0.12)
    assert fineweb.language is not None
    assert fineweb.language.keep == ["de"]
    assert "c4_any" in fineweb.signals
    assert "c4" in FiltersConfig(presets=["c4"]).signals
    assert {rule.name: rule.threshold for rule in gopher_.rules()}["gopher_repetition.max_top_3gram"] == 0.18
    off = FiltersConfig(gopher_quality={"min_words": None})  # type: ignore[arg-type]
    assert "gopher_quality.min_words" not in [rule.name for rule in off.rules()]
    with pytest.raises(ValueError, match="max_wrds"):
        FiltersConfig(gopher_quality={"max_wrds": 5})  # type: ignore[arg-type]


def test_another_threshold_measures_nothing_again() -> None:
    texts = ["the cat and the dog. " * 4, "the cat of words that have no end " * 30]
    attributes = Measurer(["gopher_quality"]).measure(texts)
    few = FiltersConfig(gopher_quality={"min_words": 60})  # type: ignore[arg-type]
    reason_D, names, details = decide(attributes, few, 2)
    assert [names[number] if number >= 0 else "" for number in reason_D] == ["gopher_quality.min_words", ""]
    assert details == ["plain_words = 20, at least 60", ""]
    none = FiltersConfig(gopher_quality={"min_words": 20})  # type: ignore[arg-type]
    assert (decide(attributes, none, 2)[0] == -1).all()


def test_languages_and_scores() -> None:
    german = "Dies ist ein deutscher Satz mit einigen Wörtern, die niemand verwechseln kann."
    english = "This is an English sentence with some words that nobody could take for anything else."
    assert [identifier().classify(text)[0] for text in (german, english)] == ["de", "en"]

    class Length:
        def score(self, texts: Sequence[str]) -> list[float]:
            return [len(text) for text in texts]

    filters = FiltersConfig(language={"keep": ["en"]}, quality={"max_score": 80})  # type: ignore[arg-type]
    attributes = Measurer(filters.signals, Length()).measure([german, english, english[:70]])
    reason_D, names, details = decide(attributes, filters, 3)
    assert [names[number] if number >= 0 else "" for number in reason_D] == ["language.keep", "quality.max_score", ""]
    assert details[0] == "language = de, kept: en"
    with pytest.raises(ValueError, match=r"filters\.quality: needs a scorer"):
        Measurer(["quality"]).measure([english])
    assert len(sample("x" * 100_000)) < 4100


def test_real_pages(shared_data) -> None:  # type: ignore[no-untyped-def]
    lines = shared_data("web_jsonl/c4_demo.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:60]]
    for text, found in zip(texts, measured(texts, ALL), strict=True):
        expected = reference(text)
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    parser = Parser()
    batch = parser.parse(texts)
    assert batch.word_counts.tolist() == [len(words_of(text)) for text in texts]
