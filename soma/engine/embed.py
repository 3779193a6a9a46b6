"""Embeddings: one unit vector per text, from a decoder's or an encoder's hidden states.

Shape letters: B texts, T tokens, D model width.
"""

from collections.abc import Sequence
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
    """The embedder of an encoder's folder; arguments as for `load_engine`. Raises UserError."""
    model = load_encoder(directory, choose_dtype(precision), choose_device(device))
    if precision == "auto" and model.device.type == "cpu" and not native_bf16():
        model = model.to(torch.float32)
    return Embedder(model, directory)


class Embedder:
    """Turns lists of ids into unit vectors.

    Pooling: what the folder says, else the mean over the tokens for an encoder, the last token for a decoder (the one
    that has seen the whole text). `embed` runs in the caller's thread, `submit` on one of its own.
    """

    def __init__(self, model: Transformer | Encoder, directory: Path, *, max_length: int | None = None) -> None:
        self.model, self.config = model, model.config
        self.is_encoder = isinstance(model, Encoder)
        self.pooling = read_pooling(directory, "mean" if self.is_encoder else "last")
        context = self.config.max_position_embeddings
        self.max_length = min(max_length or context, context)
        self.dimensions = self.config.hidden_size
        self.pool = ThreadPoolExecutor(1, "soma-embed")

    def check(self, ids: Sequence[int]) -> None:
        """Raises RequestError that names `input` for ids that cannot be embedded."""
        check_embeddable(ids, self.config.vocab_size, self.max_length)

    def submit(self, prompts: Sequence[Sequence[int]]) -> "Future[np.ndarray]":
        """`embed` later, after those before. Raises RequestError, QueueFullError."""
        for ids in prompts:
            self.check(ids)
        if (waiting := self.pool._work_queue.qsize()) >= MAX_WAITING:
            raise QueueFullError(waiting, retry_after=1)
        return self.pool.submit(self.embed, prompts)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Unit vectors (len(prompts), D), float32, in the order of the prompts. Raises RequestError."""
        for ids in prompts:
            self.check(ids)
        vectors = np.empty((len(prompts), self.dimensions), dtype=np.float32)
        for places in batches([len(ids) for ids in prompts]):
            x_BD = self._pooled([prompts[place] for place in places])
            vectors[places] = torch.nn.functional.normalize(x_BD.float(), dim=-1).cpu().numpy()
        return vectors

    def _pooled(self, texts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, texts))
        tokens_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=self.model.device)
        lengths_B = torch.tensor([len(ids) for ids in texts], device=self.model.device)
        keep_BT = torch.arange(longest, device=self.model.device) < lengths_B[:, None]
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
