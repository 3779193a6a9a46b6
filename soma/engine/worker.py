"""The engine's own process: what `soma.engine.process` starts and talks to. No HTTP, no text: ids in, ids out.

Messages in:  ("start", options), ("submit", first number, prompts, params, options), ("cancel", number),
              ("embed", number, prompts, firsts), ("load_adapter", number, name, folder),
              ("unload_adapter", number, name), ("close", drain).
Messages out: ("note", text), ("failed", text, is the user's mistake), ("ready", facts), ("event", number, TokenEvent,
              Extra | None), ("stats", dict), ("embedded", number, array | None, error | None),
              ("adapter", number, error | None, is the user's mistake), ("lost", why this process ends).
"""

import gc
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.channel import Channel, Message
from soma.engine.embed import Embedder, load_embedder
from soma.engine.engine import Engine, weight_bits
from soma.engine.errors import EngineClosedError, QueueFullError
from soma.engine.load import load_tokenizer, load_weights, model_name
from soma.engine.parallel.group import STEP_SECONDS, RankGroup
from soma.engine.parallel.part import Plan
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.request import Request, TokenEvent
from soma.engine.stats import scheduled_at, stats_of
from soma.model.encoder import is_encoder
from soma.model.folder import local_folder
from soma.model.tokenizer import Tokenizer

STATS_INTERVAL = 0.1  # seconds between the figures of a busy engine
ENGINE_DIED = 70  # exit status

log = logging.getLogger("soma.engine")


@dataclass(frozen=True)
class Extra:
    """What the front needs beside some events: prompt log-probabilities with the first, the rest with the last."""

    prompt_logprobs: list[TokenLogprob | None] | None = None
    scheduled: float | None = None  # on the machine's monotonic clock


class NoText:
    """The decoder of a process that makes no text."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class IdsOnly:
    """A tokenizer whose texts are empty: the front makes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def stream_decoder(self) -> NoText:
        return NoText()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Notes(progress.Reporter):
    """Sends what loading has to say to the front."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def note(self, text: str) -> None:
        self.channel.put("note", text)


class Worker:
    """Does what the front asks for, until it hangs up."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel = Channel(sock, self._complete)
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.requests: dict[int, Request] = {}
        self.submitted = threading.Condition()
        self.busy = threading.Event()
        self.closing = False
        self.engine: Engine | None = None
        self.embedder: Embedder | None = None
        self.group: RankGroup | None = None  # where several processes hold the model
        threading.Thread(target=self._read, name="soma-reader", daemon=True).start()

    def _read(self) -> None:
        """Messages into the inbox; the end of the front is the end of this process, whatever it is doing."""
        for frame in self.channel:
            for message in frame:
                self.inbox.put(message)
        os._exit(0)

    def run(self) -> None:
        """Load, then serve. Ends with the front, or when the engine's thread has died."""
        _, options = self.inbox.get()
        try:
            with progress.use(Notes(self.channel)):
                facts = self.load(**options)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("the engine cannot be loaded")
            self.channel.put("failed", str(error) or type(error).__name__, isinstance(error, UserError))
            self._end(1)
        # What is loaded stays: without this Python looks through all of torch's objects again and again (64 streams on
        # a tiny model: 45 to 52 µs of this process a token, 43 with it).
        gc.collect()
        gc.freeze()
        self.channel.put("ready", facts)
        threading.Thread(target=self._report, name="soma-stats", daemon=True).start()
        handlers: dict[str, Callable[..., None]] = {
            "submit": self._submit,
            "cancel": self._cancel,
            "embed": self._embed,
            "load_adapter": partial(self._adapt, "load_adapter"),
            "unload_adapter": partial(self._adapt, "unload_adapter"),
            "close": self._close,
        }
        while True:
            kind, *arguments = self.inbox.get()
            handlers[kind](*arguments)

    def load(
        self, model_ref: str, precision: str, device: str, tensor_parallel: int = 1, pipeline_parallel: int = 1,
        *, adapters: dict[str, str], again: bool, **options: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Load the model and its adapters; what the front has to know about them.

        `again`: this process follows one that has ended; an adapter that is no longer there is then left out.
        """
        ranks = tensor_parallel, pipeline_parallel
        directory = local_folder(model_ref)
        facts: dict[str, Any] = {"directory": str(directory), "name": model_name(model_ref, Path(directory))}
        if is_encoder(directory):
            if ranks != (1, 1):
                raise UserError(f"{directory}: an encoder is not split over ranks; use replicas")
            self.embedder = load_embedder(directory, precision=precision, device=device)
            config = self.embedder.config
            facts |= {"max_length": self.embedder.max_length, "makes_text": False, "places": 0, "max_running": 1,
                      "blocks": 0, "block_size": 1}  # fmt: skip
        else:
            if ranks == (1, 1):
                model, tokenizer = load_weights(directory, precision=precision, device=device)
                self.engine = engine = Engine(model, IdsOnly(tokenizer), **options)
                self.embedder = Embedder(model, directory, max_length=engine.max_length)
            else:
                self.engine = engine = self._load_ranks(directory, precision, device, *ranks, **options)
            engine.guides.prepare()
            config = engine.config
            places = engine.max_running + engine.max_waiting
            facts |= {"max_length": engine.max_length, "makes_text": True, "places": places,
                      "max_running": engine.max_running, "blocks": engine.pool.num_blocks,
                      "block_size": engine.pool.block_size}  # fmt: skip
        if adapters and self.engine is None:
            raise UserError(f"{directory} makes embeddings, no text: it takes no adapters")
        dimensions = self.embedder.dimensions if self.embedder is not None else config.hidden_size
        labels = self.embedder.labels if self.embedder is not None else []
        facts |= {"vocab_size": config.vocab_size, "dimensions": dimensions, "labels": labels}
        return {**facts, "embeds": self.embedder is not None, "adapters": self._load_adapters(adapters, again)}

    def _load_adapters(self, adapters: dict[str, str], again: bool) -> dict[str, str]:
        """Load adapters by name and folder; those that are there. Raises UserError, unless `again`."""
        for name, folder in adapters.items():
            assert self.engine is not None
            try:
                self.engine.load_adapter(name, folder)
            except UserError as error:
                if not again:
                    raise
                log.error("the adapter %r is gone: %s", name, error)
        return {} if self.engine is None else self.engine.adapter_folders

    def _load_ranks(
        self, directory: Path, precision: str, device: str, tensors: int, stages: int, *, weights: str | None = None,
        step_seconds: float = STEP_SECONDS, backend: str = "auto", **options: Any,
    ) -> Engine:  # fmt: skip
        """An engine whose model is spread over this process and others."""
        if backend not in ("auto", "reference"):
            raise UserError(f"backend {backend!r}: several ranks compute in PyTorch alone")
        plan = Plan(str(directory), tensors, stages, precision, device, weight_bits(weights))
        tokenizer = load_tokenizer(directory)
        self.group = group = RankGroup(plan, self._lost, step_seconds)
        return Engine(group.model, IdsOnly(tokenizer), group=group, **options)

    def _lost(self, reason: str) -> None:
        """A rank is gone: so is this engine."""
        log.error("the engine ends: %s", reason)
        self.channel.put("lost", reason)
        self._end(ENGINE_DIED)

    def _submit(
        self, first: int, prompts: Sequence[list[int]], params: Sequence[SamplingParams], options: dict[str, Any]
    ) -> None:
        assert self.engine is not None
        numbers = range(first, first + len(prompts))
        try:
            deliver = [partial(self._deliver, number) for number in numbers]
            requests = self.engine.submit_all(prompts, params, deliver, **options)
        except (UserError, QueueFullError, EngineClosedError) as error:  # the front checked before: seldom
            for number in numbers:
                self.channel.put("event", number, TokenEvent(None, finish_reason="error", error=str(error)), Extra())
            return
        with self.submitted:
            self.requests.update(zip(numbers, requests, strict=True))
            self.submitted.notify()
        self.busy.set()

    def _deliver(self, number: int, event: TokenEvent) -> None:
        self.channel.put("event", number, event, None)

    def _complete(self, message: Message) -> Message:
        """On the writing thread: add to an event what the front needs of its request."""
        kind, *rest = message
        if kind != "event" or rest[2] is not None:
            return message
        number, event, _ = rest
        request = self.requests.get(number)
        if request is None:  # its first event came before `submit_all` returned
            with self.submitted:
                self.submitted.wait_for(lambda: number in self.requests)
            request = self.requests[number]
        is_last = event.finish_reason is not None
        extra = None
        if is_last or request.prompt_logprobs is not None:
            extra = Extra(request.prompt_logprobs, scheduled_at(request) if is_last else None)
            request.prompt_logprobs = None  # once is enough
        if is_last:
            del self.requests[number]
        return kind, number, event, extra

    def _cancel(self, number: int) -> None:
        if (request := self.requests.get(number)) is not None:
            request.cancel()

    def _embed(self, number: int, prompts: list[list[int]], firsts: list[int] | None) -> None:
        def done(future: "Future[np.ndarray]") -> None:
            error = future.exception()
            if error is not None:
                log.error("embedding failed", exc_info=error)
                self.channel.put("embedded", number, None, f"{type(error).__name__} in the engine")
            else:
                self.channel.put("embedded", number, future.result(), None)

        assert self.embedder is not None
        self.embedder.submit(prompts, firsts).add_done_callback(done)

    def _adapt(self, what: str, number: int, *arguments: str) -> None:
        """Load or unload an adapter, on a thread of its own: files are read, and unloading waits for requests."""

        def work() -> None:
            try:
                getattr(self.engine, what)(*arguments)
            except UserError as error:
                self.channel.put("adapter", number, str(error), True)
            except Exception as error:
                log.exception("%s failed", what)
                self.channel.put("adapter", number, f"{type(error).__name__} in the engine", False)
            else:
                self.channel.put("adapter", number, None, False)

        threading.Thread(target=work, name="soma-adapter", daemon=True).start()

    def _report(self) -> None:
        """Figures while the engine is busy, and once more when it is idle. A dead engine ends the process."""
        while self.engine is not None:
            self.busy.wait()
            self.busy.clear()
            if not self.engine.idle:
                self.busy.set()
            self.channel.put("stats", stats_of(self.engine))
            if not self.engine.alive and not self.closing:
                self._end(ENGINE_DIED)
            time.sleep(STATS_INTERVAL)

    def _close(self, drain: bool) -> None:
        """Let requests end (or cancel them) while messages, such as cancellations, still come in."""

        def close() -> None:
            if self.engine is not None:
                self.engine.close(drain=drain, timeout=1e9 if drain else 30.0)
            self._end(0)

        self.closing = True
        threading.Thread(target=close, name="soma-close", daemon=True).start()

    def _end(self, status: int) -> None:
        if self.group is not None and status == 0:
            self.group.close()
        self.channel.flush()
        os._exit(status)


def main(descriptor: int) -> None:
    """The process's program. The front decides when it ends, so signals meant for both are left to the front."""
    os.set_inheritable(descriptor, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    Worker(socket.socket(fileno=descriptor)).run()
