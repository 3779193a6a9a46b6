"""What one request asks of the sampler, checked when it is made, and what it is told about its tokens. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from soma.engine.errors import RequestError
from soma.engine.guided import Guided

MAX_LOGPROBS = 20  # alternatives per token, OpenAI's limit
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 1000
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
    bad_words: tuple[str | tuple[int, ...], ...] = field(
        default=(), metadata={"doc": "texts or sequences of ids that are not made"}
    )
    guided: Guided | None = field(default=None, metadata={"doc": "what the answer must be: JSON, a pattern, a grammar"})

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

        _check_bad_words(self.bad_words)
        if self.guided is not None and not isinstance(self.guided, Guided):
            raise RequestError(f"guided must be a Guided, got {type(self.guided).__name__}", "guided")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that the model does not have."""
        for name in ("stop_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    raise RequestError(f"{name} has id {token}, but the vocabulary ends at {vocab_size - 1}", name)
        for word in self.bad_words:
            if not isinstance(word, str) and max(word) >= vocab_size:
                text = f"bad_words has id {max(word)}, but the vocabulary ends at {vocab_size - 1}"
                raise RequestError(text, "bad_words")

    @property
    def uses_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

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


def _check_bad_words(words: Sequence[Any]) -> None:
    if isinstance(words, str) or len(words) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words must be a list of at most {MAX_BAD_WORDS} texts or lists of ids", "bad_words")
    for word in words:
        if isinstance(word, str) and word.strip():
            continue
        if isinstance(word, str) or not isinstance(word, Sequence) or not word:
            raise RequestError(f"bad_words holds {word!r}; expected texts and lists of ids, none empty", "bad_words")
        for token in word:
            _integer("bad_words", token, 0, None)


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural log-probability under the model (before temperature, bias and penalties)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob) of the likeliest tokens, likeliest first
