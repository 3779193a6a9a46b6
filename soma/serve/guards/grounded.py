"""Whether an answer stands in the passages that it was made from.

For each sentence of the answer: the share of its content words that one passage has, in a stretch as long as three
passages' sentences would be; and all of its numbers must be there. The least supported sentence decides. No model is
asked; measured beside cosines of MiniLM in `benchmarks/guardrails.py`: words tell a changed number, and cosines do not.
"""

import re
from collections.abc import Sequence

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])|\n+")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CITATION = re.compile(r"\[\d+(?:\s*,\s*\d+)*\]")
STOP = frozenset(re.findall(r"\w+", """
    a an and are as at be been but by can could did do does for from had has have he her his i if in into is it its may
    more most no not of on or our she should so some such than that the their them then there these they this to was we
    were what when which who will with would you your
"""))  # fmt: skip
FEWEST = 2  # content words of a sentence that says something that could be checked


def stem(word: str) -> str:
    """A word without its ending, roughly: singular and plural, tenses."""
    for end in ("ingly", "edly", "ing", "ied", "ies", "ed", "es", "ly", "s"):
        if word.endswith(end) and len(word) - len(end) >= 3:
            return word[: -len(end)]
    return word


def words(text: str) -> set[str]:
    """Stems of content words."""
    return {stem(found.lower()) for found in WORD.findall(text) if found.lower() not in STOP}


def numbers(text: str) -> set[str]:
    """Numbers, 1,000 as 1000."""
    return {found.replace(",", "").rstrip(".") for found in NUMBER.findall(text)}


def sentences(text: str) -> list[str]:
    """Of an answer, without marks of citations."""
    return [each.strip() for each in SENTENCE.split(CITATION.sub("", text)) if each.strip()]


def support(sentence: str, passages: Sequence[str]) -> float:
    """Share of a sentence's content words that the best passage has; 0 if it has a number that none of them has."""
    wanted, counted = words(sentence), numbers(sentence)
    if not counted <= set().union(*map(numbers, passages)):
        return 0.0
    if len(wanted) < FEWEST:
        return 1.0
    return max((len(wanted & words(passage)) / len(wanted) for passage in passages), default=0.0)


def groundedness(answer: str, passages: Sequence[str]) -> float:
    """Support of the least supported sentence, 0 to 1; 1 for an answer that says nothing."""
    return min((support(sentence, passages) for sentence in sentences(answer)), default=1.0)
