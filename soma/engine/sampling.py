"""Sampling: the parameters of one request and the choice of its next token.

Shapes: V vocabulary. The order of the filters is bias, penalties, temperature, top-k, top-p, min-p; each later one
sees the distribution that the earlier ones left, renormalised.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from soma.engine.errors import RequestError

MAX_LOGPROBS = 20  # alternatives per token, OpenAI's limit
MAX_STOP_STRINGS = 16
SORT_FIRST = 512  # top-p looks at this many likeliest tokens before it sorts the whole vocabulary
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens and when to stop. Raises `RequestError` that names the field for an impossible value."""

    temperature: float = field(default=1.0, metadata={"doc": "0 is greedy; 1 is the model's own distribution"})
    top_p: float = field(default=1.0, metadata={"doc": "keep the likeliest tokens that reach this probability"})
    top_k: int = field(default=0, metadata={"doc": "keep this many of the likeliest tokens; 0 or -1 keeps all"})
    min_p: float = field(default=0.0, metadata={"doc": "drop tokens below this share of the likeliest one"})
    max_tokens: int | None = field(default=None, metadata={"doc": "at most so many tokens; None: to the context end"})
    stop: tuple[str, ...] = field(default=(), metadata={"doc": "strings that end the text; not part of it"})
    stop_token_ids: tuple[int, ...] = field(default=(), metadata={"doc": "ids that end the text like the model's own"})
    ignore_eos: bool = field(default=False, metadata={"doc": "go on after the model's end-of-text id"})
    seed: int | None = field(default=None, metadata={"doc": "the same seed gives the same tokens; None: a random one"})
    logprobs: int | None = field(default=None, metadata={"doc": "log-probabilities with so many alternatives"})
    prompt_logprobs: int | None = field(default=None, metadata={"doc": "the same for the prompt's tokens"})
    presence_penalty: float = field(default=0.0, metadata={"doc": "taken from logits of tokens made before"})
    frequency_penalty: float = field(default=0.0, metadata={"doc": "taken once for every time a token was made"})
    repetition_penalty: float = field(default=1.0, metadata={"doc": "divides positive logits of tokens seen before"})
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"doc": "added to the logits of ids"})

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.0, 100.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RequestError(f"{name} must be a finite number, got {value!r}", name)
            if not low <= value <= high:
                raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value!r}", name)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} must be above 0", name)
        _integer("top_k", self.top_k, -1, None)
        whole: tuple[tuple[str, int, int | None], ...] = (
            ("max_tokens", 1, None),
            ("seed", -(1 << 63), MASK64),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        )
        for name, least, most in whole:
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), least, most)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop must be a list of non-empty strings", "stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop holds {len(self.stop)} strings, at most {MAX_STOP_STRINGS} are allowed", "stop")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, None)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, None)
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of id {token} must be between -100 and 100, got {bias!r}", "logit_bias")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that the model does not have."""
        for name in ("stop_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise RequestError(f"{name} has id {token}, but the vocabulary ends at {vocab_size - 1}", name)

    @property
    def uses_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def plain(self) -> bool:
        """Whether the logits are used as the model gives them, up to the temperature."""
        return not (self.logit_bias or self.uses_penalties)

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """What each field means, by name."""
        return {item.name: item.metadata["doc"] for item in fields(cls)}


def _integer(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, got {value!r}", name)
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {allowed}, got {value}", name)


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural log-probability under the model (before temperature, bias and penalties)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob) of the likeliest tokens, likeliest first


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 of both.

    Sebastiano Vigna's splitmix64, the seed mixed once so that neighbouring seeds share nothing.
    `uniform(0, 0)` is 0.8833108082136426.
    """
    state = (_mix(seed & MASK64) + (position + 1) * 0x9E3779B97F4A7C15) & MASK64
    return (_mix(state) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


class Sampler:
    """The next tokens of one request. Keeps what penalties need; the random numbers need no state."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.position = 0
        if params.uses_penalties:
            self.count_V = torch.zeros(vocab_size, device=device)  # times that each token was made
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # made or in the prompt
            self.seen_V[torch.tensor(prompt_ids, dtype=torch.long, device=device)] = True
        if params.logit_bias:
            self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
            self.bias = torch.tensor([float(bias) for bias in params.logit_bias.values()], device=device)

    @property
    def wants_likeliest(self) -> bool:
        """Whether the next token is simply the likeliest one, and nothing else is asked."""
        return self.params.temperature == 0 and self.params.plain and self.params.logprobs is None

    def take(self, token: int) -> TokenLogprob:
        """Count a token that was chosen elsewhere, where `wants_likeliest`."""
        self.position += 1
        return TokenLogprob(token, math.nan)

    def __call__(self, logits_V: torch.Tensor) -> TokenLogprob:
        """Choose a token from the model's logits (V, any float type); counts as made from then on.

        The log-probability is NaN where the request asked for none. Raises FloatingPointError on NaN logits.
        """
        raw_V = logits_V.float()
        if math.isnan(float(raw_V.max())):  # max carries a NaN on
            raise FloatingPointError("the model gave NaN logits")
        adjusted_V = raw_V if self.params.plain else self._adjust(raw_V)
        if self.params.temperature == 0:
            token = int(adjusted_V.argmax())
        else:
            token = choose(adjusted_V, self.params, uniform(self.seed, self.position))
        self.position += 1
        if self.params.uses_penalties:
            self.count_V[token] += 1
            self.seen_V[token] = True
        if self.params.logprobs is None:
            return TokenLogprob(token, math.nan)
        return token_logprob(raw_V, token, self.params.logprobs)

    def _adjust(self, logits_V: torch.Tensor) -> torch.Tensor:
        logits_V = logits_V.clone()
        if self.params.logit_bias:
            logits_V.index_add_(0, self.bias_ids, self.bias)
        if self.params.uses_penalties:
            if self.params.repetition_penalty != 1.0:  # Keskar et al. 2019 (CTRL), section 4.1
                penalty = self.params.repetition_penalty
                smaller_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
                logits_V = torch.where(self.seen_V, smaller_V, logits_V)
            logits_V -= self.params.frequency_penalty * self.count_V
            logits_V -= self.params.presence_penalty * (self.count_V > 0)
        return logits_V


def choose(logits_V: torch.Tensor, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the filtered distribution, in the order of the likeliest first where filtered."""
    probabilities, ids = distribution(logits_V, params)
    cumulative = probabilities.double().cumsum(0)
    # right=True: the first entry above u, so a token of probability 0 is never chosen
    place = int(torch.searchsorted(cumulative, u * cumulative[-1:], right=True))
    place = min(place, len(cumulative) - 1)
    return place if ids is None else int(ids[place])


def distribution(logits_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What temperature, top-k, top-p and min-p leave of float32 logits: unnormalised probabilities and their ids.

    The ids are None where every token is kept (then place i is token i); otherwise likeliest first.
    """
    probabilities = torch.softmax((logits_V - logits_V.max()) / max(params.temperature, 1e-4), 0)
    ids: torch.Tensor | None = None
    if 0 < params.top_k < len(probabilities):
        probabilities, ids = probabilities.topk(params.top_k)
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1.0:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, params.top_p)
        cumulative = probabilities.double().cumsum(0)
        kept = int(torch.searchsorted(cumulative, params.top_p)) + 1
        probabilities, ids = probabilities[:kept], ids[:kept]
    if params.min_p > 0:
        keep = probabilities >= params.min_p * probabilities.max()
        ids = keep.nonzero()[:, 0] if ids is None else ids[keep]
        probabilities = probabilities[keep]
    return probabilities, ids


def _likeliest(probabilities_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Enough of the likeliest tokens to reach `top_p`, sorted: a few hundred mostly do, a full sort is 10× slower."""
    if len(probabilities_V) > SORT_FIRST:
        first, ids = probabilities_V.topk(SORT_FIRST)
        if float(first.double().sum()) >= top_p:
            return first, ids
    return probabilities_V.sort(descending=True, stable=True)


def token_logprob(logits_V: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token` and of the `alternatives` likeliest tokens under float32 logits."""
    normaliser = torch.logsumexp(logits_V, 0)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logits_V.topk(min(alternatives, len(logits_V)))
        top = tuple(zip(ids.tolist(), (values - normaliser).tolist(), strict=True))
    return TokenLogprob(token, float(logits_V[token] - normaliser), top)
