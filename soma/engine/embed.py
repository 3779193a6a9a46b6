"""Embeddings: one unit vector per text, from a decoder's or an encoder's hidden states. Classifiers: scores instead.

Shape letters: B texts, T tokens, D model width.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.base.machine import native_bf16
from soma.engine.check import check_embeddable
from soma.engine.errors import QueueFullError
from soma.engine.load import choose_device, choose_dtype
from soma.model.classifier import SequenceClassifier, is_classifier, load_classifier
from soma.model.encoder import Encoder, load_encoder
from soma.model.transformer import Transformer

BATCH_TOKENS = 4096  # of one forward pass, padding included
MAX_WAITING = 64  # calls that may wait
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def read_pooling(directory: Path, default: str) -> str:
    """How a folder wants its hidden states pooled (sentence-transformers' `1_Pooling/config.json`), else `default`."""
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return default
    chosen = [key for key, value in read_json(path).items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise UserError(f"{path}: pooling {', '.join(chosen) or 'none'}; supported is one of {', '.join(POOLING)}")
    return POOLING[chosen[0]]


def load_embedder(directory: Path, *, precision: str = "auto", device: str = "auto") -> "Embedder":
    """The embedder of an encoder's folder, or its classifier; arguments as for `load_engine`. Raises UserError."""
    has_head = is_classifier(directory)
    load: Callable[..., Encoder | SequenceClassifier] = load_classifier if has_head else load_encoder
    model = load(directory, choose_dtype(precision), choose_device(device))
    if precision == "auto" and choose_device(device).type == "cpu" and not native_bf16():
        model = model.to(torch.float32)
    return Classifier(model, directory) if isinstance(model, SequenceClassifier) else Embedder(model, directory)


class Embedder:
    """Turns lists of ids into unit vectors.

    Pooling: what the folder says, else the mean over the tokens for an encoder, the last token for a decoder (the one
    that has seen the whole text). `embed` runs in the caller's thread, `submit` on one of its own.
    """

    def __init__(self, model: Transformer | Encoder, directory: Path, *, max_length: int | None = None) -> None:
        self.model, self.config = model, model.config
        self.is_encoder = isinstance(model, Encoder)
        self.pooling = read_pooling(directory, "mean" if self.is_encoder else "last")
        context = model.config.max_length if isinstance(model, Encoder) else model.config.max_position_embeddings
        self.max_length = min(max_length or context, context)
        self.dimensions = self.config.hidden_size
        self.labels: list[str] = []  # a classifier has some
        self.pool = ThreadPoolExecutor(1, "soma-embed")

    def check(self, ids: Sequence[int]) -> None:
        """Raises RequestError that names `input` for ids that cannot be embedded."""
        check_embeddable(ids, self.config.vocab_size, self.max_length)

    def submit(
        self, prompts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None
    ) -> "Future[np.ndarray]":  # fmt: skip
        """`embed` later, after those before. Raises RequestError, QueueFullError."""
        for ids in prompts:
            self.check(ids)
        if (waiting := self.pool._work_queue.qsize()) >= MAX_WAITING:
            raise QueueFullError(waiting, retry_after=1)
        return self.pool.submit(self.embed, prompts, firsts)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None) -> np.ndarray:
        """Unit vectors (len(prompts), D), float32, in the order of the prompts; scores (len(prompts), labels) of a
        classifier. firsts: how many tokens of each prompt are its first text; None: all. Raises RequestError."""
        for ids in prompts:
            self.check(ids)
        vectors = np.empty((len(prompts), self.dimensions), dtype=np.float32)
        for places in batches([len(ids) for ids in prompts]):
            texts = [prompts[place] for place in places]
            x_BD = self._made(texts, None if firsts is None else [firsts[place] for place in places])
            vectors[places] = x_BD.float().cpu().numpy()
        return vectors

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T), lengths (B,), and True (B, T) where no padding is."""
        longest = max(map(len, texts))
        tokens_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=self.model.device)
        lengths_B = torch.tensor([len(ids) for ids in texts], device=self.model.device)
        return tokens_BT, lengths_B, torch.arange(longest, device=self.model.device) < lengths_B[:, None]

    def _made(self, texts: Sequence[Sequence[int]], firsts: Sequence[int] | None) -> Tensor:
        return torch.nn.functional.normalize(self._pooled(texts).float(), dim=-1)

    def _pooled(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens_BT, lengths_B, keep_BT = self._padded(texts)
        if isinstance(self.model, Encoder):
            x_BTD = self.model(tokens_BT, None if bool(keep_BT.all()) else keep_BT)
        else:  # causal: padding behind a text changes nothing in it
            x_BTD = self.model.features(tokens_BT)[0]
        if self.pooling == "first":
            return x_BTD[:, 0]
        if self.pooling == "last":
            return x_BTD[torch.arange(len(texts), device=x_BTD.device), lengths_B - 1]
        return (x_BTD.float() * keep_BT[..., None]).sum(1) / lengths_B[:, None]

    def close(self) -> None:
        """End the thread; what waits is not done."""
        self.pool.shutdown(cancel_futures=True)


class Classifier(Embedder):
    """Turns lists of ids, of one text or two each, into the scores of classes: asked as an `Embedder`."""

    def __init__(self, model: SequenceClassifier, directory: Path) -> None:
        super().__init__(model.encoder, directory)
        self.classifier, self.labels, self.dimensions = model, model.labels, len(model.labels)

    def _made(self, texts: Sequence[Sequence[int]], firsts: Sequence[int] | None) -> Tensor:
        return self.classifier.scores(self.logits(texts, firsts))

    def logits(self, texts: Sequence[Sequence[int]], firsts: Sequence[int] | None) -> Tensor:
        """(len(texts), labels) in one forward pass. A model with one kind of segment does not tell texts apart."""
        tokens_BT, _, keep_BT = self._padded(texts)
        segments_BT = None
        if firsts is not None and self.classifier.encoder.config.type_vocab_size > 1:
            firsts_B = torch.tensor(firsts, device=tokens_BT.device)
            segments_BT = (torch.arange(tokens_BT.size(1), device=tokens_BT.device) >= firsts_B[:, None]).long()
        return self.classifier(tokens_BT, None if bool(keep_BT.all()) else keep_BT, segments_BT)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of texts that go into one forward pass: similar lengths, at most BATCH_TOKENS with the padding.

    `batches([3000, 10, 2000])` is [[1, 2], [0]]: 2 · 2000 tokens fit, 3 · 3000 do not.
    """
    made: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not made or (len(made[-1]) + 1) * lengths[place] > BATCH_TOKENS:
            made.append([])
        made[-1].append(place)
    return made
