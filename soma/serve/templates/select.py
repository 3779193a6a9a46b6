"""Which examples a prompt shows: all, some by seed, or those nearest to the question."""

import json
import os
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import numpy as np

from soma.serve.templates.config import EncoderConfig, Examples, PromptError

TIMEOUT = 10.0  # seconds for the encoder
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]


def choose(shots: Examples, question: str | None, vectors: np.ndarray | None, embed: Embed | None) -> list[int]:
    """Places of the examples in the order in which they are shown.

    vectors: [examples, width], of `nearest`. Those nearest by cosine are shown with the nearest last, beside the
    question (Liu et al. 2022, arXiv:2101.06804); of two that are as near, the earlier in the file counts as nearer.
    """
    count = len(shots.items) if shots.count is None else min(shots.count, len(shots.items))
    if shots.select == "fixed":
        return list(range(count))
    if shots.select == "random":
        return random.Random(shots.seed).sample(range(len(shots.items)), count)
    assert question is not None
    assert vectors is not None
    assert embed is not None
    likeness = unit(vectors) @ unit(np.asarray(embed([question]), dtype=np.float64))[0]
    nearest = np.argsort(-likeness, kind="stable")[:count]
    return [int(place) for place in nearest[::-1]]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


class HttpEncoder:
    """Embeddings by POST /embeddings, as OpenAI's."""

    def __init__(self, config: EncoderConfig) -> None:
        """Raises PromptError: its key is not set."""
        self.config = config
        if config.key_env is not None and not os.environ.get(config.key_env):
            raise PromptError(f"encoder {config.url}: the environment variable {config.key_env} is not set")

    def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """A vector for each text. Raises PromptError 503."""
        body = json.dumps({"model": self.config.model, "input": list(texts)}).encode()
        headers = {"Content-Type": "application/json"}
        if self.config.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.config.key_env]}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(self.config.url.rstrip("/") + "/embeddings", body, headers)
        try:
            with direct.open(asked, timeout=TIMEOUT) as answer:
                rows = sorted(json.load(answer)["data"], key=lambda row: row["index"])
            vectors = [row["embedding"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            raise PromptError(f"the encoder {self.config.url} does not answer ({why})", status=503) from error
        if len(vectors) != len(texts):
            raise PromptError(f"the encoder {self.config.url} gave {len(vectors)} vectors for {len(texts)} texts",
                              status=503)  # fmt: skip
        return vectors
