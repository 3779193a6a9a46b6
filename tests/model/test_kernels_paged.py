"""Paged attention in Triton's interpreter against float64: mixed chunks, split-KV decode, windows, shuffled blocks."""

import pytest
import torch

pytest.importorskip("triton")

from soma.model.kernels import paged, reference
from soma.model.kernels.launch import INTERPRETED
from soma.model.kernels.paged import choose_splits, paged_attention

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU these run as benchmarks/attention.py --check")


def case(new: list[int], before: list[int], heads: int, kv_heads: int, width: int, page: int = 16, dtype=torch.float32):
    """Arguments of `paged_attention`: blocks in random order, and NaN in every slot that no sequence may read."""
    lengths = [a + b for a, b in zip(new, before, strict=True)]
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 2).int()
    tables = torch.zeros(len(new), max(counts) + 1, dtype=torch.int32)
    keys, values = (torch.full((len(order), kv_heads, page, width), torch.nan, dtype=dtype) for _ in range(2))
    for row, (count, blocks) in enumerate(zip(counts, order[2:].split(counts), strict=True)):
        tables[row, :count] = blocks
        for token in range(lengths[row]):
            for cache in (keys, values):
                cache[blocks[token // page].item(), :, token % page] = torch.randn(kv_heads, width).to(dtype)
    q = torch.randn(sum(new), heads, width).to(dtype)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    return q, keys, values, starts, torch.tensor(lengths, dtype=torch.int32), tables


def error(arguments, window=None, **options) -> float:
    q, keys, values, starts, lengths, tables = arguments
    found = paged_attention(*arguments, window=window, **options)
    exact = [x.double() for x in (q, keys, values)]
    return reference.relative_error(
        found, reference.paged_attention(*exact, starts.tolist(), lengths.tolist(), tables, window)
    )


@pytest.mark.parametrize(
    ("new", "before", "heads", "kv_heads", "width", "window"),
    [
        ([70], [0], 2, 1, 32, None),
        ([1, 17, 40], [50, 3, 0], 4, 2, 32, None),
        ([33, 1], [20, 90], 3, 1, 64, None),
        ([37, 5, 1], [40, 0, 63], 2, 2, 80, 9),
        ([50], [31], 4, 1, 128, 40),
    ],
)
def test_chunks(new, before, heads: int, kv_heads: int, width: int, window: int | None) -> None:
    assert error(case(new, before, heads, kv_heads, width), window) < 1e-6


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 20])
def test_decode(splits: int, window: int | None) -> None:
    """Lengths from one token (most splits are then empty) to several tiles."""
    arguments = case([1, 1, 1, 1], [0, 15, 97, 200], 6, 2, 32)
    assert error(arguments, window, splits=splits) < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(8, 1, 64, 8), (2, 2, 80, 32), (20, 1, 128, 16)])
def test_decode_shapes(heads: int, kv_heads: int, width: int, page: int) -> None:
    assert error(case([1, 1], [63, 30], heads, kv_heads, width, page), splits=2) < 1e-6
    assert error(case([1, 1], [63, 30], heads, kv_heads, width, page)) < 1e-6


def test_half_precision() -> None:
    assert error(case([1, 30], [40, 2], 2, 1, 64, dtype=torch.float16)) < 1e-3
    assert error(case([1, 1], [40, 99], 2, 1, 64, dtype=torch.float16), splits=2) < 1e-3


@pytest.mark.parametrize(("new", "splits"), [([1, 30], None), ([1, 1], 2)])
def test_fp8_cache(new: list[int], splits: int | None) -> None:
    """What is stored is read exactly; the arithmetic is that of the queries."""
    q, keys, values, starts, lengths, tables = case(new, [40, 99], 4, 2, 32)
    stored = [torch.nan_to_num(cache).to(torch.float8_e4m3fn) for cache in (keys, values)]
    found = paged_attention(q, *stored, starts, lengths, tables, splits=splits)
    exact = [cache.double() for cache in stored]
    expected = reference.paged_attention(q.double(), *exact, starts.tolist(), lengths.tolist(), tables)
    assert reference.relative_error(found, expected) < 1e-6


def test_random_batches() -> None:
    for _ in range(4):
        count = int(torch.randint(1, 5, ()))
        new, before = torch.randint(1, 30, (count,)).tolist(), torch.randint(0, 60, (count,)).tolist()
        kv_heads, group = int(torch.randint(1, 3, ())), int(torch.randint(1, 6, ()))
        window = None if torch.rand(()) < 0.5 else int(torch.randint(1, 70, ()))
        assert error(case(new, before, kv_heads * group, kv_heads, 32), window) < 1e-6, (new, before, group, window)


def test_splits_fill_the_device_and_keep_256_keys_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert choose_splits(8, 8192, device) == 32  # batch 1, 8 key heads: as many as keep 256 keys
    assert choose_splits(64, 8192, device) == 8
    assert choose_splits(2048, 8192, device) == 1
    assert choose_splits(8, 100, device) == 1


def sees_one_too_far(rows, keys, length, window, CAUSAL, WINDOWED):
    return (keys < length) & (keys <= rows + 1)


def test_a_broken_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "visible", sees_one_too_far)
    assert error(case([40], [10], 2, 1, 32)) > 1e-3
    assert error(case([1, 1], [60, 99], 2, 1, 32), window=20, splits=3) > 1e-3  # it forgets the window


def test_a_wrong_table_is_noticed() -> None:
    q, keys, values, starts, lengths, tables = case([1, 1], [60, 60], 2, 1, 32)
    found = paged_attention(q, keys, values, starts, lengths, tables.flip(0), splits=2)
    assert reference.relative_error(found, paged_attention(q, keys, values, starts, lengths, tables, splits=2)) > 1e-2
