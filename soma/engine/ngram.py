"""Drafts from the text itself: what followed the last tokens when they stood there before (prompt lookup, Saxena 2023;
"lookahead" of n-grams as in vLLM). It costs next to nothing and helps where answers repeat: code, quotes, lists.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must stand there before


class NgramIndex:
    """Where the n-grams of one growing text were last seen."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # n-gram: place behind its last occurrence
        self.length = 0  # of the text as far as it is indexed

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow. A continuation that reaches the end of the text repeats itself."""
        place = self._find(tokens)
        if place is None or most <= 0:
            return []
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(most)]

    def _find(self, tokens: Sequence[int]) -> int | None:
        """The place behind the last earlier occurrence of the longest possible end of the text."""
        for end in range(max(self.length, SHORTEST), len(tokens)):  # all but the n-grams that end the text
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self.after[tuple(tokens[end - n : end])] = end
        self.length = len(tokens)
        for n in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
            place = self.after.get(tuple(tokens[-n:]))
            if place is not None:
                return place
        return None
