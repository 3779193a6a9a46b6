"""The sampler on a GPU against itself on the CPU. Skipped where there is no GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from soma.engine.adjust import Row, SamplingState
from soma.engine.params import SamplingParams
from soma.engine.sampling import distribution, sample, token_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

V = 50_000
KINDS: list[dict[str, Any]] = [
    {"temperature": 0}, {}, {"temperature": 0.3, "top_p": 0.9}, {"top_p": 0.99}, {"top_k": 40}, {"top_k": 900},
    {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"repetition_penalty": 1.3, "top_p": 0.8},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 5},
    {"logit_bias": {3: 9.0, 7: -50.0}, "logprobs": 0},
]  # fmt: skip


class EverySecond:
    """In place of a grammar: tokens of even ids."""

    finished = False

    def allowed(self, words: np.ndarray, ahead: tuple[int, ...] = ()) -> None:
        words.fill(0x55555555)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_gpu_draws_the_same_tokens(scale: float) -> None:
    count = len(KINDS) * 8
    draw = torch.Generator().manual_seed(0)
    x_RV = (torch.randn(count, V, generator=draw) * scale).bfloat16()  # with many equal logits
    x_RV[5, 3] = float("nan")
    rows = []
    for i in range(count):
        params = SamplingParams(seed=i, **KINDS[i % len(KINDS)])
        guide: Any = EverySecond() if i % 5 == 3 else None
        state = SamplingState(params, range(i, i + 300), [(i,), (4, 5)], guide)
        rows.append(Row(state, (4, i + 1, i + 1)[: i % 4]))
    here, there = sample(x_RV, rows), sample(x_RV.cuda(), rows)
    assert here[5] is None
    assert there[5] is None
    pairs = [(one, other) for one, other in zip(here, there, strict=True) if one and other]
    assert len(pairs) == count - 1
    assert sum(one.id != other.id for one, other in pairs) <= 1  # a quantile at the border of two tokens
    for one, other in pairs:
        np.testing.assert_allclose([value for _, value in one.top], [value for _, value in other.top], atol=1e-4)
    spread, again = distribution(x_RV, rows), distribution(x_RV.cuda(), rows).cpu()
    assert (spread - again).nan_to_num().abs().amax(-1).sort().values[:-1].max() < 2e-6
    ids = list(range(20))
    for one, other in zip(token_logprobs(x_RV[:20], ids, 3), token_logprobs(x_RV[:20].cuda(), ids, 3), strict=True):
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
