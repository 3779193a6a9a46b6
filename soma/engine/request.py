"""One request inside the engine: what it wants, how far it is, and the events that it sends out."""

import math
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from soma.engine.adjust import SamplingState, bad_sequences
from soma.engine.guided import Guide
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.scheduler import Sequence
from soma.engine.text import StopScanner

if TYPE_CHECKING:
    from soma.engine.adapters import Loaded

LATE = "the request was not done in time"  # the error of one whose deadline has passed
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class TokenEvent:
    """What a request sends for every token, and once more if it ends without one (abort, error).

    `text` is what became safe to show: whole characters, and nothing that may be the start of a stop string. It may be
    empty and may hold text of earlier tokens. `finish_reason` is set on the last event and on no other.
    """

    id: int | None
    text: str = ""
    logprob: float = math.nan
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    is_end: bool = False  # the token is an end-of-text or stop id: it has no text of its own
    is_lost: bool = False  # the engine itself went away; it comes back, and the request can be sent again
    cached_tokens: int = 0  # with the first token: how many of the prompt's came from the prefix cache


@dataclass
class Completion:
    """A whole answer. `ids` holds the end-of-text token if that ended it; `text` does not."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: str | None = None


class StreamDecoder(Protocol):
    """Ids in, whole characters out."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """The part of `soma.model.tokenizer.Tokenizer` that the engine needs."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def stream_decoder(self) -> StreamDecoder: ...

    def encode(self, text: str) -> list[int]: ...


class Request(Sequence):
    """A handle for the one who asked: iterate over it for events, `cancel()` it, or `result()` for the whole.

    Events go to `deliver` on the engine's thread where given (an asyncio front passes `call_soon_threadsafe`),
    otherwise into a thread-safe queue that iteration reads. To the scheduler it is a `Sequence`.
    `arrived`, `scheduled`, `first_token`, `ended`: when it came, got a place, made a token, was over (monotonic s).
    `replica`: which of several engines has it.
    """

    replica = 0

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, tokenizer: Tokenizer, max_tokens: int,
        deliver: Callable[[TokenEvent], None] | None = None, *, priority: int = 0, key: str = "",
        deadline: float | None = None, adapter: "Loaded | None" = None, guide: Guide | None = None,
    ) -> None:  # fmt: skip
        wants_prompt = params.prompt_logprobs is not None
        super().__init__(
            prompt_ids, priority=priority, key=key, deadline=deadline, needs_prompt_logits=wants_prompt,
            salt=adapter.salt if adapter else b"",
        )  # fmt: skip
        self.adapter = adapter
        self.prompt_ids, self.params, self.max_tokens = prompt_ids, params, max_tokens
        self.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {*tokenizer.eos_ids})
        self.sampling = SamplingState(params, prompt_ids, bad_sequences(params, tokenizer.encode), guide)
        self.proposed: Tensor | None = None  # (K, V), what `draft` was drawn from: see `soma.engine.speculate`
        self.decoder = tokenizer.stream_decoder()
        self.scanner = StopScanner(params.stop)
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.deliver = deliver or self.events.put
        self.cancelled = False
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if wants_prompt else None
        self.arrived = time.monotonic()
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None

    @property
    def generated(self) -> int:
        """Tokens made so far."""
        return len(self.tokens) - self.prompt_length

    def cancel(self) -> None:
        """Stop as soon as the step in flight is over; the last event says `abort`. Harmless after the end."""
        self.cancelled = True

    def __iter__(self) -> Iterator[TokenEvent]:
        """Events up to the last, waiting for each."""
        while True:
            event = self.events.get()
            yield event
            if event.finish_reason is not None:
                return

    def result(self) -> Completion:
        """Wait for the end and join the events."""
        whole = Completion()
        for event in self:
            if event.id is not None:
                whole.ids.append(event.id)
                whole.logprobs.append(TokenLogprob(event.id, event.logprob, event.top_logprobs))
            whole.text += event.text
            whole.finish_reason, whole.error = event.finish_reason or "", event.error
        whole.prompt_logprobs = self.prompt_logprobs
        if self.params.logprobs is None:
            whole.logprobs = []
        return whole

    # On the engine's thread:

    def accept(self, chosen: TokenLogprob) -> TokenEvent:
        """Take the next token; its event, with a finish reason if it is the last."""
        self.tokens.append(chosen.id)
        self.sampling.take(chosen.id)
        cached = 0 if self.first_token else self.cached
        self.first_token = self.first_token or time.monotonic()
        is_end = chosen.id in self.end_ids
        text, reason = "", None
        if is_end:
            reason = "stop"
        else:
            text = self.scanner.push(self.decoder.push(chosen.id))
            if self.scanner.stopped or self.sampling.finished:
                reason = "stop"
            elif self.generated >= self.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.rest()
            reason = "stop" if self.scanner.stopped else reason
        if reason is not None:
            self.finish_reason, self.ended = reason, time.monotonic()
        return TokenEvent(chosen.id, text, chosen.logprob, chosen.top, reason, is_end=is_end, cached_tokens=cached)

    def rest(self) -> str:
        """The text held back until now, up to a stop string that its last bytes may complete."""
        return self.scanner.push(self.decoder.flush()) + self.scanner.flush()

    def end(self, reason: str, error: str | None = None) -> TokenEvent:
        """Finish without a token: the last event."""
        self.finish_reason, self.ended = reason, time.monotonic()
        text = self.rest() if reason == "abort" else ""
        return TokenEvent(None, text, finish_reason=reason, error=error)
