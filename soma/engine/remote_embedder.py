"""Embeddings of an engine process, asked for from the front."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from soma.engine.check import check_embeddable
from soma.engine.errors import QueueFullError

if TYPE_CHECKING:
    from soma.engine.process import EngineProcess

MAX_EMBEDDINGS = 64  # requests for embeddings that may wait


class RemoteEmbedder:
    """The engine process's embeddings, asked like an `Embedder`."""

    def __init__(self, process: "EngineProcess") -> None:
        self.process = process
        self.waiting: dict[int, Future[np.ndarray]] = {}

    @property
    def max_length(self) -> int:
        return int(self.process.facts["max_length"])

    @property
    def dimensions(self) -> int:
        return int(self.process.facts["dimensions"])

    @property
    def labels(self) -> list[str]:
        """Of a classifier."""
        return list(self.process.facts["labels"])

    def check(self, ids: Sequence[int]) -> None:
        """Raises RequestError for ids that cannot be embedded."""
        check_embeddable(ids, self.process.vocab_size, self.max_length)

    def submit(
        self, prompts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None
    ) -> "Future[np.ndarray]":  # fmt: skip
        """One vector per prompt, (n, D) float32, later. Raises RequestError, QueueFullError, EngineClosedError."""
        for ids in prompts:
            self.check(ids)
        future: Future[np.ndarray] = Future()
        with self.process.lock:
            channel = self.process.open_channel()
            if len(self.waiting) >= MAX_EMBEDDINGS:
                raise QueueFullError(len(self.waiting), retry_after=1)
            number = next(self.process.numbers)
            self.waiting[number] = future
            channel.put("embed", number, [list(ids) for ids in prompts], None if firsts is None else list(firsts))
        return future

    def settle(self, number: int, vectors: np.ndarray | None, error: str | None) -> None:
        """Give an answer to the one who waits for it."""
        with self.process.lock:
            future = self.waiting.pop(number)
        if future.set_running_or_notify_cancel():
            if vectors is None:
                future.set_exception(RuntimeError(error))
            else:
                future.set_result(vectors)
