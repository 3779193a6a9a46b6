"""From a document to chunks: cut where its structure says, within a budget of tokens, with an overlap.

A heading begins a new chunk and gives the chunks under it their title (`Guide > Install`). Inside a section sentences
and lines are packed until the budget is full; where the second half of a full chunk holds the end of a paragraph, the
cut is made there. The next chunk repeats the last sentences, as far as the overlap goes. A chunk is a slice of the
document: `text == document[start:end]`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Count = Callable[[list[str]], list[int]]  # tokens of each of several texts
MARKED = ("markdown", "html", "text", "asciidoc")  # kinds with `# headings`
HEADING = re.compile(r"(#{1,6}|={1,6})[ \t]+(\S.*?)[ \t]*[#=]*\s*")
UNDERLINE = re.compile(r"([=\-~^\"'*+#`:.])\1{2,}\s*")
BLANK = re.compile(r"[ \t]*\n\s*\n")
FENCE = re.compile(r"\s{0,3}(```|~~~)")
# Behind a line, or behind the end of a sentence: what can be a chunk's border.
BORDER = re.compile(r"\n|(?<=[.!?])[\"'”’)\]]*[ \t]+|(?<=[。！？])")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    `origin`: what was named to be indexed, `file`: the file in there, `source`: the file with `#row` for a row of it.
    `start`, `end`: characters in the document's text. `number`: place among the chunks of the file, `last`: it is the
    file's last. `hash`: of the file's content and of how it was cut.
    """

    origin: str
    file: str
    source: str
    kind: str
    title: str
    text: str
    start: int
    end: int
    number: int = 0
    last: bool = False
    hash: str = ""
    meta: dict[str, Any] | None = None

    @property
    def told(self) -> str:
        """What the encoder and BM25 see."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Piece:
    """A part of a document that is a chunk's text: title and place."""

    title: str
    start: int
    end: int


@dataclass(frozen=True)
class Atom:
    """What is not cut further. `paragraph`: a blank line follows."""

    start: int
    end: int
    tokens: int
    paragraph: bool


def cut(text: str, kind: str, title: str, count: Count, budget: int, overlap: int) -> Iterator[Piece]:
    """The pieces of a document, in order. Title and text of a piece have at most `budget` tokens together; a title
    that takes more than half of it is shortened to its last heading, or left out."""
    assert 0 <= overlap < budget
    for heading, start, end in sections(text, kind):
        name = fitting(" > ".join(part for part in (title, heading) if part), count, budget // 2)
        room = budget - (count([name])[0] if name else 0)
        yield from packed(text, name, atoms(text, start, end, count, room), room, min(overlap, room // 2))


def fitting(title: str, count: Count, most: int) -> str:
    """The title, or its last part, or nothing: what has at most `most` tokens."""
    for name in (title, title.rpartition(" > ")[2]):
        if not name or count([name])[0] <= most:
            return name
    return ""


def sections(text: str, kind: str) -> Iterator[tuple[str, int, int]]:
    """(headings above, start, end) of the text between headings, headings included in the section that they begin."""
    path: list[tuple[int, str]] = []
    begun, opened, behind = 0, "", 0  # behind: where the section's heading ends
    for start, end, level, heading in headings(text, kind):
        parent = bool(path) and level > path[-1][0] and not text[behind:start].strip()
        if text[begun:start].strip() and not parent:
            yield opened, begun, start
        path = [*((above, name) for above, name in path if above < level), (level, heading)]
        begun = begun if parent else start  # a heading with nothing but headings under it stays with the first of them
        opened, behind = " > ".join(name for _, name in path), end
    if text[begun:].strip():
        yield opened, begun, len(text)


def headings(text: str, kind: str) -> Iterator[tuple[int, int, int, str]]:
    """(start, end, level, words) of every heading. Lines between code fences are none."""
    if kind not in (*MARKED, "rst"):
        return
    fenced, place, before = False, 0, ""
    levels: list[str] = []  # of reStructuredText: underlines in the order in which they came
    for line in text.splitlines(keepends=True):
        if kind != "rst" and FENCE.match(line):
            fenced = not fenced
        elif not fenced and kind != "rst" and (found := HEADING.fullmatch(line)):
            if (found[1][0] == "=") == (kind == "asciidoc"):
                yield place, place + len(line), len(found[1]), found[2]
        elif not fenced and (found := UNDERLINE.fullmatch(line)) and is_title(before, line, kind):
            mark = found[1]
            if mark not in levels:
                levels.append(mark)
            level = levels.index(mark) + 1 if kind == "rst" else "=-".index(mark) + 1
            yield place - len(before), place + len(line), level, before.strip()
        place, before = place + len(line), line


def is_title(before: str, line: str, kind: str) -> bool:
    """Whether the line above an underline is a heading: words, not longer than the line under them."""
    words = before.strip()
    if not words or UNDERLINE.fullmatch(before) or before[0].isspace():
        return False
    return len(line.strip()) >= len(words) and (kind == "rst" or (kind == "markdown" and line[0] in "=-"))


def atoms(text: str, start: int, end: int, count: Count, most: int) -> list[Atom]:
    """Sentences and lines of a part of the text; what has more than `most` tokens is cut between words."""
    borders = [start, *(found.end() for found in BORDER.finditer(text, start, end)), end]
    spans = [trimmed(text, *pair) for pair in pairwise(borders)]
    spans = [span for span in spans if span[0] < span[1]]
    made: list[Atom] = []
    for (low, high), tokens in zip(spans, count([text[low:high] for low, high in spans]), strict=True):
        for left, right, size in halved(text, low, high, tokens, count, most):
            made.append(Atom(left, right, size, BLANK.match(text, right, end) is not None))
    return made


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without white space on both sides."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))


def halved(text: str, start: int, end: int, tokens: int, count: Count, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of a part, cut in two between words as often as needed; a word is cut like anything else."""
    if tokens <= most or end - start < 2:
        yield start, end, tokens
        return
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle + 1)
    border = space if space > start else middle
    halves = [trimmed(text, start, border), trimmed(text, border, end)]
    for (low, high), size in zip(halves, count([text[low:high] for low, high in halves]), strict=True):
        yield from halved(text, low, high, size, count, most)


def packed(text: str, title: str, parts: list[Atom], room: int, overlap: int) -> Iterator[Piece]:
    """Atoms of one section in chunks of at most `room` tokens."""
    first = 0
    while first < len(parts):
        last, paragraph, total = first, None, 0
        while last < len(parts) and (last == first or total + parts[last].tokens <= room):
            total += parts[last].tokens
            last += 1
            if parts[last - 1].paragraph and 2 * total >= room:
                paragraph = last
        if last < len(parts) and paragraph is not None:
            last = paragraph
        yield Piece(title, parts[first].start, parts[last - 1].end)
        if last == len(parts):
            return
        back, repeated = last, 0
        while back - 1 > first and repeated + parts[back - 1].tokens <= overlap:
            back -= 1
            repeated += parts[back].tokens
        first = back
