"""The engine in a process of its own, asked like an `Engine` in this one.

The front keeps the text: it checks, tokenizes, detokenizes and looks for stop strings, while the engine process works
on ids (`soma.engine.worker`). When that process dies, every request in it ends with an error event, and a new process
is started; until it is there requests are refused with `EngineRestartingError`. When the front dies, the socket
between the two ends, and with it the engine process.
"""

import asyncio
import itertools
import logging
import math
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.channel import Channel, Message
from soma.engine.check import check_request
from soma.engine.errors import EngineClosedError, EngineRestartingError, QueueFullError, RequestError
from soma.engine.guided import Guides
from soma.engine.handover import threadsafe
from soma.engine.launch import Launched, launch
from soma.engine.params import SamplingParams
from soma.engine.remote_adapters import RemoteAdapters
from soma.engine.remote_embedder import RemoteEmbedder
from soma.engine.remote_request import ProcessRequest
from soma.engine.request import Completion, TokenEvent
from soma.engine.stats import COUNTERS, EMPTY
from soma.model.tokenizer import Tokenizer

log = logging.getLogger("soma.engine")

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds between two attempts to start again; it doubles
LOST = "the engine stopped in the middle of this request; it is being restarted, send the request again"


class EngineProcess:
    """Starts an engine process for a model and keeps it running until `close()`.

    Args: those of `soma.engine.load.load_engine`; launched: a process that was started before, by `launch()`;
    cores_share: its argument when the process is started again; adapters: names and folders of adapters to load.
    Waits until the model is loaded.
    Raises UserError: what `load_engine` raises there; the process ended while loading.
    """

    def __init__(
        self, model_ref: str | Path, *, precision: str = "auto", device: str = "auto", launched: Launched | None = None,
        cores_share: int = 1, adapters: Mapping[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.cores_share = cores_share
        self.options = {"model_ref": str(model_ref), "precision": precision, "device": device, **options}
        self.lock = threading.RLock()
        self.numbers = itertools.count()
        self.requests: dict[int, ProcessRequest] = {}
        self.embedder = RemoteEmbedder(self)
        self.adapters = RemoteAdapters(self, adapters or {})
        self.on_end: Callable[[ProcessRequest], None] = lambda request: None
        self.take_over: Callable[[ProcessRequest], bool] = lambda request: False  # whether another engine runs it now
        self.closing, self.closed = False, threading.Event()
        self.channel: Channel | None = None  # None while there is no engine to talk to
        self.restarts = 0
        self.last_words = ""  # why the process ended, where it knew
        self.load_seconds = 0.0
        self.next_start = 0.0
        self.process, self.facts, channel, frames = self._start(launched)
        self.tokenizer = Tokenizer.load(self.facts["directory"])
        self.guides = Guides(self.tokenizer, self.vocab_size)
        self.live, self.before = dict(EMPTY), dict.fromkeys(COUNTERS, 0.0)
        self.channel = channel
        self.thread = threading.Thread(target=self._supervise, args=(frames,), name="soma-front", daemon=True)
        self.thread.start()

    @property
    def model_name(self) -> str:
        return str(self.facts["name"])

    @property
    def max_length(self) -> int:
        return int(self.facts["max_length"])

    @property
    def vocab_size(self) -> int:
        return int(self.facts["vocab_size"])

    @property
    def room(self) -> int:
        """Requests that can be submitted at this moment."""
        return int(self.facts["places"]) - len(self.requests)

    @property
    def makes_text(self) -> bool:
        """False for an encoder: it makes embeddings alone."""
        return bool(self.facts["makes_text"])

    @property
    def embeds(self) -> bool:
        """False for a model over several ranks."""
        return bool(self.facts["embeds"])

    # For those who ask:

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """As `Engine.check`."""
        if not self.makes_text:
            raise RequestError(f"the model `{self.model_name}` makes embeddings or scores, no text; use /v1/embeddings "
                               "or /v1/rerank", "model", "model_makes_no_text")  # fmt: skip
        self.guides.check(params.guided)
        return check_request(prompt_ids, params, self.vocab_size, self.max_length)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """As `Engine.load_adapter`; also raises EngineRestartingError. A new engine process has it too."""
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """As `Engine.unload_adapter`; also raises EngineRestartingError."""
        self.adapters.unload(name)

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The adapters that requests may choose, and where each was loaded from."""
        return self.adapters.folders

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None,
        deliver: Callable[[TokenEvent], None] | None = None, *, adapter: str | None = None,
    ) -> ProcessRequest:  # fmt: skip
        """As `Engine.submit`; also raises EngineRestartingError."""
        return self.submit_all([prompt_ids], params, [deliver] if deliver else None, adapter=adapter)[0]

    def submit_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None,
        deliver: Sequence[Callable[[TokenEvent], None]] | None = None, *, adapter: str | None = None, **options: Any,
    ) -> list[ProcessRequest]:  # fmt: skip
        """Queue several requests, all of them or none. Events are delivered on this object's own thread.

        options: `priority`, `key`, `timeout` of `Engine.submit_all`.
        """
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        requests = [
            ProcessRequest(list(ids), one, self.check(ids, one), self.tokenizer, self._cancel,
                           deliver[i] if deliver else None)
            for i, (ids, one) in enumerate(zip(prompts, each, strict=True))
        ]  # fmt: skip
        if not requests:
            return []
        with self.lock:
            channel = self.open_channel()
            self.adapters.check(adapter)
            if len(requests) > self.room:
                waiting = max(0, len(self.requests) - self.facts["max_running"])
                raise QueueFullError(waiting, retry_after=1 + waiting // self.facts["max_running"])
            for request in requests:
                request.number, request.chosen, request.options = next(self.numbers), adapter, options
                self.requests[request.number] = request
            channel.put("submit", requests[0].number, [request.prompt_ids for request in requests],
                        [replace(one, stop=()) if one.stop else one for one in each],
                        {**options, "adapter": adapter})  # fmt: skip
        return requests

    def adopt(self, request: ProcessRequest) -> None:
        """Run a request that another engine lost before its first token. Its deadline stays where it was.

        Raises EngineClosedError, EngineRestartingError, QueueFullError, RequestError (its adapter is not here).
        """
        options = dict(request.options)
        if options.get("timeout") is not None:
            options["timeout"] -= time.monotonic() - request.arrived
        with self.lock:
            channel = self.open_channel()
            self.adapters.check(request.chosen)
            if self.room < 1:
                raise QueueFullError(len(self.requests), retry_after=1)
            request.number, request.send_cancel = next(self.numbers), self._cancel
            self.requests[request.number] = request
            params = replace(request.params, stop=()) if request.params.stop else request.params
            channel.put("submit", request.number, [request.prompt_ids], [params],
                        {**options, "adapter": request.chosen})  # fmt: skip
            if request.cancelled:
                self._cancel(request)

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[TokenEvent]:
        """As `Engine.stream`."""
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        request = self.submit(prompt_ids, params, threadsafe(asyncio.get_running_loop(), events.put_nowait))
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
        """Whether requests are taken at this moment."""
        return self.channel is not None and not self.closing

    @property
    def retry_after(self) -> int:
        """Seconds until a restarting engine should be there: what the last start took."""
        return max(1, math.ceil(self.next_start - time.monotonic() + self.load_seconds))

    @property
    def idle(self) -> bool:
        return not self.requests

    def stats(self) -> dict[str, float]:
        """The engine's figures as of a tenth of a second ago; counters go on over restarts."""
        with self.lock:
            values = dict(self.live) | {name: self.live[name] + self.before[name] for name in COUNTERS}
            return values if self.requests else values | {"running": 0, "waiting": 0, "kv_cache_usage": 0.0}

    def close(self, *, drain: bool = False, timeout: float = 30.0) -> None:
        """Take no more requests; with `drain` finish those that are in, else cancel them. Ends the process."""
        with self.lock:
            self.closing = True
            self.closed.set()
            if self.channel is not None:
                self.channel.put("close", drain)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.thread.join(10)

    def open_channel(self) -> Channel:
        """Where messages go, called under the lock. Raises EngineClosedError, EngineRestartingError."""
        if self.closing:
            raise EngineClosedError("the engine is shutting down")
        if self.channel is None:
            raise EngineRestartingError(self.retry_after)
        return self.channel

    def _cancel(self, request: ProcessRequest) -> None:
        with self.lock:
            if self.channel is not None:
                self.channel.put("cancel", request.number)

    # Starting, watching, starting again:

    def _start(
        self, launched: Launched | None = None, *, again: bool = False
    ) -> "tuple[subprocess.Popen[bytes], dict[str, Any], Channel, Iterator[list[Message]]]":
        """A new process with its model loaded: the process, its facts, the way to it, and what it will say."""
        started = time.monotonic()
        process, ours = launched or launch(self.cores_share)
        channel = Channel(ours)
        channel.put("start", {**self.options, "adapters": self.adapters.folders, "again": again})
        frames = iter(channel)
        for frame in frames:
            for kind, *rest in frame:
                if kind == "note":
                    progress.current().note(rest[0])
                elif kind == "lost":
                    self.last_words = rest[0]
                elif kind == "ready":
                    self.load_seconds = time.monotonic() - started
                    return process, rest[0], channel, frames
                else:
                    channel.close()
                    process.wait()
                    raise UserError(rest[0] if rest[1] else f"the engine cannot be loaded: {rest[0]}")
        channel.close()
        why = f" ({self.last_words})" if self.last_words else ""
        raise UserError(f"the engine process ended with status {process.wait()}{why} while it loaded the model")

    def _supervise(self, frames: Iterator[list[Message]]) -> None:
        """Take what the engine process says; when it is gone, tell everybody and start another, until `close`."""
        while True:
            for frame in frames:
                for kind, *rest in frame:
                    self._take(kind, *rest)
            self._lose()
            delay = FIRST_DELAY
            while True:
                with self.lock:
                    if self.closing:
                        return
                    self.next_start = time.monotonic()
                try:
                    self.process, facts, channel, frames = self._start(again=True)
                    break
                except (UserError, OSError) as error:
                    log.error("the engine does not come up again: %s; next attempt in %.0f s", error, delay)
                    self.next_start = time.monotonic() + delay
                    self.closed.wait(delay)
                    delay = min(delay * 2, LONGEST_DELAY)
            with self.lock:
                self.facts, self.channel, self.adapters.folders = facts, channel, facts["adapters"]
                self.restarts += 1
                if self.closing:  # `close` found no channel to say it on
                    channel.put("close", False)
            log.warning("the engine is back")

    def _lose(self) -> None:
        """The process is gone: end what ran in it."""
        with self.lock:
            channel, self.channel = self.channel, None
            requests, self.requests = list(self.requests.values()), {}
            futures, self.embedder.waiting = list(self.embedder.waiting.values()), {}
            self.next_start = time.monotonic()
            for name in COUNTERS:
                self.before[name] += self.live[name]
            self.live = dict(EMPTY)
        if channel is not None:
            channel.close()
        status = self.process.wait()
        if not self.closing:
            why = self.last_words or "it did not say why"
            log.error("the engine process ended with status %d (%s) and %d requests in it", status, why, len(requests))
            self.last_words = ""
        for request in requests:
            if request.finish_reason is None and (request.made or not self.take_over(request)):
                self._deliver(request, TokenEvent(None, finish_reason="error", error=LOST, is_lost=True))
        self.adapters.lose()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineRestartingError(self.retry_after))

    def _take(self, kind: str, *rest: Any) -> None:
        if kind == "event":
            number, event, extra = rest
            request = self.requests[number]
            if extra is not None:
                request.scheduled = extra.scheduled
                request.prompt_logprobs = extra.prompt_logprobs or request.prompt_logprobs
            if event.finish_reason is not None:
                with self.lock:
                    del self.requests[number]
                self.on_end(request)
            if request.finish_reason is None:  # else a stop string ended it here, and this came after
                self._deliver(request, event)
        elif kind == "stats":
            with self.lock:
                self.live = rest[0]
        elif kind == "embedded":
            self.embedder.settle(*rest)
        elif kind == "lost":
            self.last_words = rest[0]
        elif kind == "adapter":
            self.adapters.settle(*rest)

    def _deliver(self, request: ProcessRequest, event: TokenEvent) -> None:
        """Send an event out with its text; a listener that fails is cut off and takes nobody with it."""
        try:
            shown = request.with_text(event)
            if shown.finish_reason is not None and event.finish_reason is None:
                self._cancel(request)
            request.deliver(shown)
        except Exception:
            log.exception("an event could not be delivered")
            request.cancel()
