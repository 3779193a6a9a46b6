"""Several engine requests that answer one HTTP request together: their events in one stream, watched by the metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from soma.engine.engine import Engine
from soma.engine.handover import threadsafe
from soma.engine.params import MASK64, SamplingParams
from soma.engine.process import EngineProcess
from soma.engine.replicas import Replicas
from soma.engine.request import LATE, Request, TokenEvent
from soma.serve.calls import Meter, Usage
from soma.serve.errors import ApiError
from soma.serve.metrics import Metrics

if TYPE_CHECKING:
    from soma.serve.requestlog.record import Record


class Generation:
    """`n` answers to each of several prompts; choice `i` is answer `i % n` to prompt `i // n`.

    With a seed answer k draws from seed + k, so that the n answers differ and all can be had again.
    meter: told of every token when it comes, on the engine's thread. record: of the request log, told of every text
    that was read.
    options: further ones of `Engine.submit_all`. Raises what that raises, before anything runs.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, prompts: Sequence[list[int]], params: SamplingParams, n: int,
        meter: Meter | None = None, record: "Record | None" = None, **options: Any,
    ) -> None:  # fmt: skip
        loop = asyncio.get_running_loop()
        self.metrics, self.record = metrics, record
        self.started = time.monotonic()
        self.events: asyncio.Queue[tuple[int, float, TokenEvent]] = asyncio.Queue()

        total = len(prompts) * n
        self.made = [0] * total  # tokens of each choice that have come, whether or not they were read from `events`
        self.cached_tokens = 0  # of the prompts, that no choice had to compute
        cached: list[list[int]] = [[] for _ in prompts]  # by prompt, what its choices found in the cache

        def found(prompt: int, tokens: int) -> None:
            cached[prompt].append(tokens)
            if len(cached[prompt]) == n and (tokens := min(cached[prompt])):
                self.cached_tokens += tokens
                if meter is not None:
                    meter.cached(tokens)

        def put(index: int) -> Callable[[TokenEvent], None]:
            hand_over = threadsafe(loop, lambda event: self.events.put_nowait((index, time.monotonic(), event)))

            def arrived(event: TokenEvent) -> None:
                if event.id is not None:
                    if not self.made[index]:
                        found(index // n, event.cached_tokens)
                    self.made[index] += 1
                    if meter is not None:
                        meter.made(1)
                hand_over(event)

            return arrived

        if meter is not None:
            meter.sent()
        self.requests: list[Request] = engine.submit_all(
            [prompts[i // n] for i in range(total)], [nth(params, i % n) for i in range(total)],
            [put(i) for i in range(total)], **options,
        )  # fmt: skip
        self.open = set(range(total))
        self.failed = False  # an answer ended with an error
        self.last: dict[int, float] = {}
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.generated = 0
        for request in self.requests[::n]:
            metrics[request.replica].prompt_tokens.inc(len(request.prompt_ids))

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Events with the number of their choice, until all choices ended."""
        while self.open:
            index, when, event = await self.events.get()
            self._observe(index, when, event)
            if self.record is not None:
                self.record.said(index, event.text, event.finish_reason)
            yield index, event

    def _observe(self, index: int, when: float, event: TokenEvent) -> None:
        metrics = self.metrics[self.requests[index].replica]
        if event.id is not None:
            self.generated += 1
            metrics.generation_tokens.inc()
            if index in self.last:
                metrics.inter_token_latency.observe(when - self.last[index])
            else:
                metrics.time_to_first_token.observe(when - self.started)
            self.last[index] = when
        if event.finish_reason is not None:
            self.open.discard(index)
            self.failed |= event.finish_reason == "error"
            metrics.finished[event.finish_reason].inc()
            metrics.end_to_end_latency.observe(when - self.started)

    def cancel(self) -> None:
        """Stop what still runs. Counted here, since nobody reads its last events."""
        for index in self.open:
            self.requests[index].cancel()
            self.metrics[self.requests[index].replica].finished["abort"].inc()
        self.open.clear()

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }  # fmt: skip

    def used(self, outcome: str) -> Usage:
        """What the gates are told at the end."""
        return Usage(self.prompt_tokens, sum(self.made), self.cached_tokens, outcome)


def nth(params: SamplingParams, k: int) -> SamplingParams:
    """The parameters of answer `k` to one prompt."""
    return params if params.seed is None or k == 0 else replace(params, seed=(params.seed + k) & MASK64)


def check(engine: Any, event: TokenEvent) -> None:
    """Raises ApiError if the engine failed on the request: 503 if all of it is gone, 504 if it was late, else 500."""
    if event.finish_reason == "error":
        if event.is_lost and isinstance(engine, EngineProcess | Replicas):
            raise ApiError(503, event.error or "the engine is being restarted", code="engine_restarting",
                           retry_after=engine.retry_after)  # fmt: skip
        if event.error == LATE:
            raise ApiError(504, LATE, "timeout", "deadline_exceeded")
        raise ApiError(500, event.error or "the engine failed on this request", code="engine_error")
