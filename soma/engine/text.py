"""Stop strings across token boundaries."""

from collections.abc import Sequence


class StopScanner:
    """Passes text on, but never a piece that may turn out to be the start of a stop string.

    Whatever way a text is cut into pieces, the parts passed on join to the text before the stop string that is
    complete first (of several that end at the same place, the longest).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take more text, give what is safe to show. Nothing comes any more once `stopped` is true."""
        if self.stopped or not self.stop:
            return "" if self.stopped else piece
        text = self.held + piece
        found = self._first_stop(text)
        if found is not None:
            self.stopped, self.held = True, ""
            return text[:found]
        held = max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text ended: give what was held back."""
        held, self.held = self.held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        ends = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        return min(ends)[1] if ends else None


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
