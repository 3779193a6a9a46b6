"""Packing and loading: every token once, resume, ranks, boundaries, damaged shards. Checked against a plain loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.errors import UserError
from soma.data.loader import IGNORE, PADDING, Batch, PreferenceLoader, TokenLoader
from soma.data.packing import best_fit
from soma.data.store import TokenStore
from soma.data.tokens import SplitWriter, write_index

EOS = 0
Documents = list[list[int]]
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def write(
    out: Path, documents: Documents, masks: Documents | None = None, split: str = "train", shard_tokens: int = 1 << 20,
    vocab_size: int = 50_000,
) -> Path:  # fmt: skip
    """A tokens folder with one split."""
    out.mkdir(exist_ok=True)
    with SplitWriter(out, split, vocab_size, masks is not None, shard_tokens) as writer:
        for index, ids in enumerate(documents):
            writer.add(ids, masks[index] if masks else None, len(ids))
    splits = json.loads((out / "index.json").read_text())["splits"] if (out / "index.json").exists() else {}
    write_index(out, vocab_size, "hash", EOS, masks is not None, {**splits, split: writer.entry()})
    return out


def numbered(sizes: list[int], eos: bool = True) -> Documents:
    """Documents of distinct tokens, so that each can be found again; the last is end of text."""
    start, documents = 1, []
    for size in sizes:
        documents.append([*range(start, start + size - 1), EOS] if eos else list(range(start, start + size)))
        start += size
    return documents


def pairs_of(batches: list[Batch]) -> list[tuple[int, int]]:
    """All (token, target) pairs that carry loss, sorted."""
    found = []
    for batch in batches:
        learned = batch.targets != IGNORE
        found += list(zip(batch.tokens[learned].tolist(), batch.targets[learned].tolist(), strict=True))
    return sorted(found)


def check_batch(batch: Batch) -> None:
    """Padding is marked; a row's documents are numbered from 0 upwards; positions count from 0 in each."""
    for tokens, targets, positions, ids in zip(
        batch.tokens, batch.targets, batch.positions, batch.document_ids, strict=True
    ):
        assert (targets[ids == PADDING] == IGNORE).all()
        assert (tokens[ids == PADDING] == EOS).all()
        real = ids[ids != PADDING]
        assert (ids[len(real) :] == PADDING).all()
        assert (np.diff(real) >= 0).all()
        for number in np.unique(real):
            assert positions[ids == number].tolist() == list(range((ids == number).sum()))


@settings(max_examples=40, deadline=None)
@given(
    sizes=lengths,
    length=st.integers(1, 16),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 5),
    shard=st.integers(8, 60),
)
def test_concat_gives_every_token_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, batch_size: int, seed: int, shard: int
) -> None:
    documents = numbered(sizes)
    folder = write(tmp_path_factory.mktemp("t"), documents, shard_tokens=shard)
    batches = list(TokenLoader(folder, "train", length, batch_size, seed=seed, epochs=1))
    # Every stored token is a target once; the input before a document's first token is end of text.
    assert pairs_of(batches) == sorted(
        (before, after) for ids in documents for before, after in zip([EOS, *ids], ids, strict=False)
    )
    for batch in batches:
        assert batch.tokens.shape == (batch_size, length)
        assert batch.tokens.dtype == np.int64
        check_batch(batch)
    assert len(batches) == math.ceil(math.ceil(sum(sizes) / length) / batch_size)


@settings(max_examples=40, deadline=None)
@given(sizes=lengths, length=st.integers(4, 50), batch_size=st.integers(1, 5), masked=st.booleans())
def test_whole_keeps_documents_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, batch_size: int, masked: bool
) -> None:
    sizes = [size + 1 for size in sizes]
    documents = numbered(sizes, eos=not masked)
    masks = [[0] + [index % 2 for index in range(len(ids) - 1)] for ids in documents] if masked else None
    folder = write(tmp_path_factory.mktemp("t"), documents, masks)
    if masked and min(sizes) - 1 > length:
        with pytest.raises(UserError, match="longer than sequence_length"):
            TokenLoader(folder, "train", length, batch_size, pack="whole", epochs=1)
        return
    loader = TokenLoader(folder, "train", length, batch_size, pack="whole", epochs=1)
    batches = list(loader)
    for batch in batches:
        check_batch(batch)
    if masks is None:
        wanted = [pair for ids in documents for pair in zip([EOS, *ids], ids, strict=False)]
        assert loader.left_out == 0
    else:
        kept = [(ids, mask) for ids, mask in zip(documents, masks, strict=True) if len(ids) - 1 <= length]
        wanted = [(ids[i - 1], ids[i]) for ids, mask in kept for i in range(1, len(ids)) if mask[i]]
        assert loader.left_out == len(documents) - len(kept)
        rows = [row for batch in batches for row in zip(batch.tokens, batch.document_ids, strict=True)]
        inputs = sorted(
            tokens[ids == number].tolist() for tokens, ids in rows for number in set(ids[ids >= 0].tolist())
        )
        assert inputs == sorted(ids[:-1] for ids, _ in kept)  # each whole, in one row
    assert pairs_of(batches) == sorted(wanted)


@settings(max_examples=25, deadline=None)
@given(
    sizes=lengths, length=st.integers(2, 12), world=st.sampled_from([2, 3, 4]), batch_size=st.integers(1, 3),
    pack=st.sampled_from(["concat", "whole"]), epochs=st.sampled_from([None, 1, 2]),
)  # fmt: skip
def test_ranks_together_see_what_one_sees(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, world: int, batch_size: int, pack: str,
    epochs: int | None,
) -> None:  # fmt: skip
    folder = write(tmp_path_factory.mktemp("t"), numbered(sizes))
    one = TokenLoader(folder, "train", length, batch_size * world, seed=3, pack=pack, epochs=epochs)  # type: ignore[arg-type]
    many = [
        TokenLoader(folder, "train", length, batch_size, rank, world, seed=3, pack=pack, epochs=epochs)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    for _ in range(12):
        whole, parts = next(one, None), [next(loader, None) for loader in many]
        if whole is None:
            assert parts == [None] * world
            break
        for name in ("tokens", "targets", "positions", "document_ids"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert one.state_dict() == many[0].state_dict() == many[-1].state_dict()


@settings(max_examples=25, deadline=None)
@given(
    sizes=lengths, before=st.integers(0, 20), pack=st.sampled_from(["concat", "whole"]), world=st.sampled_from([1, 2])
)
def test_resume_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], before: int, pack: str, world: int
) -> None:
    folder = write(tmp_path_factory.mktemp("t"), numbered(sizes))
    straight = TokenLoader(folder, "train", 7, 4, seed=1, pack=pack)  # type: ignore[arg-type]
    for _ in range(before):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))  # survives JSON
    resumed = [TokenLoader(folder, "train", 7, 4 // world, r, world, seed=1, pack=pack) for r in range(world)]  # type: ignore[arg-type]
    for loader in resumed:
        loader.load_state_dict(state)
    for _ in range(5):
        expected = next(straight)
        np.testing.assert_array_equal(np.concatenate([next(loader).tokens for loader in resumed]), expected.tokens)


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", numbered([20] * 30))
    loader = TokenLoader(folder, "train", 10, 60, seed=0)
    first, second = next(loader), next(loader)
    assert loader.epoch == 2
    assert pairs_of([first]) == pairs_of([second])
    assert not np.array_equal(first.tokens, second.tokens)
    assert not np.array_equal(first.tokens, next(TokenLoader(folder, "train", 10, 60, seed=1)).tokens)
    np.testing.assert_array_equal(first.tokens, next(TokenLoader(folder, "train", 10, 60, seed=0)).tokens)


def test_a_batch_may_span_many_epochs(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", numbered([3]))
    batch = next(TokenLoader(folder, "train", 8, 5))
    assert (batch.targets != IGNORE).sum() == 5 * 3


def test_state_of_other_data_is_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", numbered([9, 8])), write(tmp_path / "b", numbered([9, 9]))
    state = TokenLoader(one, "train", 4, 1).state_dict()
    with pytest.raises(UserError, match="other data"):
        TokenLoader(other, "train", 4, 1).load_state_dict(state)
    with pytest.raises(UserError, match="sequence_length 4, this loader has 5"):
        TokenLoader(one, "train", 5, 1).load_state_dict(state)
    with pytest.raises(UserError, match="seed"):
        TokenLoader(one, "train", 4, 1, seed=9).load_state_dict(state)
    with pytest.raises(UserError, match="pack"):
        TokenLoader(one, "train", 4, 1, pack="whole").load_state_dict(state)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", numbered([30] * 4), [[1] * 30] * 4, shard_tokens=60)
    for name in ("train-00001.bin", "train-00000.offsets.bin", "train-00001.mask.bin"):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(UserError, match=f"{name}: truncated"):
            TokenStore(folder, "train", verify=False)
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: corrupt"):
            TokenStore(folder, "train")
        path.unlink()
        with pytest.raises(UserError, match=f"{name}: missing"):
            TokenStore(folder, "train")
        path.write_bytes(good)
    assert TokenStore(folder, "train").tokens == 120
    with pytest.raises(UserError, match="no split 'validation'; there are train"):
        TokenStore(folder, "validation")
    (folder / "index.json").write_text('{"format": "soma-tokens", "version": 99}')
    with pytest.raises(UserError, match="not soma-tokens version 1"):
        TokenStore(folder, "train")
    with pytest.raises(UserError, match="not a tokens folder"):
        TokenStore(tmp_path, "train")


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no documents"):
        TokenLoader(write(tmp_path / "t", []), "train", 4, 1)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    documents = [[70_000, 69_999, EOS]]
    store = TokenStore(write(tmp_path / "t", documents, vocab_size=70_001), "train")
    assert (tmp_path / "t" / "train-00000.bin").stat().st_size == 12
    assert store.document(0).tolist() == documents[0]
    small = write(tmp_path / "s", [[65_535, EOS]], vocab_size=65_536)
    assert TokenStore(small, "train").document(0).tolist() == [65_535, EOS]
    assert (small / "train-00000.bin").stat().st_size == 4


def test_best_fit() -> None:
    bins, offsets, count = best_fit(np.array([6, 5, 4, 3, 2]), 10)
    assert (bins.tolist(), offsets.tolist(), count) == ([0, 1, 0, 1, 1], [0, 0, 6, 5, 8], 2)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_never_overlaps(sizes: list[int]) -> None:
    length = np.array(sorted(sizes, reverse=True), np.int64)
    bins, offsets, count = best_fit(length, 50)
    used = np.zeros((count, 50), int)
    for where, offset, size in zip(bins, offsets, length, strict=True):
        used[where, offset : offset + size] += 1
    assert used.max(initial=0) <= 1
    assert used.sum() == sum(sizes)
    assert (np.sort(used.sum(1))[:2].sum() > 50) or count < 2  # the two emptiest would not fit into one


def preference(out: Path, pairs: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for side in (1, 2):
        documents, masks = [], []
        for number in range(pairs):
            size = int(generator.integers(1, 12))
            documents.append([10 + number, 20_000, *([side * 1000 + number] * size)])
            masks.append([0, 0] + [1] * size)
        write(out, documents, masks, split=f"train.{('chosen', 'rejected')[side - 1]}")
    return out


def test_preference_pairs_stay_together(tmp_path: Path) -> None:
    folder = preference(tmp_path / "p", 23)
    loader = PreferenceLoader(folder, "train", 10, 4, epochs=1)
    seen = []
    for batch in loader:
        np.testing.assert_array_equal(batch.chosen.tokens[:, 0], batch.rejected.tokens[:, 0])  # the same prompt
        for row in range(4):
            chosen, rejected = batch.chosen.targets[row], batch.rejected.targets[row]
            assert set(chosen[chosen != IGNORE] - 1000) == set(rejected[rejected != IGNORE] - 2000)
            assert batch.chosen.document_ids[row].max() <= 0
            if batch.chosen.tokens[row, 0] != EOS:
                seen.append(int(batch.chosen.tokens[row, 0]))
        check_batch(batch.chosen)
        check_batch(batch.rejected)
    assert loader.left_out > 0
    assert len(seen) == len(set(seen)) == 23 - loader.left_out


def test_preference_resume_and_ranks(tmp_path: Path) -> None:
    folder = preference(tmp_path / "p", 23)
    one = PreferenceLoader(folder, "train", 16, 4, seed=2)
    next(one)
    many = [PreferenceLoader(folder, "train", 16, 2, rank, 2, seed=2) for rank in range(2)]
    for loader in many:
        loader.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(8):
        whole, parts = next(one), [next(loader) for loader in many]
        np.testing.assert_array_equal(np.concatenate([part.rejected.tokens for part in parts]), whole.rejected.tokens)
    with pytest.raises(UserError, match="other data"):
        PreferenceLoader(preference(tmp_path / "q", 22), "train", 16, 4, seed=2).load_state_dict(one.state_dict())
