"""What the ledger says: sums by key, team, model, day and more, as rows, CSV, JSON or a table."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from soma.base.errors import UserError
from soma.serve.database import Database, keys, ledger
from soma.serve.keys.store import NANO

COLUMNS = ("key", "name", "team", "model", "route", "day", "outcome", "prompt")
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
SUMS = ("calls", "open", "estimated", "unpriced", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True)
class Line:
    """Sums over the calls that agree in `by`. Of open calls nothing is counted yet. money: exact, in `currency`."""

    by: dict[str, str | None]
    calls: int
    open: int
    estimated: int  # calls whose counts are estimates
    unpriced: int  # settled calls of services that had no price file
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    money: Decimal
    currency: str | None


def report(
    database: Database, by: Sequence[str] = ("key", "model", "day"), since: str | None = None, until: str | None = None
) -> list[Line]:
    """Sums by these columns, for days from `since` to `until`, both included. Calls that were refused after they had
    been written down count as nothing. Raises UserError."""
    if not by or len(set(by)) != len(by) or not set(by) <= set(COLUMNS):
        raise UserError(f"by {','.join(by)!r}: expected some of {', '.join(COLUMNS)}, each once")
    for name, day in (("since", since), ("until", until)):
        if day is not None and not DAY.fullmatch(day):
            raise UserError(f"{name} {day!r}: expected a day as 2026-11-26")
    where = {"key": ledger.c.key_id, "name": keys.c.name}
    groups = [where[name] if name in where else ledger.c[name] for name in by]
    settled = ledger.c.settled_at.is_not(None)
    sums = [
        sa.func.count(), sa.func.sum(_one(sa.not_(settled))), sa.func.sum(ledger.c.estimated),
        sa.func.sum(_one(sa.and_(settled, ledger.c.nano.is_(None)))),
        *(sa.func.sum(ledger.c[name]) for name in SUMS[4:]), sa.func.sum(sa.func.coalesce(ledger.c.nano, 0)),
    ]  # fmt: skip
    tables = ledger.outerjoin(keys, keys.c.id == ledger.c.key_id)
    question = sa.select(*groups, *sums, ledger.c.currency).select_from(tables)
    question = question.where(sa.or_(ledger.c.outcome.is_(None), ledger.c.outcome != "refused"))
    if since is not None:
        question = question.where(ledger.c.day >= since)
    if until is not None:
        question = question.where(ledger.c.day <= until)
    question = question.group_by(*groups, ledger.c.currency)
    with database.read() as connection:
        rows = connection.execute(question).all()
    lines = []
    for row in rows:
        values, (*counts, nano, currency) = row[: len(by)], row[len(by) :]
        named = dict(zip(SUMS, map(int, counts), strict=True))
        lines.append(
            Line(dict(zip(by, values, strict=True)), money=Decimal(int(nano)) / NANO, currency=currency, **named)
        )
    return sorted(lines, key=lambda line: [str(value or "") for value in line.by.values()])


def _one(condition: Any) -> Any:
    return sa.case((condition, 1), else_=0)


def flat(line: Line) -> dict[str, Any]:
    """A line as one level of names; money as text, exact."""
    values = asdict(line)
    return {**values.pop("by"), **values, "money": f"{line.money:f}"}


def as_json(lines: Sequence[Line]) -> str:
    return json.dumps([flat(line) for line in lines], indent=1)


def as_csv(lines: Sequence[Line], by: Sequence[str]) -> str:
    """With a head. A text that a spreadsheet would take for a formula gets a quote in front."""
    out = io.StringIO()
    names = [*by, *SUMS, "money", "currency"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for line in lines:
        row = flat(line)
        writer.writerow([_harmless(row[name]) for name in names])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def as_table(lines: Sequence[Line], by: Sequence[str]) -> str:
    """For a terminal."""
    names = [*by, *SUMS, "money", "currency"]
    rows = [
        names,
        *([str(flat(line)[name] if flat(line)[name] is not None else "-") for name in names] for line in lines),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "  ".join(cell.ljust(width) if place < len(by) else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join(text)
