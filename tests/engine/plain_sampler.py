"""One request's sampler, token by token, by a full sort in float64: what the vectorised one is held to."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from soma.engine.params import SamplingParams

MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """splitmix64 of both, in Python's whole numbers."""
    return (mix((mix(seed & MASK64) + (position + 1) * 0x9E3779B97F4A7C15) & MASK64) >> 11) * 2.0**-53


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


class PlainSampler:
    """`bad` holds sequences of ids. Call it with the logits (V) of each step; `take` what was made."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), bad: Sequence[Sequence[int]] = ()) -> None:
        self.params, self.prompt, self.bad = params, list(prompt), [list(word) for word in bad]
        self.made: list[int] = []

    def __call__(self, logits_V: torch.Tensor) -> int:
        token = self.choose(logits_V)
        self.made.append(token)
        return token

    def adjusted(self, logits_V: torch.Tensor) -> np.ndarray:
        """Bias, bad words, penalties; float64."""
        x, params = logits_V.double().numpy().copy(), self.params
        for token, bias in params.logit_bias.items():
            x[token] += bias
        for word in self.bad:
            if self.made[len(self.made) - len(word) + 1 :] == word[:-1] or len(word) == 1:
                x[word[-1]] = -math.inf
        for token in {*self.prompt, *self.made}:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
            x[token] -= params.frequency_penalty * self.made.count(token)
            x[token] -= params.presence_penalty * (token in self.made)
        return x

    def filtered(self, logits_V: torch.Tensor, moved: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities that temperature, top-k, top-p and min-p leave, and the order in which a quantile counts.

        moved: by how much the borders of top-p and min-p are, to let in or out a token that lies on one in float32.
        """
        x, params = self.adjusted(logits_V), self.params
        order = np.argsort(-x, kind="stable")
        if params.temperature == 0:
            return (np.arange(len(x)) == order[0]).astype(float), order
        p = np.exp((x - x.max()) / max(params.temperature, 1e-4))
        if params.top_k > 0:
            p[order[params.top_k :]] = 0
        p /= p.sum()
        if params.top_p < 1:
            before = np.cumsum(p[order]) - p[order]
            p[order[before >= params.top_p + moved]] = 0
        p[p < (params.min_p - moved) * p.max()] = 0
        by_rank = params.top_k > 0 or params.top_p < 1
        return p / p.sum(), order if by_rank else np.arange(len(x))

    def choose(self, logits_V: torch.Tensor) -> int:
        p, order = self.filtered(logits_V)
        assert self.params.seed is not None or self.params.temperature == 0
        cumulative = np.cumsum(p[order])
        u = uniform(self.params.seed or 0, len(self.made))
        return int(order[np.searchsorted(cumulative, u * cumulative[-1], side="right")])
