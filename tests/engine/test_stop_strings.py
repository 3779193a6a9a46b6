"""Stop strings: however a text is cut, what comes out is the text before the first stop string that is complete."""

from hypothesis import given
from hypothesis import strategies as st

from soma.engine.text import StopScanner


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first place where any stop string ends; the longest that ends there is cut off."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


letters = st.text("ab\n", max_size=30)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@given(st.lists(letters, max_size=12), stop_lists)
def test_any_cut_gives_the_same(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    whole = ""
    for piece in pieces:
        shown += scanner.push(piece)
        whole += piece
        expected, stopped = reference(whole, stops)
        assert scanner.stopped == stopped
        assert expected.startswith(shown)  # nothing was shown that a stop string takes back
        held = len(expected) - len(shown)
        assert held < max((len(stop) for stop in stops), default=1)  # and no more is held than may matter
        if stopped:
            break
    assert (shown + scanner.flush(), scanner.stopped) == reference(whole, stops)


def test_held_back_and_released() -> None:
    scanner = StopScanner(["</end>"])
    assert scanner.push("text </e") == "text "
    assert scanner.push("m>") == "</em>"
    assert scanner.push("x</end") == "x"
    assert scanner.flush() == "</end"
    assert not scanner.stopped


def test_nothing_after_the_stop() -> None:
    scanner = StopScanner(["\n\n"])
    assert scanner.push("a\n") == "a"
    assert scanner.push("\nb") == ""
    assert scanner.stopped
    assert scanner.push("c") == scanner.flush() == ""
