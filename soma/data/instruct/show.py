"""What a model learns of instruction data: tokens coloured by the loss mask, and how rows share a sequence."""

import html
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soma.base.errors import UserError
from soma.base.page import page_style
from soma.data.instruct.convert import Outcome, records_of
from soma.data.instruct.samples import read_samples
from soma.data.instruct.schemas import Record, Schema, from_record
from soma.data.packing import WholePacker, random
from soma.model.tokenizer import Tokenizer

PLAIN, RESET = ("\033[2m", "\033[0m"), "\033[0m"  # every second token is dim, or light, so that each can be seen
LEARNED = ("\033[30;42m", "\033[30;102m")
STYLE = """
h1 { font-size: 26px; }
h2 { font-size: 16px; margin: 28px 0 8px; padding-top: 14px; border-top: 1px solid var(--c-grid); }
pre { font-size: 15px; line-height: 1.8; margin-bottom: 14px; }
pre b { font-weight: 400; background: color-mix(in srgb, var(--c-2) 22%, var(--c-paper)); }
pre b.o { background: color-mix(in srgb, var(--c-2) 40%, var(--c-paper)); }
pre i { font-style: normal; color: var(--c-soft); }
pre i.o { color: color-mix(in srgb, var(--c-soft) 70%, var(--c-paper)); }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{title} · Soma</title>
<style>{style}</style></head><body>
<p class='mark'>Soma <span>what is learned</span></p><h1>{title}</h1>
<p class='soft'>What is learned is on green; neighbouring tokens differ in shade. Point at a token for its number.</p>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Shown:
    """One conversation as it is trained on: `name` (`row 3`, `row 3 chosen`), tokens as text, and which are learned."""

    name: str
    texts: list[str]
    mask: list[int]

    @property
    def title(self) -> str:
        return f"{self.name}: {len(self.mask):,} tokens, {sum(self.mask):,} learned"


def show(source: str, model: str | Path, row: int | None, sequence_length: int | None = None) -> list[Shown | str]:
    """The conversations of a row (counted from 1), or of all rows; texts between them say what they are.

    With `sequence_length` the rows are packed as tuning packs them, and those that share a sequence with the row are
    shown in their order, with what is left empty. Raises UserError for a row that does not fit or is not there, and
    for a chat template whose answers cannot be told apart.
    """
    runtime = Tokenizer.load(model)
    found = list(_encoded(source, runtime, str(model), None if sequence_length else row))
    if row is not None and not any(number == row for number, _ in found):
        raise UserError(f"{source}: there is no row {row} with something to learn")
    if sequence_length is None:
        return [shown for _, shown in found]
    return list(_packed(found, row, sequence_length))


def _encoded(source: str, runtime: Tokenizer, model: str, row: int | None) -> Iterator[tuple[int, Shown]]:
    outcome = Outcome()
    for record in records_of([source], None, outcome, whole=True):
        number = outcome.rows
        if row is None or number == row:
            for shown in _conversations(record, number, runtime, model):
                yield number, shown
        if row is not None and number >= row:
            break
    wrong = [line for line in outcome.wrong if row is None or line[1] == row]
    if wrong:
        raise UserError("\n".join(Outcome(wrong=wrong).lines()))


def _conversations(record: Record, number: int, runtime: Tokenizer, model: str) -> Iterator[Shown]:
    # As the stages read it: a row with a rejected answer is a pair.
    schema: Schema = "preference" if "rejected" in record else "messages"
    samples = read_samples(from_record(record, schema), schema, None)
    for count, sample in enumerate(samples, start=1):
        name = f"row {number}" + (f", instance {count}" if len(samples) > 1 else "")
        sides = [("", sample.messages)]
        if sample.rejected is not None:
            answers = (("chosen", sample.chosen), ("rejected", sample.rejected))
            sides = [(f" {side}", [*sample.messages, {"role": "assistant", "content": said}]) for side, said in answers]
        for side, messages in sides:
            try:
                ids, mask = runtime.encode_chat_masked(messages, sample.tools)
            except UserError as error:
                raise UserError(f"{model}, row {number}: {error}") from None
            yield Shown(name + side, token_texts(runtime, ids), mask)


def token_texts(runtime: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; empty for one that only begins a character."""
    decoder = runtime.stream_decoder(skip_special=False)
    texts = [decoder.push(id) for id in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


def _packed(found: list[tuple[int, Shown]], row: int | None, sequence_length: int) -> Iterator[Shown | str]:
    """The sequences that the row is in, or all, piece by piece."""
    pairs = np.array([max(len(shown.mask) - 1, 0) for _, shown in found])
    packer = WholePacker(pairs, sequence_length, cut_longer=False)
    plan, _ = packer.plan(random(0, 0))
    of = plan.slot // sequence_length
    wanted = {int(of[piece]) for piece, document in enumerate(plan.document) if row in (None, found[document][0])}
    for sequence in sorted(wanted):
        inside = np.flatnonzero(of == sequence)
        yield f"sequence {sequence + 1} of {packer.sequences}: {sequence_length} tokens, {len(inside)} conversations"
        for piece in inside.tolist():
            start = int(plan.slot[piece]) % sequence_length
            yield f"from token {start}:"
            yield found[plan.document[piece]][1]
        empty = sequence_length - int(plan.length[inside].sum())
        yield f"{empty} tokens stay empty"
    for number, shown in found:
        if len(shown.mask) - 1 > sequence_length and row in (None, number):
            yield f"{shown.name}: {len(shown.mask)} tokens are more than {sequence_length}, it is not in any sequence"


def terminal(parts: Sequence[Shown | str], colour: bool = True) -> str:
    """For a terminal: learned stretches on green and between « and »."""
    lines = []
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
            continue
        lines.append(f"── {part.title} ──")
        text = ""
        for learned, group in itertools.groupby(enumerate(part.texts), key=lambda pair: part.mask[pair[0]]):
            inside = ""
            for index, said in group:
                code = (LEARNED if learned else PLAIN)[index % 2]
                # Colour ends with the line, or a terminal paints the rest of it.
                pieces = said.split("\n")
                inside += "\n".join(f"{code}{piece}{RESET}" if colour and piece else piece for piece in pieces)
            text += f"«{inside}»" if learned else inside
        lines.append(text)
    return "\n".join(lines)


def page(parts: Sequence[Shown | str], title: str) -> str:
    """As an HTML page of its own: learned tokens on green, a token's number when the pointer is on it."""
    body = []
    for part in parts:
        if isinstance(part, str):
            body.append(f"<p>{html.escape(part)}</p>")
            continue
        spans = []
        for index, (said, learned) in enumerate(zip(part.texts, part.mask, strict=True)):
            tag, odd = "b" if learned else "i", ' class="o"' if index % 2 else ""
            spans.append(f'<{tag}{odd} title="{index}">{html.escape(said)}</{tag}>')
        body.append(f"<h2>{html.escape(part.title)}</h2><pre>{''.join(spans)}</pre>")
    return PAGE.format(title=html.escape(title), style=page_style() + STYLE, body="".join(body))
