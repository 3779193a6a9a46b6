"""Packing in blocks, curriculum by length, and what packing wastes. Checked against plain loops."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.data.loader import IGNORE, TokenLoader
from soma.data.packing import Blocks, ConcatPacker, WholePacker, blocks_of, waste
from soma.data.tokens import SplitWriter, write_index

EOS = 0


def write(out: Path, documents: list[list[int]], shard_tokens: int = 1 << 20) -> Path:
    out.mkdir(exist_ok=True)
    with SplitWriter(out, "train", 50_000, False, shard_tokens) as writer:
        for ids in documents:
            writer.add(ids, None, len(ids))
    write_index(out, 50_000, "hash", EOS, False, {"train": writer.entry()})
    return out


def numbered(sizes: list[int]) -> list[list[int]]:
    start, documents = 1, []
    for size in sizes:
        documents.append([*range(start, start + size - 1), EOS])
        start += size
    return documents


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(
    sizes=lengths, length=st.integers(2, 16), buffer=st.one_of(st.none(), st.integers(1, 12)),
    stages=st.lists(st.integers(1, 40), max_size=2, unique=True).map(sorted),
    pack=st.sampled_from(["concat", "whole"]), world=st.sampled_from([1, 2, 3]), before=st.integers(0, 9),
)  # fmt: skip
def test_blocks_give_every_token_once_on_any_ranks_and_resume(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, buffer: int | None, stages: list[int],
    pack: str, world: int, before: int,
) -> None:  # fmt: skip
    documents = numbered(sizes)
    folder = write(tmp_path_factory.mktemp("t"), documents)

    def loader(rows: int, rank: int = 0, size: int = 1, epochs: int | None = None) -> TokenLoader:
        return TokenLoader(folder, "train", length, rows, rank, size, 1, pack, epochs, buffer=buffer,  # type: ignore[arg-type]
                           length_stages=stages)  # fmt: skip

    found = []
    for batch in loader(4, epochs=1):
        learned = batch.targets != IGNORE
        found += list(zip(batch.tokens[learned].tolist(), batch.targets[learned].tolist(), strict=True))
    assert sorted(found) == sorted(pair for ids in documents for pair in zip([EOS, *ids], ids, strict=False))
    one = loader(world * 2)
    for _ in range(before):
        next(one)
    many = [loader(2, rank, world) for rank in range(world)]
    for each in many:
        each.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(4):
        whole = next(one)
        parts = [next(each) for each in many]
        np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
        np.testing.assert_array_equal(np.concatenate([part.positions for part in parts]), whole.positions)


def test_one_block_is_what_it_was() -> None:
    """The order of the epoch without blocks is part of what a checkpoint means."""
    pairs = np.array([3, 7, 2, 5, 9])
    blocks = Blocks(lambda one: ConcatPacker(pairs[one], 4), *blocks_of(pairs, None, ()), 4)
    assert blocks.sequences == 7
    plan, order = blocks.plan(3, 1, 0)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 1])))
    np.testing.assert_array_equal(plan.document, generator.permutation(5))
    np.testing.assert_array_equal(order, generator.permutation(7))


def test_blocks_bound_what_lies_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", numbered([9] * 40))
    loader = TokenLoader(folder, "train", 6, 1, seed=2, epochs=2, buffer=8)
    blocks, orders = [], []
    for number, batch in enumerate(loader):
        documents = (batch.targets[batch.targets > 0] - 1) // 9
        assert len(set((documents // 8).tolist())) == 1, "a sequence holds documents of one block"
        if not blocks or blocks[-1] != documents[0] // 8:
            blocks.append(int(documents[0] // 8))
        if number + 1 == loader.sequences_per_epoch:
            orders.append(blocks)
            blocks = []
    orders.append(blocks)
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3, 4]] * 2, "one visit to a block in an epoch"
    assert orders[0] != orders[1]


def test_short_documents_come_first_in_every_epoch(tmp_path: Path) -> None:
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 40, 120)]
    folder = write(tmp_path / "t", numbered(sizes))
    starts = np.cumsum([1, *sizes])
    loader = TokenLoader(folder, "train", 8, 1, epochs=2, length_stages=[8, 20], buffer=20)
    stage = np.searchsorted([8, 20], sizes, side="left")
    seen = []
    for batch in loader:
        ids = batch.targets[batch.targets > 0]
        if len(ids):
            seen.append({int(stage[np.searchsorted(starts, one, side="right") - 1]) for one in ids})
    assert all(len(one) == 1 for one in seen)
    flat = [next(iter(one)) for one in seen]
    falls = [place for place in range(1, len(flat)) if flat[place] < flat[place - 1]]
    assert len(falls) == 1, "it rises through the epoch and begins again with the next"
    assert set(flat) == {0, 1, 2}
    changed = TokenLoader(folder, "train", 8, 1, length_stages=[9, 20], buffer=20)
    with pytest.raises(Exception, match="length_stages"):
        changed.load_state_dict(loader.state_dict())


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), length=st.integers(2, 12),
       buffer=st.one_of(st.none(), st.integers(1, 9)))  # fmt: skip
def test_waste_is_what_a_plain_count_says(sizes: list[int], length: int, buffer: int | None) -> None:
    pairs = np.array(sizes)
    documents, stages = blocks_of(pairs, buffer, ())
    whole = waste(Blocks(lambda one: WholePacker(pairs[one], length, True), documents, stages, length), pairs)
    assert whole.padding == pytest.approx(1 - sum(sizes) / (whole.sequences * length))
    assert (whole.cut, whole.needless) == (sum(size > length for size in sizes), 0)
    blocks = Blocks(lambda one: ConcatPacker(pairs[one], length), documents, stages, length)
    cut = needless = 0
    for block, members in enumerate(documents):
        place = 0
        for document in blocks.plan(0, 0, block)[0].document:
            assert document in members
            across = place // length != (place + sizes[document] - 1) // length
            cut, needless = cut + across, needless + (across and sizes[document] <= length)
            place += sizes[document]
    found = waste(blocks, pairs)
    assert (found.cut, found.needless) == (cut, needless)
    assert found.padding == pytest.approx(1 - sum(sizes) / (found.sequences * length))


def test_waste_of_the_worked_example() -> None:
    pairs = np.array([3, 3, 3])
    everything = blocks_of(pairs, None, ())
    concat = waste(Blocks(lambda one: ConcatPacker(pairs[one], 4), *everything, 4), pairs)
    assert (concat.sequences, concat.padding, concat.cut, concat.needless) == (3, 0.25, 2, 2)
    whole = waste(Blocks(lambda one: WholePacker(pairs[one], 4, True), *everything, 4), pairs)
    assert (whole.sequences, whole.padding, whole.cut, whole.needless) == (3, 0.25, 0, 0)


def test_the_command_shows_and_mixes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from soma.cli import app

    folder = write(tmp_path / "t", numbered([4, 4, 4]))
    run = CliRunner().invoke(app, ["data", "packing", str(folder), "--length", "5", "--buffer", "2"])
    rows = {line[:26].strip(): line[26:].split() for line in run.output.splitlines()[2:]}
    assert rows == {
        "concat": ["3", "20.000%", "66.67%", "66.67%", "0"], "whole": ["3", "20.000%", "0.00%", "0.00%", "0"],
        "whole, 2 at a time": ["3", "20.000%", "0.00%", "0.00%", "0"],
    }  # fmt: skip
    parts = ["--part", f"a={folder},weight=2", "--part", f"b=file://{folder},epochs=1"]
    assert CliRunner().invoke(app, ["data", "mix", str(tmp_path / "mixed"), *parts]).exit_code == 0
    index = json.loads((tmp_path / "mixed" / "index.json").read_text())
    assert [(part["tokens"], part["weight"], part["epochs"]) for part in index["parts"]] == [
        ("../t", 2.0, None), (f"file://{folder}", None, 1.0)
    ]  # fmt: skip
    assert TokenLoader(tmp_path / "mixed", "train", 4, 2).sequences_per_epoch == 6
    wrong = CliRunner().invoke(app, ["data", "mix", str(tmp_path / "x"), "--part", f"a={folder},weight=no"])
    assert "'weight=no' is neither weight= nor epochs=" in str(wrong.exception)
    assert not (tmp_path / "x").exists()
