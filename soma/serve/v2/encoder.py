"""A model that makes embeddings: texts in, unit vectors out."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from soma.model.tokenizer import Tokenizer
from soma.serve.calls import Usage
from soma.serve.errors import ApiError
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import Job, Once, Options, TensorSpec, V2Model


class Embeds(Protocol):
    """The part of `soma.engine.embed.Embedder` that is needed; an engine process' embedder has it too."""

    @property
    def dimensions(self) -> int: ...

    def submit(self, prompts: Any) -> "Future[np.ndarray]": ...

    def close(self) -> None: ...


class Encoder(V2Model):
    """`text` (BYTES, [N]) to `embedding` (FP32, [N, D])."""

    platform = "soma_encoder"
    inputs = (TensorSpec("text", "BYTES", (-1,)),)

    def __init__(
        self, embedder: Embeds, tokenizer: Tokenizer, alive: Callable[[], bool] = lambda: True, *, own: bool = True,
    ) -> None:  # fmt: skip
        """alive: whether the process that computes is there. own: the embedder is closed with the model."""
        self.embedder, self.tokenizer, self.alive, self.own = embedder, tokenizer, alive, own
        self.outputs = (TensorSpec("embedding", "FP32", (-1, embedder.dimensions)),)

    @property
    def ready(self) -> bool:
        return self.alive()

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """Unit vectors, (N, D) float32."""
        return await self.embed(await asyncio.to_thread(self.encode, tensors["text"]))

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """As `infer`, with the tokens counted."""
        prompts = await asyncio.to_thread(self.encode, tensors["text"])
        return Embedding(self, prompts, options.timeout)

    async def embed(self, prompts: list[list[int]]) -> Tensors:
        """Vectors of lists of ids."""
        return {"embedding": await asyncio.wrap_future(self.embedder.submit(prompts))}

    def encode(self, texts: np.ndarray) -> list[list[int]]:
        """Ids with the special tokens that the tokenizer puts around a text. Raises ApiError."""
        return [found.ids for found in self.tokenizer.inner.encode_batch(texts_of(texts, "text"))]

    def close(self) -> None:
        if self.own:
            self.embedder.close()


def texts_of(array: np.ndarray, name: str) -> list[str]:
    """The texts of a tensor. Raises ApiError for none, an empty one, or bytes that are none."""
    if not len(array):
        raise ApiError(400, f"{name} is empty", name)
    try:
        given = [text.decode() for text in array]
    except UnicodeDecodeError:
        raise ApiError(400, f"{name} is no UTF-8", name) from None
    if "" in given:
        raise ApiError(400, f"{name} has an empty element", name)
    return given


class Embedding(Once):
    """A request for embeddings."""

    def __init__(self, encoder: Encoder, prompts: list[list[int]], timeout: float | None) -> None:
        super().__init__(lambda: encoder.embed(prompts), timeout)
        self.prompt_tokens = sum(map(len, prompts))

    def end(self, outcome: str) -> Usage:
        return Usage(self.prompt_tokens if outcome == "ok" else 0, outcome=outcome)
