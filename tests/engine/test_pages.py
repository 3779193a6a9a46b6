"""Weights and cache in one piece of memory: the same numbers at other addresses, and no more memory than is used."""

import mmap
from pathlib import Path

import pytest
import torch
from tiny import make_config

from soma.engine import pages
from soma.engine.paged import PagedCache
from soma.model.quantized import QuantizedLinear, quantize
from soma.model.transformer import Transformer


def test_shapes_do_not_overlap() -> None:
    kinds = [((3, 5), torch.int8), ((7,), torch.float32), ((2, 2, 2), torch.bfloat16), ((0, 4), torch.float16)]
    tensors = pages.zeros(kinds)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, kinds, strict=True), start=1):
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % pages.ALIGNMENT == 0 or tensor.numel() == 0
        assert not tensor.any()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):
        assert bool((tensor == number).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_gathered_weights_give_the_same_logits(bits: int) -> None:
    model = quantize(Transformer(make_config(203), dtype=torch.float32), bits)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens)[0]
        pages.gather(model)
        assert torch.equal(model(tokens)[0], before)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    places = [tensor.data_ptr() for layer in layers for tensor in (layer.packed, layer.scales)]
    assert places == sorted(places)
    sizes = [tensor.nbytes for layer in layers for tensor in (layer.packed, layer.scales)]
    assert places[-1] + sizes[-1] - places[0] < sum(sizes) + pages.ALIGNMENT * len(sizes)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux's large pages")
def test_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # which it refuses
    memory = pages.allocate(4 * pages.LARGE)
    assert memory.numel() == 4 * pages.LARGE
    assert not memory.any()
    memory[-1] = 1


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's figures of memory")
def test_an_empty_cache_is_not_real_memory() -> None:
    before = resident()
    cache = PagedCache(make_config(203), num_blocks=100_000, block_size=16)
    assert sum(tensor.nbytes for tensor in [*cache.keys, *cache.values]) > 256 << 20
    assert resident() - before < 64 << 20
    cache.keys[0][5] = 1.0
    assert resident() - before < 64 << 20
