"""Whom a corpus speaks of, and in what words: counts of identity terms, what stands beside them, the tone around them.

Terms and words of tone are lists of our own in this folder (`identity_terms.json`, `sentiment_words.json`). Figures
have intervals over documents, since sentences of one document are alike. What they do not say is in `CAVEATS`, and the
report prints it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from soma.data.profile.significance import NORMAL, wilson
from soma.data.profile.sketch import Categories, Numbers, Sample
from soma.data.signals.measure import Scorer

FOLDER = Path(__file__).parent
WORD = re.compile(r"\w+(?:['’]\w+)*")
SENTENCE = re.compile(r"[.!?]+[\s\"'”’)]+|\n+")
SENTENCES = 300  # of a group, kept as examples and for a scorer
SENTENCE_CHARS = 400
BESIDE = 5000  # words counted beside a group
PRIOR = 500.0  # words that the prior counts for
MIN_BESIDE = 5  # times that a word must stand beside a group to be listed
NEGATION = 3  # words after a negator whose tone turns round
LISTED = 12
CAVEATS = (
    "Terms are English words matched as they are written: names, euphemisms and other languages are not counted, and a "
    "word with several senses (Turkish people and turkey cocks, King as a name) counts each time.",
    "Many mentions are not good treatment, and few are not exclusion: read the examples before acting on a figure.",
    "Tone is that of the whole sentence, not of what is said about the group, by a list of words that knows no irony.",
    "What stands beside a group is what the texts report, quote and deny as well as what they claim.",
    "A balanced corpus does not make a balanced model; measure the model, too.",
)


@lru_cache(maxsize=1)
def terms() -> tuple[dict[str, tuple[str, str]], dict[str, list[str]]]:
    """({term: (axis, group)}, {axis: groups}); terms are small letters, of several words with a space between."""
    axes = json.loads((FOLDER / "identity_terms.json").read_text(encoding="utf-8"))["axes"]
    found = {term: (axis, group) for axis, groups in axes.items() for group, words in groups.items() for term in words}
    return found, {axis: list(groups) for axis, groups in axes.items()}


@lru_cache(maxsize=1)
def _single_and_phrases() -> tuple[dict[str, tuple[str, str]], dict[str, list[tuple[str, ...]]]]:
    """Terms of one word, and those of several by their first word, the longest first."""
    single = {term: of for term, of in terms()[0].items() if " " not in term}
    phrases: dict[str, list[tuple[str, ...]]] = {}
    for term in sorted(terms()[0], key=lambda term: -len(term.split())):
        if " " in term:
            phrases.setdefault(term.split()[0], []).append(tuple(term.split()))
    return single, phrases


@lru_cache(maxsize=1)
def stop_words() -> frozenset[str]:
    """Words that say nothing of what they stand beside."""
    return frozenset(json.loads((FOLDER / "identity_terms.json").read_text(encoding="utf-8"))["stop_words"])


@lru_cache(maxsize=1)
def _tones() -> tuple[dict[str, int], frozenset[str]]:
    lists = json.loads((FOLDER / "sentiment_words.json").read_text(encoding="utf-8"))
    tones = dict.fromkeys(lists["positive"], 1) | dict.fromkeys(lists["negative"], -1)
    return tones, frozenset(lists["negators"])


def tone(words: Sequence[str]) -> float:
    """−1 (all words of blame) to 1 (all of praise), 0 where there is neither; a negator turns the next words round.

    `tone("a good and honest man".split())` is 1, `tone("not good".split())` −1.
    """
    tones, negators = _tones()
    total, count, turned = 0, 0, -1
    for place, word in enumerate(words):
        if word in negators:
            turned = place + NEGATION
        elif value := tones.get(word):
            total += -value if place <= turned else value
            count += 1
    return total / count if count else 0.0


def mentions(words: Sequence[str]) -> list[tuple[str, str]]:
    """The (axis, group) of every identity term in these words; a term of several words counts once, as itself."""
    single, phrases = _single_and_phrases()
    found, place = [], 0
    while place < len(words):
        word = words[place]
        for phrase in phrases.get(word, ()):
            if tuple(words[place : place + len(phrase)]) == phrase:
                found.append(terms()[0][" ".join(phrase)])
                place += len(phrase)
                break
        else:
            if word in single:
                found.append(single[word])
            place += 1
    return found


class Group:
    """What was counted for one group."""

    def __init__(self) -> None:
        self.mentions, self.documents, self.sentences = 0, 0, 0
        self.beside = Categories(BESIDE)
        self.tone = Numbers()  # mean tone of a document's sentences about the group
        self.examples = Sample(SENTENCES)

    def merge(self, other: "Group") -> None:
        """Take in another part's counts."""
        self.mentions += other.mentions
        self.documents += other.documents
        self.sentences += other.sentences
        self.beside.merge(other.beside)
        self.tone.merge(other.tone)
        self.examples.merge(other.examples)


class Bias:
    """Counts over documents, part by part."""

    def __init__(self) -> None:
        self.documents = 0
        self.groups = {(axis, group): Group() for axis, groups in terms()[1].items() for group in groups}

    def add(self, ident: str, source: str, text: str) -> None:
        """One document."""
        self.documents += 1
        tones: dict[tuple[str, str], list[float]] = {}
        for number, sentence in enumerate(SENTENCE.split(text)):
            words = WORD.findall(sentence.lower().replace("’", "'"))
            found = Counter(mentions(words))
            if not found:
                continue
            value = tone(words)
            beside = {word for word in words if len(word) > 2 and word not in stop_words() and word not in terms()[0]}
            for of, count in found.items():
                group = self.groups[of]
                group.mentions += count
                group.sentences += 1
                group.beside.add_counts(dict.fromkeys(sorted(beside), 1))
                group.examples.add(f"{ident}#{number}", (source, sentence.strip()[:SENTENCE_CHARS], value))
                tones.setdefault(of, []).append(value)
        for of, values in tones.items():
            self.groups[of].documents += 1
            self.groups[of].tone.add([sum(values) / len(values)])

    def merge(self, other: "Bias") -> None:
        """Take in another part's counts."""
        self.documents += other.documents
        for of, group in other.groups.items():
            self.groups[of].merge(group)

    def report(self, scorer: Scorer | None = None) -> dict[str, Any]:
        """`{"documents", "axes": [{axis, groups: [{group, mentions, documents, share, interval, tone, tone_interval,
        score, beside: [{word, count, z}], examples}]}], "caveats"}`; groups without a mention are named in `absent`.

        `tone`: mean over the documents that mention the group; `score`: of the scorer, over a sample of sentences.
        """
        axes = []
        for axis, names in terms()[1].items():
            there = [(name, self.groups[axis, name]) for name in names if self.groups[axis, name].mentions]
            groups = [self._group(axis, name, group, scorer) for name, group in there]
            absent = [name for name in names if not self.groups[axis, name].mentions]
            axes.append({"axis": axis, "groups": groups, "absent": absent})
        return {"documents": self.documents, "axes": axes, "caveats": list(CAVEATS)}

    def _group(self, axis: str, name: str, group: Group, scorer: Scorer | None) -> dict[str, Any]:
        rest = Categories(BESIDE)
        for other, counted in self.groups.items():
            if other[0] == axis and other[1] != name:
                rest.merge(counted.beside)
        sample = group.examples.drawn()
        scored = _scored(scorer, [sentence for _, sentence, _ in sample]) if scorer is not None and sample else None
        ranked = sorted(sample, key=lambda one: -abs(one[2]))[:3]
        return {
            "group": name, "mentions": group.mentions, "documents": group.documents, "sentences": group.sentences,
            "share": group.documents / max(1, self.documents), "interval": wilson(group.documents, self.documents),
            "tone": group.tone.mean, "tone_interval": mean_interval(group.tone), "score": scored,
            "beside": log_odds(group.beside, rest)[:LISTED],
            "examples": [{"source": source, "text": text, "tone": value} for source, text, value in ranked],
        }  # fmt: skip


def _scored(scorer: Scorer, sentences: list[str]) -> dict[str, Any]:
    values = Numbers()
    values.add(list(scorer.score(sentences)))
    return {"mean": values.mean, "interval": mean_interval(values), "sentences": values.count, "scorer": scorer.name}


def mean_interval(values: Numbers) -> tuple[float, float] | None:
    """95 % interval of a mean by the normal distribution; None for fewer than 10 values, where that says nothing."""
    if values.count < 10:
        return None
    half = NORMAL.inv_cdf(0.975) * values.std / math.sqrt(values.count)
    return values.mean - half, values.mean + half


def log_odds(group: Categories, rest: Categories) -> list[dict[str, Any]]:
    """Words that stand beside a group more than beside the others of its axis: [{word, count, z}], by z.

    The log-odds ratio with an informative Dirichlet prior, over its deviation (Monroe, Colaresi and Quinn 2008,
    equations 16, 20 to 22). Since sentences of one document are alike, |z| is too large: read it as an order, not as a
    test.
    """
    total = Counter(group.counts) + Counter(rest.counts)
    everything = max(1, sum(total.values()))
    sides = [max(1, sum(counts.counts.values())) for counts in (group, rest)]
    found = []
    for word, count in group.counts.items():
        if count < MIN_BESIDE:
            continue
        prior = PRIOR * total[word] / everything
        here, there = count + prior, rest.counts[word] + prior
        odds = [math.log(side / (size + PRIOR - side)) for side, size in zip((here, there), sides, strict=True)]
        z = (odds[0] - odds[1]) / math.sqrt(1 / here + 1 / there)
        if z > 0:
            found.append((z, word, count))
    return [
        {"word": word, "count": count, "z": z} for z, word, count in sorted(found, key=lambda one: (-one[0], one[1]))
    ]


def coverage(counts: Categories, listed: int = 20) -> dict[str, Any]:
    """How documents spread over categories: `{"documents", "distinct", "effective", "top": [{name, count, share,
    interval}], "unknown"}`. `effective`: e to the entropy, as many as there would be if all were of one size (Hill
    1973).
    """
    values = np.array(list(counts.counts.values()), np.float64)
    shares = values / max(1.0, values.sum())
    total = counts.count
    return {
        "documents": total + counts.nulls, "unknown": counts.nulls, "distinct": counts.distinct,
        "effective": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
        "top": [{"name": name, "count": count, "share": count / total, "interval": wilson(count, total)}
                for name, count in counts.ranked(listed)],
    }  # fmt: skip
