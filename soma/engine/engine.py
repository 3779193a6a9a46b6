"""The engine: a thread that interleaves requests fairly over one model. No HTTP here.

Every round gives each decoding request one step and one prefilling request one chunk of its prompt, in turn, so that a
long prompt holds nobody up for longer than a chunk takes. Each request has a key/value cache of its own while it runs;
their total size is bounded, and so is the queue of those that wait.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

import torch

from soma.base.machine import memory_available
from soma.engine.decode import Runner
from soma.engine.errors import EngineClosedError, QueueFullError, RequestError
from soma.engine.request import Completion, Request, TokenEvent, Tokenizer
from soma.engine.sampling import SamplingParams, TokenLogprob, token_logprob
from soma.model.cache import KVCache
from soma.model.formulas import kv_cache_bytes
from soma.model.transformer import Transformer

log = logging.getLogger("soma.engine")

CACHE_SHARE = 0.25  # of the memory that is free at the start
CAPACITY_STEP = 256  # cache capacities are multiples of this, so that free ones fit the next request


class CachePool:
    """Key/value caches, reused. `budget` bounds the tokens of all caches in use together."""

    def __init__(self, make: Callable[[int], KVCache], budget: int, longest: int) -> None:
        self.make, self.budget, self.longest = make, budget, longest
        self.used = 0
        self.free: list[KVCache] = []

    def size(self, tokens: int) -> int:
        """The capacity of the cache that `tokens` tokens get: a power of two times `CAPACITY_STEP`, or the longest."""
        size = CAPACITY_STEP
        while size < tokens:
            size *= 2
        return min(size, self.longest)

    def take(self, tokens: int) -> KVCache | None:
        """An empty cache for so many tokens, or None while there is no room."""
        size = self.size(tokens)
        if self.used + size > self.budget:
            return None
        fitting = [cache for cache in self.free if cache.capacity == size]
        if fitting:
            self.free.remove(fitting[0])
            cache = fitting[0]
        else:
            while self.free and self.used + sum(cache.capacity for cache in self.free) + size > self.budget:
                self.free.pop(0)
            cache = self.make(size)
        self.used += size
        return cache

    def give(self, cache: KVCache) -> None:
        """Take a cache back."""
        self.used -= cache.capacity
        cache.reset()
        self.free.append(cache)


class Engine:
    """Runs requests on a model until `close()`.

    Args:
        model: what `soma.model.hub.load_model` gives. The engine fuses its layers, which ends its training.
        tokenizer: for end-of-text ids and text.
        max_length: most tokens of a prompt and its answer together; None: the model's context, or what memory holds.
        max_running: requests that run at once.
        max_waiting: requests that wait at most; more raise `QueueFullError`.
        prefill_chunk: prompt tokens computed in one go.
        cache_tokens: tokens of all caches in use together; None: what a quarter of the free memory holds.
        use_native: decode in C where that is possible (see `Runner`).
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_length: int | None = None, max_running: int = 8,
        max_waiting: int = 64, prefill_chunk: int = 256, cache_tokens: int | None = None, use_native: bool = True,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = model.config, tokenizer
        self.device = model.device
        if cache_tokens is None:
            token_bytes = kv_cache_bytes(self.config, 1, model.dtype.itemsize)
            cache_tokens = max(CAPACITY_STEP, int(_free_bytes(self.device) * CACHE_SHARE) // token_bytes)
        context = self.config.max_position_embeddings
        self.max_length = min(max_length or context, context, cache_tokens)
        self.runner = Runner(model, self.max_length, use_native=use_native)
        self.pool = CachePool(self._make_cache, cache_tokens, self.max_length)
        self.max_running, self.max_waiting, self.prefill_chunk = max_running, max_waiting, prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="soma-engine", daemon=True)
        self.thread.start()

    def _make_cache(self, capacity: int) -> KVCache:
        return KVCache(self.config, 1, capacity, dtype=self.runner.dtype, device=self.device)

    # For those who ask:

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Refuse what can never run, with the field's name; gives the most tokens that the request may make.

        Raises RequestError: prompt empty, too long for the context, ids outside the vocabulary, max_tokens too large.
        """
        vocab_size = self.config.vocab_size
        if not prompt_ids:
            raise RequestError("the prompt has no tokens", "prompt")
        if (low := min(prompt_ids)) < 0 or (high := max(prompt_ids)) >= vocab_size:
            bad = low if low < 0 else high
            raise RequestError(f"token id {bad} is outside the vocabulary (0 to {vocab_size - 1})", "prompt")
        params.check_vocabulary(vocab_size)
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.max_length} with the answer; "
                "shorten the prompt", "prompt", "context_length_exceeded",
            )  # fmt: skip
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but the prompt has {len(prompt_ids)} tokens and the context holds "
                f"{self.max_length}: at most {room} are left", "max_tokens", "context_length_exceeded",
            )  # fmt: skip
        return params.max_tokens or room

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None,
        deliver: Callable[[TokenEvent], None] | None = None,
    ) -> Request:  # fmt: skip
        """Queue a request. Raises RequestError (see `check`), QueueFullError, EngineClosedError."""
        return self.submit_all([prompt_ids], params, [deliver] if deliver else None)[0]

    def submit_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None,
        deliver: Sequence[Callable[[TokenEvent], None]] | None = None,
    ) -> list[Request]:  # fmt: skip
        """Queue several requests, all of them or none."""
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        requests = [
            Request(
                list(ids), one, self.tokenizer, self.config.vocab_size, self.check(ids, one), self.device,
                deliver[i] if deliver else None,
            )
            for i, (ids, one) in enumerate(zip(prompts, each, strict=True))
        ]  # fmt: skip
        with self.changed:
            if self.closing:
                raise EngineClosedError("the engine is shutting down")
            free = self.max_running - len(self.running)
            if len(self.waiting) + len(requests) > self.max_waiting + max(free, 0):
                raise QueueFullError(len(self.waiting), retry_after=1 + len(self.waiting) // self.max_running)
            self.waiting.extend(requests)
            self.changed.notify()
        return requests

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Submit and yield events on the running event loop; leaving the loop early cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        request = self.submit(prompt_ids, params, threadsafe(loop, events.put_nowait))
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            request.cancel()

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Completion:
        """Run one request to its end."""
        return self.submit(prompt_ids, params).result()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self.thread.is_alive() and not self.closing

    @property
    def idle(self) -> bool:
        with self.changed:
            return not self.waiting and not self.running

    def close(self, *, drain: bool = False, timeout: float = 30.0) -> None:
        """Take no more requests; with `drain` finish those that are in, else cancel them. Ends the thread."""
        with self.changed:
            self.closing = True
            if not drain:
                for request in [*self.waiting, *self.running]:
                    request.cancel()
            self.changed.notify()
        self.thread.join(timeout)
        if self.thread.is_alive():
            for request in [*self.waiting, *self.running]:
                request.cancel()
            self.thread.join(timeout)

    # On the engine's thread:

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while self._admit():
                    self._round()
        except BaseException as error:  # our own fault; nobody may wait for ever on a thread that is gone
            with self.changed:
                self.closing = True
                requests = [*self.running, *self.waiting]
                self.running.clear()
                self.waiting.clear()
            for request in requests:
                self._send(request, request.end("error", f"{type(error).__name__} in the engine"))
            raise

    def _admit(self) -> bool:
        """Wait for work and give those who wait a cache while there is room; False when all is over."""
        with self.changed:
            while not self.waiting and not self.running:
                if self.closing:
                    return False
                self.changed.wait()
            for request in [request for request in self.waiting if request.cancelled]:
                self.waiting.remove(request)
                self._send(request, request.end("abort"))
            while self.waiting and len(self.running) < self.max_running:
                try:
                    cache = self.pool.take(self.waiting[0].capacity)
                except (MemoryError, RuntimeError):  # torch's out-of-memory errors are RuntimeErrors
                    log.exception("no memory for a key/value cache")
                    request = self.waiting.popleft()
                    self._send(request, request.end("error", "out of memory"))
                    continue
                if cache is None:
                    break
                request = self.waiting.popleft()
                request.cache = cache
                self.running.append(request)
        return True

    def _round(self) -> None:
        """One chunk for the prefilling request whose turn it is, one step for each decoding one."""
        prefilled = False
        for request in list(self.running):
            prefilling = request.computed < len(request.prompt_ids)
            if request.cancelled:
                self._finish(request, "abort")
            elif not prefilling:
                self._step(request)
            elif not prefilled:
                prefilled = True
                self._step(request)
                if request in self.running:  # the next round is another prompt's turn
                    with self.changed:
                        self.running.remove(request)
                        self.running.append(request)

    def _step(self, request: Request) -> None:
        """Let one request catch up; whatever goes wrong fails this request and no other."""
        try:
            logits_V = self._prefill(request) if request.computed < len(request.prompt_ids) else self._decode(request)
            event = None if logits_V is None else request.accept(request.sampler(logits_V))
        except Exception as error:
            log.exception("a request failed")
            self._finish(request, "error", f"{type(error).__name__} in the engine")
            return
        if event is not None:
            if event.finish_reason is not None:
                self._release(request)
            self._send(request, event)

    def _prefill(self, request: Request) -> torch.Tensor | None:
        """Compute one chunk of the prompt; the logits after its last token once it is whole."""
        start = request.computed
        chunk = request.prompt_ids[start : start + self.prefill_chunk]
        x_TD = self.runner.prefill(chunk, request.cache)
        request.computed += len(chunk)
        if request.prompt_logprobs is not None:
            following = request.prompt_ids[start + 1 : start + 1 + len(chunk)]
            alternatives = request.params.prompt_logprobs or 0
            request.prompt_logprobs += self._score(x_TD[: len(following)], following, alternatives)
        if request.computed < len(request.prompt_ids):
            return None
        return self.runner.logits(x_TD[-1:])[0]

    def _score(self, x_TD: torch.Tensor, ids: list[int], alternatives: int) -> list[TokenLogprob]:
        logits_TV = self.runner.logits(x_TD).float()
        return [token_logprob(logits_V, token, alternatives) for logits_V, token in zip(logits_TV, ids, strict=True)]

    def _decode(self, request: Request) -> torch.Tensor:
        request.computed += 1
        return self.runner.decode(request.last_id, request.cache)

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        self._release(request)
        self._send(request, request.end(reason, error))

    def _release(self, request: Request) -> None:
        with self.changed:
            self.running.remove(request)
            self.pool.give(request.cache)
            request.cache = None

    def _send(self, request: Request, event: TokenEvent) -> None:
        """Deliver an event; a listener that fails is cut off and takes nobody with it."""
        try:
            request.deliver(event)
        except Exception:
            log.exception("an event could not be delivered")
            request.cancel()


def threadsafe(loop: asyncio.AbstractEventLoop, put: Callable[[TokenEvent], None]) -> Callable[[TokenEvent], None]:
    """Deliver on `loop`'s thread; events for a loop that has closed are dropped."""

    def deliver(event: TokenEvent) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(put, event)

    return deliver


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory_available()
