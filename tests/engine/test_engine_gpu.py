"""The engine on a GPU: the reference's greedy tokens through Triton and CUDA graphs. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
Make = Callable[..., Engine]


@pytest.fixture
def make_gpu_engine(tiny_folder: Path, tokenizer: Tokenizer) -> Make:
    def make(**options: object) -> Engine:
        model = load_model(tiny_folder, torch.float32, torch.device("cuda"))
        return Engine(model, tokenizer, **{"cache_tokens": 8192, "max_running": 12, **options})

    return make


def prompts() -> list[list[int]]:
    return [[5 + (place * step) % 300 for place in range(3 + 7 * step)] for step in range(1, 11)]


def test_the_same_greedy_tokens(make_gpu_engine: Make) -> None:
    """Alone over the reference; then batched, without graphs, without overlap, in chunks, after preemption."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    plain = make_gpu_engine(backend="reference", prefix_cache=False, overlap=False)
    expected = [plain.generate(prompt, params).ids for prompt in prompts()]
    plain.close()
    for options in (
        {}, {"cuda_graphs": False}, {"overlap": False}, {"prefill_chunk": 7}, {"cache_tokens": 240},
    ):  # fmt: skip
        engine = make_gpu_engine(**options)
        assert engine.runner.name == "triton"
        assert [request.result().ids for request in engine.submit_all(prompts(), params)] == expected, options
        assert [engine.generate(prompt, params).ids for prompt in prompts()[:3]] == expected[:3], options
        assert engine.pool.used == 0
        engine.close()


def test_the_cache_fills_its_share(make_gpu_engine: Make) -> None:
    engine = make_gpu_engine(cache_tokens=None, max_length=4096, max_running=2)
    assert engine.pool.num_blocks * 16 >= 2 * 4096  # a tiny model: all that two requests can use
    engine.close()
    share = make_gpu_engine(cache_tokens=None, max_running=10_000, gpu_memory_utilization=0.1, cuda_graphs=False)
    free, total = torch.cuda.mem_get_info()
    assert 0.08 * total < total - free < 0.12 * total
    share.close()


def test_fp8_cache(make_gpu_engine: Make) -> None:
    engine = make_gpu_engine(cache_dtype="fp8")
    assert engine.runner.name == "triton"
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    batched = [request.result().ids for request in engine.submit_all(prompts(), params)]
    assert [len(ids) for ids in batched] == [12] * 10
    engine.close()
