"""Several engine processes with the same model, asked like one: data parallelism behind one front.

Each prompt goes to the engine that `soma.engine.router` names. An engine that died is passed over until it is back.
Its requests that had no token yet go to another engine, the others end with an error; only if no engine is there are
requests refused.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soma.base.errors import UserError
from soma.engine.errors import EngineClosedError, EngineRestartingError, QueueFullError, RequestError, unknown_model
from soma.engine.launch import Launched
from soma.engine.params import SamplingParams
from soma.engine.process import EngineProcess
from soma.engine.remote_request import ProcessRequest
from soma.engine.request import Completion, TokenEvent
from soma.engine.router import Router
from soma.engine.stats import total


def salt_of(adapter: str | None) -> bytes:
    """What keeps the prefixes of an adapter apart for the router."""
    return b"" if adapter is None else adapter.encode()


class ReplicasEmbedder:
    """The engines' embeddings, asked like an `Embedder`: each call goes to the engine with the fewest calls open."""

    def __init__(self, engines: Sequence[EngineProcess]) -> None:
        self.engines = engines

    @property
    def max_length(self) -> int:
        return min(engine.embedder.max_length for engine in self.engines)

    @property
    def dimensions(self) -> int:
        return self.engines[0].embedder.dimensions

    @property
    def labels(self) -> list[str]:
        """Of a classifier."""
        return self.engines[0].embedder.labels

    def check(self, ids: Sequence[int]) -> None:
        """Raises RequestError for ids that cannot be embedded."""
        min(self.engines, key=lambda engine: engine.embedder.max_length).embedder.check(ids)

    def submit(
        self, prompts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None
    ) -> "Future[np.ndarray]":  # fmt: skip
        """As `RemoteEmbedder.submit`; what an engine loses goes to another one."""
        outcome: Future[np.ndarray] = Future()
        outcome.set_running_or_notify_cancel()

        def attempt() -> None:
            there = [engine for engine in self.engines if engine.alive] or self.engines
            made = min(there, key=lambda engine: len(engine.embedder.waiting)).embedder.submit(prompts, firsts)
            made.add_done_callback(pass_on)

        def pass_on(made: "Future[np.ndarray]") -> None:
            error = made.exception()
            if isinstance(error, EngineRestartingError) and any(engine.alive for engine in self.engines):
                try:
                    attempt()
                    return
                except (EngineClosedError, EngineRestartingError, QueueFullError) as refused:
                    error = refused
            if error is None:
                outcome.set_result(made.result())
            else:
                outcome.set_exception(error)

        attempt()
        return outcome


class Replicas:
    """One engine process for each of `launched` (see `soma.engine.launch`), all with the same model.

    Args: those of `EngineProcess`. Engines are spread over the GPUs where there are several and `device` names none.
    Raises UserError: what `EngineProcess` raises.
    """

    def __init__(
        self, model_ref: str | Path, launched: Sequence[Launched], *, device: str = "auto", **options: Any
    ) -> None:
        count, world = len(launched), options.get("tensor_parallel", 1) * options.get("pipeline_parallel", 1)
        gpus = torch.cuda.device_count() // world if device in ("auto", "cuda") else 0  # sets of GPUs for one engine
        places = [f"cuda:{number % gpus * world}" if gpus > 1 else device for number in range(count)]
        options |= {"share": -(-count // max(gpus, 1)), "cores_share": count * world}
        with ThreadPoolExecutor(count) as pool:
            made = [
                pool.submit(EngineProcess, model_ref, device=place, launched=each, **options)
                for place, each in zip(places, launched, strict=True)
            ]
        if failed := [future.exception() for future in made if future.exception() is not None]:
            for future in made:
                if future.exception() is None:
                    future.result().close()
            raise failed[0]  # type: ignore[misc]
        self.engines = [future.result() for future in made]
        self.router = Router([engine.facts["blocks"] for engine in self.engines], self.engines[0].facts["block_size"])
        self.lock = threading.RLock()  # taken before those of the engines, which are taken in their order
        self.starts = [0] * len(self.engines)  # restarts of each that the router knows of
        self.embedder = ReplicasEmbedder(self.engines)
        self.guides = self.engines[0].guides  # a grammar is compiled once for all
        for number, engine in enumerate(self.engines):
            engine.guides = self.guides
            engine.on_end = partial(self._ended, number)
            engine.take_over = self._take_over

    @property
    def tokenizer(self) -> Any:
        return self.engines[0].tokenizer

    @property
    def model_name(self) -> str:
        return self.engines[0].model_name

    @property
    def max_length(self) -> int:
        return self._shortest.max_length

    @property
    def vocab_size(self) -> int:
        return self.engines[0].vocab_size

    @property
    def makes_text(self) -> bool:
        return self.engines[0].makes_text

    @property
    def embeds(self) -> bool:
        return self.engines[0].embeds

    @property
    def _shortest(self) -> EngineProcess:
        return min(self.engines, key=lambda engine: engine.max_length)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """As `Engine.check`, for the engine that takes least."""
        return self._shortest.check(prompt_ids, params)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """As `EngineProcess.load_adapter`, in all engines or in none."""
        done: list[EngineProcess] = []
        try:
            for engine in self.engines:
                engine.load_adapter(name, folder)
                done.append(engine)
        except BaseException:
            for engine in done:
                with suppress(EngineClosedError, UserError):
                    engine.unload_adapter(name)
            raise

    def unload_adapter(self, name: str) -> None:
        """As `EngineProcess.unload_adapter`, in all engines."""
        having = [engine for engine in self.engines if name in engine.adapter_folders]
        if not having:
            raise unknown_model(name)
        for engine in having:
            engine.unload_adapter(name)

    @property
    def adapter_folders(self) -> dict[str, str]:
        """The adapters that all engines have."""
        first, *others = [engine.adapter_folders for engine in self.engines]
        return {name: folder for name, folder in first.items() if all(name in other for other in others)}

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None,
        deliver: Callable[[TokenEvent], None] | None = None, *, adapter: str | None = None,
    ) -> ProcessRequest:  # fmt: skip
        """As `EngineProcess.submit`."""
        return self.submit_all([prompt_ids], params, [deliver] if deliver else None, adapter=adapter)[0]

    def submit_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None,
        deliver: Sequence[Callable[[TokenEvent], None]] | None = None, *, adapter: str | None = None, **options: Any,
    ) -> list[ProcessRequest]:  # fmt: skip
        """Queue several requests, all of them or none; equal prompts that follow each other go to one engine.

        Raises what `EngineProcess.submit_all` raises, EngineRestartingError only if no engine is there.
        """
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        for ids, one in zip(prompts, each, strict=True):
            self.check(ids, one)
        groups = [list(group) for _, group in groupby(range(len(prompts)), key=lambda place: prompts[place])]
        requests: list[ProcessRequest] = []
        with ExitStack() as held:  # under all locks nothing fills up or goes away between the choice and the submission
            for lock in (self.lock, *(engine.lock for engine in self.engines)):
                held.enter_context(lock)
            if adapter is not None and adapter not in self.adapter_folders:
                raise unknown_model(adapter)
            chosen = self._choose([(len(group), prompts[group[0]]) for group in groups], adapter)
            for group, number in zip(groups, chosen, strict=True):
                made = self.engines[number].submit_all(
                    [prompts[place] for place in group], [each[place] for place in group],
                    [deliver[place] for place in group] if deliver else None, adapter=adapter, **options,
                )  # fmt: skip
                for request in made:
                    request.replica = number
                requests += made
        return requests

    def _choose(self, groups: Sequence[tuple[int, Sequence[int]]], adapter: str | None) -> list[int]:
        """The engine for each of several prompts that are each asked for so many times."""
        alive = [engine for engine in self.engines if engine.alive]
        if not alive:
            if self.engines[0].closing:
                raise EngineClosedError("the engine is shutting down")
            raise EngineRestartingError(self.retry_after)
        loads = {number: len(engine.requests) for number, engine in enumerate(self.engines) if engine.alive}
        room = {number: self.engines[number].room for number in loads}
        chosen = []
        for number in loads:
            if self.engines[number].restarts != self.starts[number]:
                self.starts[number] = self.engines[number].restarts
                self.router.forget(number)
        for count, ids in groups:
            chain = self.router.chain(ids, salt_of(adapter))
            open_ = [loads[n] if n in loads and room[n] >= count else None for n in range(len(self.engines))]
            if all(load is None for load in open_):
                waiting = sum(max(0, len(engine.requests) - engine.facts["max_running"]) for engine in alive)
                raise QueueFullError(waiting, retry_after=1 + waiting // sum(e.facts["max_running"] for e in alive))
            number = self.router.choose(chain, open_)
            self.router.add(number, chain)
            loads[number] += count
            room[number] -= count
            chosen.append(number)
        return chosen

    def _ended(self, number: int, request: ProcessRequest) -> None:
        """An answer is in its engine's cache too: the next turn of a conversation begins with it."""
        if request.made:
            chain = self.router.chain([*request.prompt_ids, *request.made], salt_of(request.chosen))
            with self.lock:
                self.router.add(number, chain)

    def _take_over(self, request: ProcessRequest) -> bool:
        """Give a request that an engine lost to another one; False if there is none for it."""
        with ExitStack() as held:
            for lock in (self.lock, *(engine.lock for engine in self.engines)):
                held.enter_context(lock)
            try:
                (number,) = self._choose([(1, request.prompt_ids)], request.chosen)
                self.engines[number].adopt(request)
            except (EngineClosedError, EngineRestartingError, QueueFullError, RequestError):
                return False
            request.replica = number
            return True

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Completion:
        """Run one request to its end."""
        return self.submit(prompt_ids, params).result()

    @property
    def alive(self) -> bool:
        """Whether requests are taken at this moment."""
        return any(engine.alive for engine in self.engines)

    @property
    def retry_after(self) -> int:
        """Seconds until requests should be taken again."""
        return 1 if self.alive else min(engine.retry_after for engine in self.engines)

    @property
    def idle(self) -> bool:
        return all(engine.idle for engine in self.engines)

    def stats(self) -> dict[str, float]:
        """The figures of all engines together."""
        return total([engine.stats() for engine in self.engines])

    def close(self, *, drain: bool = False, timeout: float = 30.0) -> None:
        """As `EngineProcess.close`, all at once."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            for engine in self.engines:
                pool.submit(engine.close, drain=drain, timeout=timeout)
