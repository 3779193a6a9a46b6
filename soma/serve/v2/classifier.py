"""A model that classifies texts, or pairs of them: texts in, a score for each class out."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from soma.model.tokenizer import Tokenizer
from soma.serve.calls import Usage
from soma.serve.errors import ApiError
from soma.serve.pairs import encode_pairs
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.encoder import texts_of
from soma.serve.v2.model import Job, Once, Options, TensorSpec, V2Model


class Scores(Protocol):
    """The part of `soma.engine.embed.Classifier` that is needed; an engine process has it too."""

    @property
    def labels(self) -> list[str]: ...

    @property
    def max_length(self) -> int: ...

    def submit(self, prompts: Any, firsts: Any = None) -> "Future[np.ndarray]": ...

    def close(self) -> None: ...


class Classifier(V2Model):
    """`text`, and perhaps `text_pair` (BYTES, [N]) to `scores` (FP32, [N, L]); the classification extension names the
    classes. A single text that is too long is refused, a pair is cut."""

    platform = "soma_classifier"
    inputs = (TensorSpec("text", "BYTES", (-1,)), TensorSpec("text_pair", "BYTES", (-1,), optional=True))

    def __init__(
        self, classifier: Scores, tokenizer: Tokenizer, alive: Callable[[], bool] = lambda: True, *, own: bool = True,
    ) -> None:  # fmt: skip
        """alive: whether the process that computes is there. own: the classifier is closed with the model."""
        self.classifier, self.tokenizer, self.alive, self.own = classifier, tokenizer, alive, own
        self.labels: Sequence[str] = classifier.labels
        self.outputs = (TensorSpec("scores", "FP32", (-1, len(self.labels))),)

    @property
    def ready(self) -> bool:
        return self.alive()

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """Scores, (N, L) float32."""
        return await self.scores(*await asyncio.to_thread(self.encode, tensors))

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """As `infer`, with the tokens counted."""
        prompts, firsts = await asyncio.to_thread(self.encode, tensors)
        return Classification(self, prompts, firsts, options.timeout)

    async def scores(self, prompts: list[list[int]], firsts: list[int] | None) -> Tensors:
        """Of lists of ids."""
        return {"scores": await asyncio.wrap_future(self.classifier.submit(prompts, firsts))}

    def encode(self, tensors: Tensors) -> tuple[list[list[int]], list[int] | None]:
        """Ids with the special tokens around them. Raises ApiError."""
        texts = texts_of(tensors["text"], "text")
        if "text_pair" not in tensors:
            return [found.ids for found in self.tokenizer.inner.encode_batch(texts)], None
        others = texts_of(tensors["text_pair"], "text_pair")
        if len(others) != len(texts):
            raise ApiError(400, f"text has {len(texts)} elements and text_pair {len(others)}", "text_pair")
        pairs = list(zip(texts, others, strict=True))
        return encode_pairs(self.tokenizer.inner, pairs, self.classifier.max_length)

    def close(self) -> None:
        if self.own:
            self.classifier.close()


class Classification(Once):
    """A request for scores."""

    def __init__(
        self, model: Classifier, prompts: list[list[int]], firsts: list[int] | None, timeout: float | None
    ) -> None:  # fmt: skip
        super().__init__(lambda: model.scores(prompts, firsts), timeout)
        self.prompt_tokens = sum(map(len, prompts))

    def end(self, outcome: str) -> Usage:
        return Usage(self.prompt_tokens if outcome == "ok" else 0, outcome=outcome)
