"""The signals of Gopher's quality and repetition rules (Rae et al. 2021, arXiv 2112.11446, section A1.1, table A1).

Counted as datatrove 0.10 counts them, which made FineWeb with them.
"""

from collections.abc import Sequence

import numpy as np

from soma.data.signals.parse import Batch, share

TOP = (2, 3, 4)  # n of the most frequent n-gram's share
DUPLICATE = (5, 6, 7, 8, 9, 10)  # n of the duplicate n-grams' share
MIX = np.uint64(0x9E3779B97F4A7C15)


def quality(batch: Batch) -> dict[str, np.ndarray]:
    """Columns of the Gopher quality rules.

    `words`: all of them; `plain_words`: those that are more than symbols; `mean_word_chars`: of plain words;
    `hashes_per_word`, `ellipses_per_word`; `bullet_lines`, `ellipsis_lines`: shares of lines; `alpha_words`: share of
    words with a letter; `stop_words`: how many of the eight English ones occur.
    """
    of, words_D = batch.of, batch.word_counts
    plain_W = ~of.symbol[batch.words_W]
    plain_D = batch.sum_words(plain_W)
    chars_D = batch.sum_words(np.where(plain_W, of.chars[batch.words_W], 0))
    stops_D = np.zeros(len(batch), np.int64)
    stop_W = of.stop[batch.words_W]
    for bit in range(8):
        stops_D += batch.sum_words(stop_W >> bit & 1) > 0
    bullets, dots, lines = [], [], []
    for text, own in zip(batch.texts, batch.lines, strict=True):
        lines.append(len(own) - (own[-1] == ""))  # as str.splitlines: no line after the last line end
        found = 0
        if "-" in text or "•" in text:
            found = sum(line.lstrip().startswith(("•", "-")) for line in own)
        bullets.append(found)
        found = 0
        if "..." in text or "…" in text:
            found = sum(line.rstrip().endswith(("...", "…")) for line in own)
        dots.append(found)
    lines_D = np.array(lines)
    hashes_D = np.array([text.count("#") for text in batch.texts])
    ellipses_D = np.array([text.count("...") + text.count("…") for text in batch.texts])
    return {
        "words": words_D, "plain_words": plain_D, "mean_word_chars": share(chars_D, plain_D),
        "hashes_per_word": share(hashes_D, words_D), "ellipses_per_word": share(ellipses_D, words_D),
        "bullet_lines": share(np.array(bullets), lines_D), "ellipsis_lines": share(np.array(dots), lines_D),
        "alpha_words": share(batch.sum_words(of.alpha[batch.words_W]), words_D), "stop_words": stops_D,
    }  # fmt: skip


def repetition(batch: Batch) -> dict[str, np.ndarray]:
    """Columns of the Gopher repetition rules, shares between 0 and 1.

    `dup_lines`, `dup_line_chars`, `dup_paragraphs`, `dup_paragraph_chars`: what has been there before; `top_2gram`
    … `top_4gram`: characters of the most frequent n-gram, times how often it occurs; `dup_5gram` … `dup_10gram`:
    characters in n-grams that have been there before. All but the first and third are shares of the document's
    characters.
    """
    lines = [[line for line in own if line] if "" in own[1:-1] else own for own in batch.lines]
    found = {}
    for name, parts in (("line", lines), ("paragraph", batch.paragraphs)):
        counts_D2 = np.array([repeated(own) for own in parts]).reshape(-1, 2)
        found[f"dup_{name}s"] = share(counts_D2[:, 0], np.array([len(own) for own in parts]))
        found[f"dup_{name}_chars"] = share(counts_D2[:, 1], batch.chars_D)
    return found | ngrams(batch)


def repeated(parts: Sequence[str]) -> tuple[int, int]:
    """How many of the parts have been there before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    count, chars = 0, 0
    for part in parts:
        if part in seen:
            count += 1
            chars += len(part)
        else:
            seen.add(part)
    return count, chars


def ngrams(batch: Batch) -> dict[str, np.ndarray]:
    """`top_Ngram` and `dup_Ngram`.

    An n-gram can only occur twice where its first n − 1 words do, so after the pairs only those places are looked at.
    """
    hashes_W = batch.of.hashes[batch.words_W]
    last_W = np.repeat(batch.first_word_D[1:], batch.word_counts)  # one past the document's last word
    # The document is part of the key: an n-gram is counted within its own.
    keys_W = hashes_W + (batch.word_document.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    places = np.arange(len(hashes_W))
    found = {}
    for n in range(2, max(DUPLICATE) + 1):
        inside = places + n <= last_W[places]
        places, keys_W = places[inside], keys_W[inside]
        keys_W = (keys_W ^ keys_W >> np.uint64(29)) * MIX + hashes_W[places + n - 1]
        groups = _groups(keys_W)
        if n in TOP:
            found[f"top_{n}gram"] = share(_top(batch, n, places, groups), batch.chars_D)
        keep = groups >= 0
        places, keys_W, groups = places[keep], keys_W[keep], groups[keep]
        if n in DUPLICATE:
            found[f"dup_{n}gram"] = share(_duplicate(batch, n, places, groups), batch.chars_D)
    return found


def _groups(keys: np.ndarray) -> np.ndarray:
    """For each place the number of its group of equal keys, −1 where the key occurs once."""
    groups = np.full(len(keys), -1, np.int64)
    order = np.argsort(keys)
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    joined = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    starts = np.concatenate([[True], ~same])[: len(keys)]
    numbers = np.cumsum(starts)
    groups[order[joined[: len(keys)]]] = numbers[joined[: len(keys)]]
    return groups


def _top(batch: Batch, n: int, places: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Characters (with one space between words) of the most frequent n-gram, the first of equals, times its count."""
    ends_W = batch.word_ends
    first_D = batch.first_word_D[:-1]
    has_D = batch.word_counts >= n
    best_D, times_D = first_D.copy(), has_D.astype(np.int64)  # without repetition: the first one, once
    repeated_ = groups >= 0
    if repeated_.any():
        own, numbers = places[repeated_], groups[repeated_]
        order = np.argsort(numbers, kind="stable")  # places ascend, so each group's first comes first
        own, numbers = own[order], numbers[order]
        starts = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
        counts = np.diff(np.concatenate([starts, [len(own)]]))
        first = own[starts]
        document = batch.word_document[first]
        rank = np.lexsort((-first, counts, document))  # the last of each document: most frequent, then earliest
        ends = np.concatenate([document[rank][1:] != document[rank][:-1], [True]])
        chosen = rank[ends]
        best_D[document[chosen]] = first[chosen]
        times_D[document[chosen]] = counts[chosen]
    best_D = np.where(has_D, best_D, 0)
    last_D = np.where(has_D, best_D + n, 0)
    return (ends_W[last_D] - ends_W[best_D] + has_D * (n - 1)) * times_D


def _duplicate(batch: Batch, n: int, places: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Characters in n-grams that have occurred before, read from left to right without overlaps."""
    found_D = np.zeros(len(batch), np.int64)
    if len(places):
        chars = (batch.word_ends[places + n] - batch.word_ends[places]).tolist()
        documents = batch.word_document[places].tolist()
        seen: set[int] = set()
        free = 0
        for place, group, size, document in zip(places.tolist(), groups.tolist(), chars, documents, strict=True):
            if place >= free:
                if group in seen:
                    found_D[document] += size
                    free = place + n
                else:
                    seen.add(group)
    return found_D
