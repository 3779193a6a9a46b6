"""The point-in-time join against a brute-force oracle: never from the future, one row out per row in."""

import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.errors import UserError
from soma.serve.features.join import View, join, latest

BASE = datetime.datetime(2020, 1, 1)
VIEW = View("v", ("a", "b"), ("x",), "event", "created")


def day(number: int) -> datetime.datetime:
    return BASE + datetime.timedelta(days=number)


keys = st.tuples(st.sampled_from(["p", "q", None]), st.integers(0, 1))
rows_of = st.lists(st.tuples(keys, st.integers(0, 6), st.integers(0, 6)), max_size=24)
asked_of = st.lists(st.tuples(keys, st.integers(-1, 7)), max_size=12)


def rows_table(rows: list[Any]) -> pa.Table:
    return pa.table({
        "a": pa.array([key[0] for key, _, _ in rows], pa.string()),
        "b": pa.array([key[1] for key, _, _ in rows], pa.int64()),
        "event": pa.array([day(event) for _, event, _ in rows], pa.timestamp("us", "UTC")),
        "created": pa.array([day(created) for _, _, created in rows], pa.timestamp("ns")),
        "x": pa.array(range(len(rows)), pa.int32()),
    })  # fmt: skip


def questions_table(asked: list[Any]) -> pa.Table:
    return pa.table({
        "id": pa.array(range(len(asked)), pa.int64()),
        "a": pa.array([key[0] for key, _ in asked], pa.string()),
        "b": pa.array([key[1] for key, _ in asked], pa.int64()),
        "event_timestamp": pa.array([day(at) for _, at in asked], pa.timestamp("ms")),
    })  # fmt: skip


def oracle(rows: list[Any], key: Any, at: int, *, created: bool, ttl: int | None) -> int | None:
    """Every row looked at, one after another."""
    best = None
    for place, (their_key, event, made) in enumerate(rows):
        if None in key or their_key != key or event > at or (created and made > at):
            continue
        candidate = (event, made if created else 0, place)
        if best is None or candidate > best:
            best = candidate
    if best is None or (ttl is not None and at - best[0] > ttl):
        return None
    return best[2]


@settings(max_examples=200, deadline=None)
@given(rows_of, asked_of, st.booleans(), st.none() | st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_oracle(rows: list[Any], asked: list[Any], created: bool, ttl: int | None, draw: Any) -> None:
    view = replace(VIEW, created_time="created" if created else None, ttl=None if ttl is None else ttl * 86_400.0)
    asked += [draw.choice(asked) for _ in range(2) if asked]  # the same question twice is two rows
    made = join(questions_table(asked), rows_table(rows), view)
    assert made.column("id").to_pylist() == list(range(len(asked)))
    expected = [oracle(rows, key, at, created=created, ttl=ttl) for key, at in asked]
    assert made.column("x").to_pylist() == expected


@settings(max_examples=80, deadline=None)
@given(rows_of, st.integers(-1, 7), st.none() | st.integers(0, 4))
def test_the_latest_of_every_key(rows: list[Any], at: int, ttl: int | None) -> None:
    """What an online store gets is what a question at that time would."""
    view = replace(VIEW, ttl=None if ttl is None else ttl * 86_400.0)
    found = latest(rows_table(rows), view, int(day(at).replace(tzinfo=datetime.UTC).timestamp()) * 10**9)
    expected = {key: oracle(rows, key, at, created=True, ttl=ttl) for key, _, _ in rows}
    assert sorted(found.column("x").to_pylist()) == sorted(x for x in expected.values() if x is not None)


def test_more_rows_than_one_sort_keeps_in_order() -> None:
    """4,000 rows on 3 days and 4 keys: ties everywhere, against the oracle."""
    draw = np.random.default_rng(0)
    rows = [((("p", "q")[draw.integers(2)], int(draw.integers(2))), int(draw.integers(3)), int(draw.integers(6)))
            for _ in range(4000)]  # fmt: skip
    asked = [((("p", "q")[draw.integers(2)], int(draw.integers(2))), int(draw.integers(8))) for _ in range(50)]
    made = join(questions_table(asked), rows_table(rows), VIEW).column("x").to_pylist()
    assert made == [oracle(rows, key, at, created=True, ttl=None) for key, at in asked]


def without_created(rows: pa.Table, questions: pa.Table) -> list[Any]:
    return join(questions, rows, replace(VIEW, created_time=None)).column("x").to_pylist()


def first_of_ties(rows: pa.Table, questions: pa.Table) -> list[Any]:
    back = rows.take(list(range(rows.num_rows))[::-1])
    return join(questions, back, VIEW).column("x").to_pylist()


@pytest.mark.parametrize("broken", [without_created, first_of_ties])
def test_the_oracle_notices(broken: Callable[[pa.Table, pa.Table], list[Any]]) -> None:
    """Negative controls: a join that sees corrections before they were made, one that takes the first of equals."""
    rows = [(("p", 0), 1, 1), (("p", 0), 1, 5), (("q", 0), 1, 1), (("q", 0), 1, 1)]
    asked = [(("p", 0), 3), (("q", 0), 3)]
    expected = [oracle(rows, key, at, created=True, ttl=None) for key, at in asked]
    assert expected == [0, 3]
    assert join(questions_table(asked), rows_table(rows), VIEW).column("x").to_pylist() == expected
    assert broken(rows_table(rows), questions_table(asked)) != expected


def test_mistakes() -> None:
    rows, questions = rows_table([(("p", 0), 0, 0)]), questions_table([(("p", 0), 0)])
    with pytest.raises(UserError, match="view v: there is no column x; it has a, b, event, created"):
        join(questions, rows.drop_columns(["x"]), VIEW)
    with pytest.raises(UserError, match="have a column id already"):
        join(questions, rows, replace(VIEW, features=("id",)))
    with pytest.raises(UserError, match="the questions: event_timestamp is int64"):
        join(questions.set_column(3, "event_timestamp", pa.array([1])), rows, VIEW)
    with pytest.raises(UserError, match="created is null in row 0"):
        join(questions, rows.set_column(3, "created", pa.array([None], pa.timestamp("us"))), VIEW)
    old = pa.array([datetime.datetime(1492, 1, 1)], pa.timestamp("us"))
    with pytest.raises(UserError, match="outside the years"):
        join(questions, rows.set_column(2, "event", old), VIEW)
    with pytest.raises(UserError, match="key b: string in the questions, int64 in view v"):
        join(questions.set_column(2, "b", pa.array(["x"])), rows, VIEW)
    assert join(questions, rows, VIEW, prefix=True).column_names[-1] == "v__x"
