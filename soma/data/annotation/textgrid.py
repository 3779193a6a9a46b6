"""Praat TextGrids: interval and point tiers, in the long and the short text form, UTF-8 or UTF-16.

Format: https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html. Both forms are read by Praat's own rule:
only free-standing numbers, texts in double quotes (a quote inside is doubled) and flags in <> count; all else, `xmin =`
and `intervals [1]:` included, is there for people, and `!` begins a comment.
"""

import re
from pathlib import Path

from pydantic import BaseModel, Field

from soma.base.errors import UserError
from soma.data.annotation.record import Record

TOKEN = re.compile(r'"((?:[^"]|"")*)"|<(\w+)>|!([^\r\n]*)|([^\s"]+)')
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?")
KINDS = ("IntervalTier", "TextTier")


class Mark(BaseModel):
    """An interval [xmin, xmax] or, with both the same, a point, in seconds, and what is said there."""

    xmin: float
    xmax: float
    text: str


class Tier(BaseModel):
    """A tier. `kind`: IntervalTier or TextTier (points)."""

    kind: str
    name: str
    xmin: float
    xmax: float
    marks: list[Mark] = Field(default_factory=list)


class TextGrid(BaseModel):
    """A whole TextGrid."""

    xmin: float
    xmax: float
    tiers: list[Tier] = Field(default_factory=list)


def read_textgrid(path: Path) -> TextGrid:
    """The TextGrid of a file, in either form. Raises UserError for what is none."""
    try:
        return parse_textgrid(decode(path.read_bytes()))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def decode(data: bytes) -> str:
    """Text by its byte order mark, else UTF-8, else Latin-1, as Praat does."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def parse_textgrid(text: str) -> TextGrid:
    """The TextGrid that a text describes. Raises ValueError."""
    values = _Values(text)
    if values.text("file type") != "ooTextFile" or values.text("object class") != "TextGrid":
        raise ValueError("not a TextGrid in text form (Praat: Save as text file…)")
    grid = TextGrid(xmin=values.number("xmin"), xmax=values.number("xmax"))
    if values.take("flag", "tiers?") != "exists":
        return grid
    for _ in range(values.count("number of tiers")):
        kind = values.text("class of a tier")
        if kind not in KINDS:
            raise ValueError(f"a tier of class {kind!r}; expected one of {', '.join(KINDS)}")
        tier = Tier(kind=kind, name=values.text("name"), xmin=values.number("xmin"), xmax=values.number("xmax"))
        for _ in range(values.count(f"size of tier {tier.name!r}")):
            xmin = values.number("a time")
            xmax = values.number("xmax") if kind == "IntervalTier" else xmin
            tier.marks.append(Mark(xmin=xmin, xmax=xmax, text=values.text("text")))
        grid.tiers.append(tier)
    return grid


class _Values:
    """The numbers, texts and flags of a file in their order."""

    def __init__(self, text: str) -> None:
        self.found: list[tuple[str, str]] = []
        for match in TOKEN.finditer(text):
            quoted, flag, _, word = match.groups()
            if quoted is not None:
                self.found.append(("text", quoted.replace('""', '"')))
            elif flag is not None:
                self.found.append(("flag", flag))
            elif word is not None and NUMBER.fullmatch(word):
                self.found.append(("number", word))
        self.place = 0

    def take(self, kind: str, what: str) -> str:
        if self.place >= len(self.found):
            raise ValueError(f"ends before {what}")
        have, value = self.found[self.place]
        if have != kind:
            raise ValueError(f"value {self.place + 1} is {value!r}, expected a {kind}: {what}")
        self.place += 1
        return value

    def text(self, what: str) -> str:
        return self.take("text", what)

    def number(self, what: str) -> float:
        return float(self.take("number", what).rstrip("%"))

    def count(self, what: str) -> int:
        value = self.number(what)
        if value != int(value) or value < 0:
            raise ValueError(f"{what}: {value:g} is no count")
        return int(value)


def write_textgrid(grid: TextGrid, short: bool = False) -> str:
    """The text of a TextGrid file, long or short."""
    return "\n".join(_short(grid) if short else _long(grid)) + "\n"


def _long(grid: TextGrid) -> list[str]:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", f"xmin = {_number(grid.xmin)} "]
    lines += [f"xmax = {_number(grid.xmax)} ", "tiers? <exists> ", f"size = {len(grid.tiers)} ", "item []: "]
    for number, tier in enumerate(grid.tiers, 1):
        points = tier.kind == "TextTier"
        lines += [f"    item [{number}]:", f'        class = "{tier.kind}" ', f"        name = {_quoted(tier.name)} "]
        lines += [f"        xmin = {_number(tier.xmin)} ", f"        xmax = {_number(tier.xmax)} "]
        lines.append(f"        {'points' if points else 'intervals'}: size = {len(tier.marks)} ")
        for place, mark in enumerate(tier.marks, 1):
            if points:
                lines += [f"        points [{place}]:", f"            number = {_number(mark.xmin)} "]
                lines.append(f"            mark = {_quoted(mark.text)} ")
                continue
            lines += [f"        intervals [{place}]:", f"            xmin = {_number(mark.xmin)} "]
            lines += [f"            xmax = {_number(mark.xmax)} ", f"            text = {_quoted(mark.text)} "]
    return lines


def _short(grid: TextGrid) -> list[str]:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", _number(grid.xmin), _number(grid.xmax)]
    lines += ["<exists>", str(len(grid.tiers))]
    for tier in grid.tiers:
        lines += [f'"{tier.kind}"', _quoted(tier.name), _number(tier.xmin), _number(tier.xmax), str(len(tier.marks))]
        for mark in tier.marks:
            times = [mark.xmin] if tier.kind == "TextTier" else [mark.xmin, mark.xmax]
            lines += [*map(_number, times), _quoted(mark.text)]
    return lines


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


# --- Records ---


def records_of(grid: TextGrid) -> list[Record]:
    """A record for every mark, the silent ones too, so that the TextGrid can be made of them again.

    `meta` says tier and times (seconds), `source` where it stood and the outline of the whole.
    """
    outline = [tier.model_dump(exclude={"marks"}) for tier in grid.tiers]
    found = []
    for number, tier in enumerate(grid.tiers):
        for place, mark in enumerate(tier.marks):
            where = {"format": "textgrid", "tier": number, "place": place, "xmin": grid.xmin, "xmax": grid.xmax}
            meta = {"tier": tier.name, "xmin": mark.xmin, "xmax": mark.xmax}
            found.append(Record(text=mark.text, meta=meta, source={**where, "tiers": outline}))
    return found


def grid_of(records: list[Record]) -> TextGrid:
    """The TextGrid of records that came from one; classes that were given since stand in a tier of their own each.

    That tier is called as theirs with `:labels`, its marks lie where theirs do. Raises UserError for records from
    elsewhere and for what a TextGrid has no place for.
    """
    if not records or any(record.source.get("format") != "textgrid" for record in records):
        raise UserError("a TextGrid is made only of records that came from one: they say when each was spoken")
    first = records[0].source
    grid = TextGrid(xmin=first["xmin"], xmax=first["xmax"], tiers=[Tier(**tier) for tier in first["tiers"]])
    labelled: dict[int, list[Mark]] = {}
    for record in sorted(records, key=lambda record: (record.source["tier"], record.source["place"])):
        if record.rest("labels"):
            raise UserError("a TextGrid holds texts and classes, no spans, relations or targets: write JSONL instead")
        times = {"xmin": record.meta["xmin"], "xmax": record.meta["xmax"]}
        grid.tiers[record.source["tier"]].marks.append(Mark(**times, text=record.text))
        classes = Mark(**times, text=", ".join(map(str, record.labels)))
        labelled.setdefault(record.source["tier"], []).append(classes)
    for number, marks in labelled.items():
        tier = grid.tiers[number]
        if any(mark.text for mark in marks):
            grid.tiers.append(tier.model_copy(update={"name": f"{tier.name}:labels", "marks": marks}))
    return grid
