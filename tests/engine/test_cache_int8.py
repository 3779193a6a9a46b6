"""The cache in 8 bits: the plain reference against the exact model, C against the reference, and what the engine says.

A key or value is off by at most half a step of its row's scale, 0.4 % of the row's largest number. On logits of random
models that makes a mean error below 3 % of their spread (measured: see docs/lab.md); C and the reference round the same
numbers, so they differ only where a key lies on the edge between two steps.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tiny import make_config

from soma.base.errors import UserError
from soma.engine.backends.choose import make_backend, why_not
from soma.engine.backends.reference import ReferenceModel
from soma.engine.batch import make_batch
from soma.engine.engine import Engine
from soma.engine.native import NativeModel
from soma.engine.paged import PagedCache, cache_dtype_of, round_rows
from soma.engine.params import SamplingParams
from soma.model.transformer import Transformer

V, BLOCKS, BLOCK = 203, 64, 8
SHAPES = {"llama": {}, "odd sizes": {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3},
          "window": {"family": "mistral", "sliding_window": 9}}  # fmt: skip


def make(shape: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(make_config(V, **SHAPES[shape]), dtype=dtype)  # type: ignore[arg-type]
    model.init_weights(len(shape))
    return model


def make_cache(model: Transformer, kind: str) -> PagedCache:
    cache = PagedCache(model.config, BLOCKS, BLOCK, cache_dtype_of(kind, model.dtype))
    for tensor in [*cache.key_scales, *cache.value_scales]:
        tensor.normal_()  # what others left there
    return cache


def texts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (count,), generator=generator).tolist() for count in (97, 1, 40)]


def run(backend: ReferenceModel | NativeModel, ids: Sequence[list[int]]) -> torch.Tensor:
    """Logits of all places: half of each text in one step, the rest token by token, all texts together."""
    rng = np.random.default_rng(1)
    order, tables = rng.permutation(BLOCKS).astype(np.int32), []
    for text in ids:
        tables.append(order[: -(-len(text) // BLOCK)])
        order = order[len(tables[-1]) :]
    done, got = [0] * len(ids), [[] for _ in ids]  # type: tuple[list[int], list[list[torch.Tensor]]]
    while open_ := [s for s, text in enumerate(ids) if done[s] < len(text)]:
        counts = [max(1, len(ids[s]) // 2) if done[s] == 0 else 1 for s in open_]
        news = [ids[s][done[s] : done[s] + count] for s, count in zip(open_, counts, strict=True)]
        used = [tables[s][: -(-(done[s] + count) // BLOCK)] for s, count in zip(open_, counts, strict=True)]
        batch = make_batch(news, [done[s] for s in open_], counts, used, np.arange(sum(counts)), BLOCK)
        with torch.inference_mode():
            rows = backend.step(batch).float().split(counts)
        for s, row, count in zip(open_, rows, counts, strict=True):
            got[s].append(row.clone())
            done[s] += count
    return torch.cat([torch.cat(rows) for rows in got])


def native(model: Transformer, cache: PagedCache) -> NativeModel:
    if (reason := NativeModel.supports(model)) is not None:
        pytest.skip(reason)
    for tensor in [*cache.key_scales, *cache.value_scales]:
        tensor.fill_(float("nan"))  # a read of a row that was not written is seen
    backend, name, _ = make_backend("native", model, cache)
    assert name == "native"
    assert isinstance(backend, NativeModel)
    return backend


def test_rows_by_hand() -> None:
    values, scale = round_rows(torch.tensor([[[-12.7, 0.04, 3.0]], [[0.0, 0.0, 0.0]]]))
    assert values.tolist() == [[[-127, 0, 30]], [[0, 0, 0]]]
    torch.testing.assert_close(scale, torch.tensor([[0.1], [0.0]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_near_the_exact_model(shape: str) -> None:
    model, ids = make(shape), texts(3)
    with torch.inference_mode():
        right = torch.cat([model(torch.tensor([text]))[0] for text in ids])
    got = run(ReferenceModel(model.fuse(), make_cache(model, "int8")), ids)
    error = (got - right).abs().mean() / right.std()
    assert 1e-4 < error < 0.03  # the rounding is seen, too


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.003), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", SHAPES)
def test_c_is_as_the_reference(shape: str, dtype: torch.dtype, bound: float) -> None:
    model, ids = make(shape, dtype).fuse(), texts(4)
    right = run(ReferenceModel(model, make_cache(model, "int8")), ids)
    error = (run(native(model, make_cache(model, "int8")), ids) - right).abs().mean() / right.std()
    assert error < bound


def test_wrong_scales_would_be_seen() -> None:
    model, ids = make("llama").fuse(), texts(4)
    cache = make_cache(model, "int8")
    right = run(ReferenceModel(model, make_cache(model, "int8")), ids)
    backend = native(model, cache)
    backend.model.layer[1].value_scales = backend.model.layer[0].key_scales
    assert (run(backend, ids) - right).abs().mean() / right.std() > 0.05


def test_bytes_of_a_block() -> None:
    """2 layers, 2 key/value heads of 16: 128 numbers a token in 8 bits and 8 scales of 4 bytes, against 256 bytes."""
    config = make_config(V)
    assert PagedCache.block_bytes(config, 8, torch.int8) == 8 * (128 + 32)
    assert PagedCache.block_bytes(config, 8, torch.bfloat16) == 8 * 256
    cache = PagedCache(config, 4, 8, torch.int8)
    tensors = [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]
    assert sum(tensor.nbytes for tensor in tensors) == 5 * PagedCache.block_bytes(config, 8, torch.int8)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cache_dtype 'int4': expected one of auto, fp8, int8"):
        cache_dtype_of("int4", torch.float32)
    latent = make_config(V, family="deepseek_v3", kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    with pytest.raises(UserError, match="latent attention"):
        PagedCache(latent, 4, 8, torch.int8)
    assert why_not("triton", make("llama"), torch.int8)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_greedy_text_of_the_engine(make_engine: Callable[..., Engine], backend: str) -> None:
    """Alone, in company, behind a cached prefix: at the first difference from an exact cache each side's token is in
    the other's top 5, within 0.5 of its log-probability."""
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)
    prompts = [[(7 * i + k) % 300 for i in range(20 + k)] for k in range(4)]
    exact, small = make_engine(), make_engine(cache_dtype="int8", backend=backend)
    assert small.cache.keys[0].dtype == torch.int8
    right = [exact.generate(prompt, params) for prompt in prompts]
    for _ in range(2):  # the second time the prompts are in the cache
        for request, other in zip(small.submit_all(prompts, params), right, strict=True):
            got = request.result()
            assert got.finish_reason == "length"
            for mine, theirs in zip(got.logprobs, other.logprobs, strict=True):
                if mine.id != theirs.id:
                    assert dict(theirs.top)[mine.id] > theirs.logprob - 0.5
                    assert dict(mine.top)[theirs.id] > mine.logprob - 0.5
                    break
