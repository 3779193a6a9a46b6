"""The signals of C4 (Raffel et al. 2020, JMLR 21:140, section 2.2), FineWeb (Penedo et al. 2024, arXiv 2406.17557,
section 3.6) and RefinedWeb (Penedo et al. 2023, arXiv 2306.01116, appendix G.2), and the lines that the first and the
last take out.
"""

import re
from collections.abc import Iterator

import numpy as np

from soma.data.signals.gopher import repeated
from soma.data.signals.parse import Batch, Parser, share
from soma.data.signals.words import LINE_ENDS

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
TERMINAL = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
MIN_LINE_WORDS = 3
MAX_WORD_CHARS = 1000
SHORT_LINE = 30
STOP_CHARS = tuple(sorted(LINE_ENDS))

COUNTER = re.compile(
    r"[\d.,]+[km]?\s+(?:like|share|comment|retweet|repost|quote|bookmark|upvote|downvote|download|view|follower)s?",
    re.IGNORECASE,
)
NAVIGATION = re.compile(r"^sign[- ]?in\b|read more(?:\.\.\.|…)?$|\bitems in cart\b", re.IGNORECASE)
NAVIGATION_WORDS = 10
UPPER_SHARE = 0.5


def c4(batch: Batch, terminal: bool = True) -> dict[str, np.ndarray]:
    """Columns of C4's rules over the lines that its line rules keep.

    `c4_lines`: share of lines kept; `c4_sentences` in them; `c4_lorem_ipsum`, `c4_curly`: kept lines with these. With
    `terminal` false lines need not end in `. ? ! " '` (as FineWeb has it); columns begin with `c4_any_` then.
    """
    sentences_L = _sentences(batch)
    kept: list[int] = []
    citing: list[tuple[int, str]] = []
    figures = np.zeros((len(batch), 2), np.int64)  # lorem ipsum, curly
    counts, number, chunk = batch.line_chunks_L.tolist(), 0, 0
    for document, own in enumerate(batch.lines):
        long_words = len(own) > 0 and _has_long(batch, document)
        for line in own:
            size = counts[number]
            stripped = line.strip()
            if "[" in stripped and CITATION.search(stripped):
                stripped = CITATION.sub("", stripped)
                citing.append((number, stripped))
            if not (long_words and _long_word(batch, chunk, size)) and _c4_line(stripped, size, terminal):
                lower = stripped.lower()
                figures[document, 0] += "lorem ipsum" in lower
                figures[document, 1] += "{" in stripped and "javascript" not in lower
                if not _unwanted(lower):
                    kept.append(number)
            number, chunk = number + 1, chunk + size
    if citing:
        for (number, _), count in zip(citing, _sentences(Parser().parse([line for _, line in citing])), strict=True):
            sentences_L[number] = count
    keep_L = np.zeros(len(counts), bool)
    keep_L[kept] = True
    prefix = "c4" if terminal else "c4_any"
    return {
        f"{prefix}_lines": share(batch.per_line(keep_L), np.diff(batch.first_line_D)),
        f"{prefix}_sentences": batch.per_line(np.where(keep_L, sentences_L, 0)),
        f"{prefix}_lorem_ipsum": figures[:, 0], f"{prefix}_curly": figures[:, 1],
    }  # fmt: skip


def _c4_line(line: str, words: int, terminal: bool) -> bool:
    if terminal and (not line.endswith(TERMINAL) or line.endswith("...")):
        return False
    return words >= MIN_LINE_WORDS


def _unwanted(lower: str) -> bool:
    return "javascript" in lower or any(phrase in lower for phrase in POLICY)


def _has_long(batch: Batch, document: int) -> bool:
    low, high = batch.first_chunk_D[document : document + 2]
    return bool((batch.of.chunk_chars[batch.chunks_C[low:high]] > MAX_WORD_CHARS).any())


def _long_word(batch: Batch, chunk: int, size: int) -> bool:
    return bool((batch.of.chunk_chars[batch.chunks_C[chunk : chunk + size]] > MAX_WORD_CHARS).any())


def _sentences(batch: Batch) -> np.ndarray:
    """Sentences of each line by spaCy's sentencizer: one begins at the line's first word, and at the first word after a
    sentence end that is not punctuation. 0 for a line without words."""
    of = batch.of
    ends_W = of.ends[batch.words_W]
    begins_W = ~(ends_W | of.punct[batch.words_W])
    places = np.flatnonzero(ends_W | begins_W)
    line_W = np.repeat(np.arange(len(batch.line_chunks_L)), np.diff(batch.first_word_L))
    after = ends_W[places[:-1]] & begins_W[places[1:]] & (line_W[places[:-1]] == line_W[places[1:]])
    found = np.bincount(line_W[places[1:][after]], minlength=len(batch.line_chunks_L))
    return found + (batch.line_chunks_L > 0)


def c4_text(text: str, terminal: bool = True) -> str:
    """The text with the lines that C4's rules keep, without citations."""
    return "\n".join(_c4_kept(text, terminal)).strip()


def _c4_kept(text: str, terminal: bool) -> Iterator[str]:
    for line in text.split("\n"):
        words = line.split()
        line = CITATION.sub("", line.strip())
        if any(len(word) > MAX_WORD_CHARS for word in words) or not _c4_line(line, len(words), terminal):
            continue
        if not _unwanted(line.lower()):
            yield line


def fineweb(batch: Batch) -> dict[str, np.ndarray]:
    """Columns of FineWeb's own rules, over lines that are not blank.

    `lines_ending_sentence`: share of lines that end in a sentence end; `short_lines`: share of at most 30 characters;
    `dup_line_chars_flat`: characters of repeated lines, of all characters but line ends; `line_ends_per_word`.
    """
    rows = []
    for text, own in zip(batch.texts, batch.lines, strict=True):
        lines = [line for line in own if line and not line.isspace()]
        ending = sum(line.endswith(STOP_CHARS) if line[-1] != "." else True for line in lines)
        short = sum(len(line) <= SHORT_LINE for line in lines)
        rows.append((len(lines), ending, short, repeated(lines)[1], len(own) - 1, len(text) - len(own) + 1))
    count, ending_D, short_D, chars, ends_D, flat = np.array(rows, np.int64).reshape(-1, 6).T
    return {
        "lines_ending_sentence": share(ending_D, count), "short_lines": share(short_D, count),
        "dup_line_chars_flat": share(chars, flat), "line_ends_per_word": share(ends_D, batch.word_counts),
    }  # fmt: skip


def refinedweb(batch: Batch) -> dict[str, np.ndarray]:
    """`flagged_words`: share of the words (white space apart) that lie in lines which `refinedweb_line` flags."""
    flags: list[bool] = []
    sizes = batch.line_chunks_L
    for own in batch.lines:
        flags.extend(refinedweb_line(line) for line in own)
    flagged = np.where(np.array(flags, np.bool_), sizes, 0)
    return {"flagged_words": share(batch.per_line(flagged), batch.per_line(sizes))}


def refinedweb_line(line: str) -> bool:
    """Whether a line is mostly capitals, only digits, a counter (`3 likes`), one word, or a bit of navigation."""
    words = line.split()
    if not words:
        return False
    if len(words) == 1:
        return True
    bare = "".join(words)
    if not any(map(str.isalpha, bare)) and any(map(str.isdigit, bare)):
        return True
    if not line.islower() and sum(map(str.isupper, bare)) > UPPER_SHARE * len(bare):
        return True
    stripped = line.strip()
    if COUNTER.fullmatch(stripped):
        return True
    return len(words) <= NAVIGATION_WORDS and NAVIGATION.search(stripped) is not None


def refinedweb_text(text: str) -> str:
    """The text without the lines that `refinedweb_line` flags."""
    return "\n".join(line for line in text.split("\n") if not refinedweb_line(line)).strip("\n")
