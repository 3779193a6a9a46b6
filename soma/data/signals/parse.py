"""Texts parsed once, a batch at a time: chunks, words, lines and paragraphs as arrays over the whole batch.

Letters of shapes: D documents, L lines, C chunks (what lies between white space), W words.
"""

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from soma.data.signals.words import MAX_TYPES, Columns, Table

PARAGRAPH = re.compile(r"\n{2,}")


class Batch:
    """What every signal reads. Make it with a `Parser`.

    `texts`; `lines`: per document the parts between line ends (`\\n`), blank ones too; `first_line_D`, `first_chunk_D`,
    `first_word_D` (documents + 1,): bounds in the arrays of all lines, chunks, words; `line_chunks_L`: chunks of a
    line; `words_W`: numbers of the words in the table whose facts `of` has.
    """

    def __init__(self, texts: Sequence[str], lines: list[list[str]], line_chunks: list[int], chunks: list[int],
                 of: Columns) -> None:  # fmt: skip
        self.texts, self.lines, self.of = texts, lines, of
        self.first_line_D = np.cumsum([0, *(len(own) for own in lines)])
        self.line_chunks_L = np.array(line_chunks, np.int64)
        self.chunks_C = np.array(chunks, np.int64)
        self.chars_D = np.array([len(text) for text in texts], np.int64)
        chunk_ends_L = np.concatenate([[0], np.cumsum(self.line_chunks_L)])
        self.first_chunk_D = chunk_ends_L[self.first_line_D]
        sizes_C = of.chunk_words[self.chunks_C]
        ends_C = np.concatenate([[0], np.cumsum(sizes_C)])
        self.first_word_D = ends_C[self.first_chunk_D]
        self.first_word_L = ends_C[chunk_ends_L]  # (lines + 1,)
        places_W = np.arange(ends_C[-1]) - np.repeat(ends_C[:-1] - of.chunk_first[self.chunks_C], sizes_C)
        self.words_W = of.pieces[places_W]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def word_counts(self) -> np.ndarray:
        """Words of each document, (documents,)."""
        return np.diff(self.first_word_D)

    @cached_property
    def word_document(self) -> np.ndarray:
        """The document that a word is in."""
        return np.repeat(np.arange(len(self)), self.word_counts)

    @cached_property
    def word_ends(self) -> np.ndarray:
        """(words + 1,): characters of all words before each, without what lies between them."""
        return np.concatenate([[0], np.cumsum(self.of.chars[self.words_W])])

    @cached_property
    def paragraphs(self) -> list[list[str]]:
        """Per document the parts between blank lines."""
        return [PARAGRAPH.split(text.strip()) if "\n\n" in text else [text.strip()] for text in self.texts]

    def sum_words(self, values_W: np.ndarray) -> np.ndarray:
        """Sums over the words of each document, (documents,)."""
        sums = np.concatenate([[0], np.cumsum(values_W)])
        return sums[self.first_word_D[1:]] - sums[self.first_word_D[:-1]]

    def per_line(self, values: np.ndarray) -> np.ndarray:
        """Sums over the lines of each document, (documents,)."""
        sums = np.concatenate([[0], np.cumsum(values)])
        return sums[self.first_line_D[1:]] - sums[self.first_line_D[:-1]]


class Parser:
    """Makes batches; remembers how chunks are cut. One for each process."""

    def __init__(self) -> None:
        self.table = Table()
        self.columns: Columns | None = None

    def parse(self, texts: Sequence[str]) -> Batch:
        """The batch of these texts, in this order."""
        if len(self.table) > MAX_TYPES:
            self.table, self.columns = Table(), None
        lines = [text.split("\n") for text in texts]
        line_chunks: list[int] = []
        chunks: list[int] = []
        number_of = self.table.__getitem__
        for own in lines:
            for line in own:
                cut = line.split()
                line_chunks.append(len(cut))
                chunks.extend(map(number_of, cut))
        self.columns = Columns(self.table, self.columns)
        return Batch(texts, lines, line_chunks, chunks, self.columns)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole as float64, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole != 0)
