"""The paged cache and the reference attention: a flat mixed batch gives each sequence what it gets alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import FAMILIES, V, make

from soma.engine.batch import Batch, make_batch
from soma.engine.paged import PagedCache, PagedStep
from soma.model.transformer import Transformer

BLOCK = 4


def texts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(V) for _ in range(draw.randrange(20, 60))] for _ in range(count)]


def tables_for(ids: list[list[int]], blocks: list[int]) -> list[np.ndarray]:
    return [np.array([blocks.pop() for _ in range(-(-len(row) // BLOCK))], dtype=np.int32) for row in ids]


def step(model: Transformer, cache: PagedCache, batch: Batch) -> torch.Tensor:
    view = PagedStep(cache, batch)
    x_TD = model.features(batch.tokens_T[None], batch.positions_T[None], cache=view)[0][0]
    return model.logits(x_TD[batch.logit_rows_R])


def run(model: Transformer, ids: list[list[int]], seed: int, spoil: str = "") -> list[torch.Tensor]:
    """Logits of every place of every text, computed in random chunks in random company."""
    draw = random.Random(seed)
    blocks = list(range(100))
    draw.shuffle(blocks)
    cache = PagedCache(model.config, 100, BLOCK)
    for tensor in [*cache.keys, *cache.values]:
        tensor.normal_()  # what others left there
    tables = tables_for(ids, blocks)
    done, got = [0] * len(ids), [[] for _ in ids]
    while any(place < len(row) for place, row in zip(done, ids, strict=True)):
        chosen = [s for s, row in enumerate(ids) if done[s] < len(row) and draw.random() < 0.7]
        if not chosen:
            continue
        counts = [min(draw.choice([1, 1, 2, 5, 13]), len(ids[s]) - done[s]) for s in chosen]
        batch = make_batch(
            [ids[s][done[s] : done[s] + count] for s, count in zip(chosen, counts, strict=True)],
            [done[s] for s in chosen], counts, [tables[s] for s in chosen], np.arange(sum(counts)), BLOCK,
        )  # fmt: skip
        if spoil == "positions":
            batch = replace(batch, positions_T=batch.positions_T // 2)
        elif spoil == "tables":
            batch = replace(batch, tables_SB=batch.tables_SB.flip(0))
        with torch.inference_mode():
            rows = step(model, cache, batch).split(counts)
        for s, count, row in zip(chosen, counts, rows, strict=True):
            got[s].append(row)
            done[s] += count
    return [torch.cat(rows) for rows in got]


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_give_each_its_own(family: str) -> None:
    model = make(family)
    ids = texts(5, seed=len(family))
    for seed in (1, 2):
        for row, got_TV in zip(ids, run(model, ids, seed), strict=True):
            with torch.inference_mode():
                right_TV = model(torch.tensor([row]))[0]
            torch.testing.assert_close(got_TV, right_TV, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("spoil", ["positions", "tables"])
def test_a_wrong_batch_would_be_seen(spoil: str) -> None:
    model = make("llama")
    ids = texts(5)
    with torch.inference_mode():
        right = [model(torch.tensor([row]))[0] for row in ids]
    worst = max((a - b).abs().max() for a, b in zip(run(model, ids, 1, spoil), right, strict=True))
    assert worst > 0.1


def test_a_batch_by_hand() -> None:
    """Two tokens after 3, one after 0, one after 8, blocks of 4."""
    tables = [np.array([7, 2], np.int32), np.array([5], np.int32), np.array([1, 0, 9], np.int32)]
    batch = make_batch([[11, 12], [13], [14]], [3, 0, 8], [2, 1, 1], tables, np.array([1, 2, 3]), 4)
    assert batch.tokens_T.tolist() == [11, 12, 13, 14]
    assert batch.positions_T.tolist() == [3, 4, 0, 8]
    assert batch.query_starts_S1.tolist() == [0, 2, 3, 4]
    assert batch.lengths_S.tolist() == [5, 1, 9]
    assert batch.tables_SB.tolist() == [[7, 2, 0], [5, 0, 0], [1, 0, 9]]
    assert batch.slots_T.tolist() == [7 * 4 + 3, 2 * 4, 5 * 4, 9 * 4]
    assert (batch.longest_query, batch.longest, batch.num_tokens, batch.num_sequences) == (2, 9, 4, 3)
