"""Backends against the `Transformer`: Triton in its interpreter, padded decode batches, the choice among them."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import FAMILIES, V, make

from soma.base.errors import UserError
from soma.engine.backends.choose import Backend, make_backend, why_not
from soma.engine.backends.graphs import DecodeInputs, bucket_sizes
from soma.engine.backends.reference import ReferenceModel
from soma.engine.batch import Batch, make_batch
from soma.engine.engine import Engine
from soma.engine.paged import FP8, PagedCache
from soma.engine.params import SamplingParams
from soma.model.transformer import Transformer

BLOCK = 4
BLOCKS = 60
OTHERS = ["gpt2", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
INTERPRETED = sorted(set(FAMILIES) - set(OTHERS))


def triton_model(model: Transformer, cache: PagedCache) -> Backend:
    pytest.importorskip("triton")
    from soma.engine.backends.triton import TritonModel

    return TritonModel(model, cache)


class Texts:
    """Texts at random places of a cache that is full of what others left there; `run` goes on by `counts` tokens."""

    def __init__(
        self, model: Transformer, lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        draw = random.Random(seed)
        self.ids = [[draw.randrange(V) for _ in range(length)] for length in lengths]
        blocks = list(range(BLOCKS))
        draw.shuffle(blocks)
        self.tables = [np.array([blocks.pop() for _ in range(-(-n // BLOCK))], dtype=np.int32) for n in lengths]
        self.cache = PagedCache(model.config, BLOCKS, BLOCK, dtype)
        for tensor in [*self.cache.keys, *self.cache.values]:
            tensor.copy_(torch.randn(tensor.shape))
        self.done = [0] * len(lengths)

    def batch(self, counts: list[int]) -> Batch:
        chosen = [s for s, count in enumerate(counts) if count]
        tokens = [self.ids[s][self.done[s] : self.done[s] + counts[s]] for s in chosen]
        new = [counts[s] for s in chosen]
        batch = make_batch(
            tokens, [self.done[s] for s in chosen], new, [self.tables[s] for s in chosen], np.cumsum(new) - 1, BLOCK
        )
        for s in chosen:
            self.done[s] += counts[s]
        return batch


STEPS = [[9, 13, 0, 1], [1, 1, 6, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]]


def logits(
    model: Transformer, make_model, spoil=lambda batch: batch, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    texts = Texts(model, [11, 17, 8, 3], dtype=dtype)
    backend = make_model(model.fuse(), texts.cache)
    with torch.inference_mode():
        return [backend.step(spoil(texts.batch(counts))) for counts in STEPS]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("llama-yarn", "mixed-windows") else pytest.mark.slow)
        for name in INTERPRETED
    ],
)
def test_triton_gives_the_references_logits(family: str) -> None:
    """Chunks mixed with single tokens, and decode steps: float32 within 2e-4."""
    model = make(family)
    for found, expected in zip(logits(model, triton_model), logits(model, ReferenceModel), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_wrong_slots_would_be_seen() -> None:
    model = make("llama")

    def spoil(batch: Batch) -> Batch:
        return replace(batch, slots_T=batch.slots_T.flip(0))

    found, expected = logits(model, triton_model, spoil), logits(model, ReferenceModel)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 0.1


@pytest.mark.parametrize("make_model", [ReferenceModel, triton_model])
def test_padded_rows_change_nothing(make_model) -> None:
    """Three sequences in a bucket of eight where five were before; only the scratch block differs afterwards."""
    model = make("llama").fuse()
    texts = Texts(model, [12, 9, 14, 11, 10])
    backend = make_model(model, texts.cache)
    inputs = DecodeInputs(8, 6, texts.cache.scratch, BLOCK, torch.device("cpu"))
    with torch.inference_mode():
        backend.step(texts.batch([5, 7, 9, 4, 4]))
        inputs.put(texts.batch([1, 1, 1, 1, 1]), 8)
        backend.step(inputs.rows(8))
        batch = texts.batch([1, 0, 1, 0, 1])
        before = [tensor.clone() for tensor in texts.cache.keys]
        expected = ReferenceModel(model, texts.cache).step(batch)
        after = [tensor.clone() for tensor in texts.cache.keys]
        for tensor, old in zip(texts.cache.keys, before, strict=True):
            tensor.copy_(old)
        inputs.put(batch, 8)
        found = backend.step(inputs.rows(8))
    assert found.shape == (8, V)
    torch.testing.assert_close(found[:3], expected, atol=2e-4, rtol=1e-4)
    for tensor, right in zip(texts.cache.keys, after, strict=True):
        torch.testing.assert_close(tensor[:-1], right[:-1], atol=1e-5, rtol=1e-4)


def test_buckets() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(4) == [1, 2, 4]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


def test_the_choice_and_its_reason() -> None:
    model = make("llama")
    cache = PagedCache(model.config, 4, BLOCK)
    assert isinstance(make_backend("reference", model, cache)[0], ReferenceModel)
    experts = make("mixtral")
    backend, name, reason = make_backend("auto", experts, PagedCache(experts.config, 4, BLOCK))
    assert (type(backend), name, reason) == (ReferenceModel, "reference", "latent attention or experts")
    with pytest.raises(UserError, match=r"'native' cannot run this model: latent attention or experts"):
        make_backend("native", experts, cache)
    with pytest.raises(UserError, match="expected one of auto, native, triton, reference"):
        make_backend("cuda", model, cache)


@pytest.mark.parametrize("family", OTHERS)
def test_what_triton_leaves_to_the_reference(family: str) -> None:
    pytest.importorskip("triton")
    assert why_not("triton", make(family)) in ("latent attention or experts", "layers differ from a Llama's")


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def test_fp8_cache() -> None:
    """Near the full cache. (Triton's kernels over such a cache: tests/model, and engine_gpu.py --check.)"""
    model = make("llama")
    exact, stored = logits(model, ReferenceModel), logits(model, ReferenceModel, dtype=FP8)
    assert 1e-3 < relative_error(stored, exact) < 0.1


@pytest.mark.parametrize("make_model", [ReferenceModel, triton_model])
def test_fp8_saturates(make_model) -> None:
    model = make("llama").fuse()
    with torch.no_grad():
        model.layers[0].self_attn.v_proj.weight.mul_(1e5)
    texts = Texts(model, [5], dtype=FP8)
    with torch.inference_mode():
        make_model(model, texts.cache).step(texts.batch([4]))
    slots = texts.tables[0][0]
    assert texts.cache.values[0][slots].float().abs().max() == 448


def test_fp8_in_the_engine(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_dtype="fp8")
    assert (engine.runner.name, engine.runner.reason) == ("reference", "the cache is torch.float8_e4m3fn")
    assert engine.cache.keys[0].dtype == FP8
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ids = engine.generate([5, 6, 7, 8], params).ids
    assert len(ids) == 12
    assert engine.generate([5, 6, 7, 8], params).ids == ids
    with pytest.raises(UserError, match="cache_dtype 'fp4': expected one of auto, fp8, int8"):
        make_engine(cache_dtype="fp4")
    with pytest.raises(UserError, match="backend 'native' cannot run this model: the cache is"):
        make_engine(cache_dtype="fp8", backend="native")
