"""Tokenizers beside each other on one text: fertility, bytes per token, unknown tokens, speed, and how each cuts.

Fertility is tokens per word (Rust et al. 2021, "How Good is Your Tokenizer?"), a word being what stands between white
space: for scripts that are written without spaces compare bytes per token instead. Figures are given for all of the
text, for each domain (what was named on the command line) and for each language (identified by py3langid).
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soma.base.axes import esc
from soma.base.errors import UserError
from soma.base.page import page_style
from soma.data.readers import Document, read_item
from soma.data.signals.language import identifier, sample
from soma.data.sources import Item, list_items
from soma.model.tokenizer import Tokenizer

MAX_BYTES = 20_000_000  # of text that are looked at, in all
BATCH_BYTES = 1 << 20
COLOURS = 5  # the sixth is too near to the first
FIGURES = ("tokens per word", "bytes per token", "unknown", "MB/s")


@dataclass(frozen=True)
class Text:
    """One document and what it counts for."""

    text: str
    domain: str
    language: str


@dataclass
class Score:
    """Sums over texts. Worked example: 12 tokens for 8 words of 48 bytes: fertility 1.5, 4 bytes a token."""

    tokens: int = 0
    unknown: int = 0
    words: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Score") -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def figures(self) -> tuple[float, float, float, float]:
        """Tokens per word, bytes per token, share of unknown tokens, 10⁶ bytes a second."""
        return (
            self.tokens / max(self.words, 1), self.bytes / max(self.tokens, 1), self.unknown / max(self.tokens, 1),
            self.bytes / 1e6 / max(self.seconds, 1e-9),
        )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A token of the picture: the characters that it covers; `part` where it is only a part of one character."""

    text: str
    id: int
    unknown: bool = False
    part: bool = False


@dataclass
class Comparison:
    """`scores[group][tokenizer]`; groups are "all", "domain NAME" and "language CODE", the larger ones first."""

    names: list[str]
    vocabulary: dict[str, int]
    scores: dict[str, dict[str, Score]]
    pictures: list[tuple[str, dict[str, list[Piece]]]] = field(default_factory=list)


def read_texts(sources: Sequence[str], text_field: str = "text", max_bytes: int = MAX_BYTES) -> list[Text]:
    """Documents of the sources in turn, at most `max_bytes` of them. A source may be `NAME=PATH`; NAME is its domain.

    Raises UserError where nothing can be read.
    """
    found: list[Text] = []
    share = max_bytes // max(len(sources), 1)
    for source in sources:
        domain, equals, path = source.partition("=")
        if not equals or "/" in domain or Path(source).exists():
            domain, path = Path(source.rstrip("/")).name, source
        size = 0
        for item in list_items([path]):
            if not isinstance(item, Item):
                continue
            for document in read_item(item, text_field):
                if isinstance(document, Document) and size < share:
                    found.append(Text(document.text, domain, _language(document.text)))
                    size += len(document.text.encode())
            if size >= share:
                break
    if not found:
        raise UserError(f"{', '.join(sources)}: no text in there")
    return found


def _language(text: str) -> str:
    return str(identifier().classify(sample(text))[0]) if text.strip() else "none"


def load(refs: Sequence[str]) -> dict[str, Tokenizer]:
    """Tokenizers by a short name: the folder's or file's, with its parent where two are alike."""
    short = [Path(ref.rstrip("/")).name for ref in refs]
    full = ["/".join(Path(ref.rstrip("/")).parts[-2:]) for ref in refs]
    names = [one if short.count(one) == 1 else (two if full.count(two) == 1 else ref)
             for one, two, ref in zip(short, full, refs, strict=True)]  # fmt: skip
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(refs)}: one tokenizer is named twice")
    return {name: Tokenizer.load(ref) for name, ref in zip(names, refs, strict=True)}


def compare(tokenizers: dict[str, Tokenizer], texts: Sequence[Text], sentences: Iterable[str] = ()) -> Comparison:
    """Measure each tokenizer on the texts. Speed is of `encode_batch` over about 1 MB, tokenizers taking turns."""
    scores: dict[str, dict[str, Score]] = defaultdict(lambda: {name: Score() for name in tokenizers})
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for text in texts:
        groups[text.domain, text.language].append(text.text)
    for (domain, language), members in groups.items():
        for batch in _batches(members):
            words, size = sum(len(text.split()) for text in batch), sum(len(text.encode()) for text in batch)
            for name, tokenizer in tokenizers.items():
                start = time.perf_counter()
                ids = tokenizer.encode_batch(batch, as_text=True)
                seconds = time.perf_counter() - start
                unknown = _unknown_id(tokenizer)
                missed = 0 if unknown is None else sum(row.count(unknown) for row in ids)
                one = Score(sum(map(len, ids)), missed, words, size, seconds)
                for group in ("all", f"domain {domain}", f"language {language}"):
                    scores[group][name].add(one)
    first = next(iter(tokenizers))
    order = sorted(scores, key=lambda group: (group != "all", group.split()[0], -scores[group][first].bytes, group))
    pictures = [(text, {name: cut(one, text) for name, one in tokenizers.items()}) for text in sentences]
    vocabulary = {name: one.inner.get_vocab_size() for name, one in tokenizers.items()}
    return Comparison(list(tokenizers), vocabulary, {group: scores[group] for group in order}, pictures)


def _batches(texts: Sequence[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of what the vocabulary does not have; None for a tokenizer that spells everything in bytes."""
    model = json.loads(tokenizer.inner.model.__getstate__())
    if model.get("byte_fallback"):
        return None
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    name = model.get("unk_token")
    return tokenizer.inner.token_to_id(name) if name else None


def cut(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """The text's tokens with the characters that each covers; white space that a tokenizer drops is left out."""
    encoding = tokenizer.plain.encode(text, add_special_tokens=False)
    unknown = _unknown_id(tokenizer)
    pieces: list[Piece] = []
    done = 0
    for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        part = end <= done and start < done  # a character that the token before it began
        pieces.append(Piece("" if part else text[max(start, done) : end], id, id == unknown, part))
        done = max(done, end)
    return pieces


# --- To look at ---


def table(found: Comparison) -> str:
    """The figures as text, one block a group."""
    width = max(max(map(len, found.names)), 9)
    lines = []
    for group, scores in found.scores.items():
        size = next(iter(scores.values())).bytes
        lines.append(f"{group} ({size:,} bytes)")
        lines.append(f"  {'':<{width}}{'vocabulary':>12}" + "".join(f"{name:>18}" for name in FIGURES))
        for name, score in scores.items():
            fertility, per_token, unknown, speed = score.figures
            lines.append(
                f"  {name:<{width}}{found.vocabulary[name]:>12,}{fertility:>18.3f}{per_token:>18.3f}{unknown:>18.3%}"
                f"{speed:>18.2f}"
            )
        lines.append("")
    return "\n".join(lines)


def picture(found: Comparison, colour: bool) -> str:
    """How each cuts the sentences, for a terminal: in turning background colours, or with bars between the tokens."""
    width = max(map(len, found.names), default=0)
    lines = []
    for _, cuts in found.pictures:
        for name, pieces in cuts.items():
            shown = [_visible(piece) for piece in pieces]
            if colour:  # ANSI backgrounds 41 to 45, black ink; unknown tokens in reverse
                text = "".join(
                    f"\x1b[{'7' if piece.unknown else f'30;4{number % COLOURS + 1}'}m{word}\x1b[0m"
                    for number, (piece, word) in enumerate(zip(pieces, shown, strict=True))
                )
            else:
                text = "|".join(shown)
            lines.append(f"{name:<{width}} {len(pieces):>4}  {text}")
        lines.append("")
    return "\n".join(lines)


def _visible(piece: Piece) -> str:
    if piece.part:
        return "·"
    return piece.text.replace("\n", "⏎").replace("\t", "⇥") or "∅"


STYLE = """
td:first-child { text-align: left; }
td.best { font-weight: 700; }
.cut { font: 15px/2.1 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 1rem; }
.cut span { padding: .2em 0; color: var(--c-ink); }
.t0 { background: color-mix(in srgb, var(--c-0) 32%, var(--c-paper)); }
.t1 { background: color-mix(in srgb, var(--c-1) 32%, var(--c-paper)); }
.t2 { background: color-mix(in srgb, var(--c-2) 32%, var(--c-paper)); }
.t3 { background: color-mix(in srgb, var(--c-3) 32%, var(--c-paper)); }
.t4 { background: color-mix(in srgb, var(--c-4) 32%, var(--c-paper)); }
.cut .unknown { outline: 2px solid var(--c-1); outline-offset: -2px; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>Tokenizers · Soma</title>
<style>{style}</style></head><body>
<p class='mark'>Soma <span>tokenizers</span></p><h1>{title}</h1>
{body}
</body></html>
"""


def page(found: Comparison) -> str:
    """One self-contained HTML page: the pictures, then a table for each group, the best figure of a column in bold."""
    body = []
    for text, cuts in found.pictures:
        body.append(f"<section><h2>{esc(text)}</h2>")
        for name, pieces in cuts.items():
            spans = "".join(_span(number, piece) for number, piece in enumerate(pieces))
            body.append(f"<div><b>{esc(name)}</b> <span class='soft'>{len(pieces)} tokens</span></div>")
            body.append(f"<div class='cut' translate='no'>{spans}</div>")
        body.append("</section>")
    if found.pictures:
        body.append(
            "<p class='soft'>A dot is a token that holds a further part of the character before it; a frame, a token "
            "that the vocabulary does not have. Point at a token for its id.</p>"
        )
    for group, scores in found.scores.items():
        body.append(_section(group, scores, found.vocabulary))
    body.append(
        "<p class='soft'>Tokens per word: a word is what stands between white space. Speed: encode_batch on this "
        "machine, with whatever else it was doing.</p>"
    )
    title = " · ".join(esc(name) for name in found.names)
    return PAGE.format(style=page_style() + STYLE, title=title, body="\n".join(body))


def _span(number: int, piece: Piece) -> str:
    kind = f"t{number % COLOURS}" + (" unknown" if piece.unknown else "")
    return f"<span class='{kind}' title='{piece.id}'>{esc(_visible(piece))}</span>"


def _section(group: str, scores: dict[str, Score], vocabulary: dict[str, int]) -> str:
    rows = {name: score.figures for name, score in scores.items()}
    best = [pick(row[place] for row in rows.values()) for place, pick in enumerate((min, max, min, max))]
    size = next(iter(scores.values())).bytes
    lines = [f"<section><h2>{esc(group)} <span class='soft'>{size:,} bytes</span></h2><div class='table'><table>"]
    lines.append(
        "<tr><th>tokenizer</th><th>vocabulary</th>" + "".join(f"<th>{name}</th>" for name in FIGURES) + "</tr>"
    )
    for name, row in rows.items():
        cells = [f"{row[0]:.3f}", f"{row[1]:.3f}", f"{row[2]:.3%}", f"{row[3]:.2f}"]
        shown = "".join(
            f"<td{' class=best' if len(rows) > 1 and row[place] == best[place] else ''}>{cell}</td>"
            for place, cell in enumerate(cells)
        )
        lines.append(f"<tr><td>{esc(name)}</td><td>{vocabulary[name]:,}</td>{shown}</tr>")
    return "\n".join([*lines, "</table></div></section>"])
