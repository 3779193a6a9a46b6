"""The point-in-time join: for every question the value that was known when it was asked.

A feature row says: from `event_time` on the feature has this value; it was written down at `created_time`. A question
at time t sees rows with event_time <= t and created_time <= t, and of them takes the latest event_time, of these the
latest created_time (a correction), of these the last of the file. One row out per row in, in the same order.

A row is visible from v = max(event_time, created_time) on, and what a question takes is the greatest of all visible
rows in the order (event_time, created_time, place). What is visible only grows, so that is a running maximum over v:
one sort and one binary search for any number of keys (`_greatest_before`). Ties and late corrections need no case of
their own.

Feast's own join is not used: `docs/features.md` has the rows that it loses and the future that it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from soma.base.errors import UserError

NANO = 1_000_000_000


@dataclass(frozen=True)
class View:
    """What a table of feature rows has. ttl: seconds for which a value holds after its event_time; None for ever."""

    name: str
    keys: tuple[str, ...]
    features: tuple[str, ...]
    event_time: str
    created_time: str | None = None
    ttl: float | None = None

    @property
    def columns(self) -> list[str]:
        """All that is read of the table."""
        times = [self.event_time] + ([self.created_time] if self.created_time else [])
        return [*self.keys, *times, *self.features]


def join(
    questions: pa.Table, rows: pa.Table, view: View, at: str = "event_timestamp", *, prefix: bool = False
) -> pa.Table:  # fmt: skip
    """`questions` with the view's features as they were known at the time in column `at`; null where nothing was.

    prefix: columns are VIEW__FEATURE. Times without a zone are UTC. A null key matches nothing. O((n+m) log(n+m)).
    Raises UserError: a column is missing or there already, a time is null, a key has another type here than there.
    """
    names = [f"{view.name}__{name}" if prefix else name for name in view.features]
    if twice := [name for name in names if name in questions.column_names]:
        raise UserError(f"view {view.name}: the questions have a column {twice[0]} already; ask for full names")
    places = greatest_before(questions, rows, view, nanoseconds(questions, at, "the questions"))
    index = pa.array(places, mask=places < 0)
    for name, feature in zip(names, view.features, strict=True):
        column = column_of(rows, feature, f"view {view.name}").combine_chunks()
        questions = questions.append_column(name, pc.take(column, index))
    return questions


def latest(rows: pa.Table, view: View, at_ns: int) -> pa.Table:
    """Of every key the row that a question at that time takes, for an online store. at_ns: nanoseconds since 1970."""
    keys = rows.select(list(view.keys)).group_by(list(view.keys)).aggregate([])
    places = greatest_before(keys, rows, view, np.full(keys.num_rows, at_ns, np.int64))
    return rows.select(view.columns).take(pa.array(np.sort(places[places >= 0])))


def greatest_before(questions: pa.Table, rows: pa.Table, view: View, asked: np.ndarray) -> np.ndarray:
    """For each question the place of the row that it takes, -1 for none. asked: int64 nanoseconds [questions]."""
    where = f"view {view.name}"
    events = nanoseconds(rows, view.event_time, where)
    created = nanoseconds(rows, view.created_time, where) if view.created_time else events
    ours, theirs = key_codes(questions, rows, view)
    if rows.num_rows == 0:
        return np.full(questions.num_rows, -1, np.int64)
    places = _greatest_before(ours, asked, theirs, np.maximum(events, created), np.lexsort((created, events)))
    if view.ttl is not None:
        found = places >= 0
        age = (asked - events[places]).view(np.uint64)  # an event is never after its question: no overflow
        places = np.where(found & (age <= np.uint64(round(view.ttl * NANO))), places, -1)
    return places


def _greatest_before(
    ours: np.ndarray, asked: np.ndarray, theirs: np.ndarray, visible: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """ours, theirs: codes of keys [questions], [rows], -1 for null. order: places of rows, the greatest last."""
    n = len(theirs)
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    # Times as small numbers, so that (key, time) is one number.
    times = np.unique(np.concatenate([visible, asked]))
    width = len(times) + 1
    seen = np.lexsort((visible, theirs))
    seen = seen[theirs[seen] >= 0]
    points = theirs[seen] * width + np.searchsorted(times, visible[seen])
    if len(seen) == 0:
        return np.full(len(ours), -1, np.int64)
    best = np.maximum.accumulate(theirs[seen] * n + rank[seen])
    last = np.searchsorted(points, ours * width + np.searchsorted(times, asked), side="right") - 1
    found = (last >= 0) & (ours >= 0) & (theirs[seen][last] == ours)
    return np.where(found, order[best[last] % n], -1)


def key_codes(questions: pa.Table, rows: pa.Table, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The same number for the same key on both sides, -1 where a part of it is null. Raises UserError."""
    split, total = questions.num_rows, questions.num_rows + rows.num_rows
    codes, is_null = np.zeros(total, np.int64), np.zeros(total, bool)
    for key in view.keys:
        left, right = column_of(questions, key, "the questions"), column_of(rows, key, f"view {view.name}")
        if left.type != right.type:
            try:
                left = left.cast(right.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise UserError(f"key {key}: {left.type} in the questions, {right.type} in view {view.name}") from None
        both = pa.chunked_array([*left.chunks, *right.chunks], right.type).combine_chunks()
        encoded = both.dictionary_encode().indices
        is_null |= encoded.is_null().to_numpy(zero_copy_only=False)
        part = encoded.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        codes = np.unique(codes * (int(part.max(initial=0)) + 1) + part, return_inverse=True)[1].astype(np.int64)
    codes[is_null] = -1
    return codes[:split], codes[split:]


def nanoseconds(table: pa.Table, name: str, where: str) -> np.ndarray:
    """A column of times as int64 nanoseconds since 1970, UTC. Raises UserError."""
    column = column_of(table, name, where)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        raise UserError(f"{where}: {name} is {column.type}; expected a timestamp")
    if column.null_count:
        place = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{where}: {name} is null in row {place}")
    try:
        made = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
    except pa.ArrowInvalid:
        raise UserError(f"{where}: {name} has times outside the years 1678 to 2262") from None
    return np.asarray(made.combine_chunks().to_numpy(zero_copy_only=False), dtype=np.int64)


def column_of(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """A column. Raises UserError with those that are there."""
    if name not in table.column_names:
        raise UserError(f"{where}: there is no column {name}; it has {', '.join(table.column_names)}")
    return table.column(name)


def known_as(views: Sequence[View], reference: str) -> tuple[View, str]:
    """The view and the feature of VIEW:FEATURE. Raises UserError."""
    name, _, feature = reference.partition(":")
    for view in views:
        if view.name == name:
            if feature in view.features:
                return view, feature
            raise UserError(f"{reference}: the view {name} has {', '.join(view.features)}")
    raise UserError(f"{reference}: there is no such view; there are {', '.join(view.name for view in views) or 'none'}")
