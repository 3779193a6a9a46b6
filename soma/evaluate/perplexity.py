"""Held-out bits per byte and perplexity: every token of every document scored once, in a sliding window.

The convention. A document is tokenized whole, without special tokens, and stands alone: before its first token there is
one separator (the bos token, or the eos token where there is none), from which the first token is predicted, so that
every byte of the text is paid for. The end of the document is not, nor is it by the compressors that we compare with.
A window holds `sequence_length` input tokens and moves by `stride`; the tokens scored in a later window have at least
`sequence_length - stride` tokens of context. Positions begin at 0 in each window. Log-softmax is taken in fp32.

Shape letters: B windows, T tokens, D model width, N scored tokens, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch

from soma.base import progress
from soma.base.errors import UserError
from soma.model.transformer import Transformer

LONGEST_DEFAULT = 2048  # default window of models that were made for more
LOGITS_AT_ONCE = 1 << 24  # numbers of the logits that are held at a time (64 MiB in fp32)
LEVEL = 0.95  # of the bootstrap interval


class Tokenizer(Protocol):
    """The part of `soma.model.tokenizer.Tokenizer` that scoring needs."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode_batch(self, texts: list[str], as_text: bool = False) -> list[list[int]]: ...


@dataclass(frozen=True)
class Score:
    """One document's score: `ids` (n, uint32), the natural `logprobs` (n, float32) of each, UTF-8 bytes of its text."""

    ids: np.ndarray
    logprobs: np.ndarray
    n_bytes: int

    @property
    def nats(self) -> float:
        """What the whole text costs: minus the sum of its log-probabilities, summed in float64."""
        return -float(self.logprobs.sum(dtype=np.float64))


@dataclass(frozen=True)
class Window:
    """Inputs `start`…`stop`-1 of a sequence; the targets `first`…`stop` are scored, input i predicts target i+1."""

    sequence: int
    start: int
    stop: int
    first: int


def to_bits_per_byte(nats: float, n_bytes: int) -> float:
    """nats / ln 2 / bytes. Worked number: 1,000 tokens at 2 nats for 4,000 bytes are 0.7213 bits per byte."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def to_perplexity(nats: float, tokens: int) -> float:
    """exp(nats / tokens). Worked number: 1,000 tokens for 2,000 nats have perplexity 7.389."""
    return math.exp(min(nats / tokens, 700.0)) if tokens else math.nan


def separator_id(tokenizer: Tokenizer) -> int:
    """The token before a document's first: bos, or eos where there is none. UserError for a tokenizer with neither."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if tokenizer.eos_ids:
        return tokenizer.eos_ids[0]
    raise UserError(
        "the tokenizer has neither a bos nor an eos token, from which a document's first token would be predicted; "
        "name one in tokenizer_config.json"
    )


def window_settings(model: Transformer, sequence_length: int | None, stride: int | None) -> tuple[int, int]:
    """(sequence_length, stride) with their defaults. UserError for a window that the model was not made for."""
    limit = model.config.max_position_embeddings
    length = sequence_length or min(limit, LONGEST_DEFAULT)
    if length > limit:
        raise UserError(
            f"evaluate.sequence_length is {length}, but the model was made for {limit} tokens (max_position_embeddings)"
        )
    step = stride or max(1, length // 2)
    if step > length:
        raise UserError(
            f"evaluate.stride ({step}) is longer than the window ({length} tokens): tokens would be left out"
        )
    return length, step


def windows_of(sequence: int, targets: int, length: int, stride: int) -> list[Window]:
    """The windows that score targets 1…`targets` once each. Of 10 targets, length 6, stride 3: 1-6, 7-9, 10."""
    found: list[Window] = []
    stop = 0
    while stop < targets:
        first = stop + 1
        stop = min(length if stop == 0 else stop + stride, targets)
        found.append(Window(sequence, max(0, stop - length), stop, first))
    return found


@torch.inference_mode()
def token_logprobs(
    model: Transformer, sequences: Sequence[np.ndarray], *, length: int, stride: int, batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[np.ndarray]:  # fmt: skip
    """Natural log-probabilities (n-1, float32) of all tokens but the first of each sequence of n ids.

    Windows of like length share a batch; shorter ones are padded behind, where causal attention does not look. The
    batches depend on the sequences and the arguments alone. Raises UserError for ids that the model does not have.
    """
    model.eval()
    check_ids(model, sequences)
    found = [np.zeros(max(len(ids) - 1, 0), np.float32) for ids in sequences]
    windows = [w for index, ids in enumerate(sequences) for w in windows_of(index, len(ids) - 1, length, stride)]
    windows.sort(key=lambda w: (w.start - w.stop, w.sequence, w.start))
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size]
        longest = max(w.stop - w.start for w in batch)
        tokens_BT = np.zeros((len(batch), longest), np.int64)
        targets_BT = np.full((len(batch), longest), -1, np.int64)
        for row, w in enumerate(batch):
            ids = sequences[w.sequence]
            tokens_BT[row, : w.stop - w.start] = ids[w.start : w.stop]
            targets_BT[row, w.first - 1 - w.start : w.stop - w.start] = ids[w.first : w.stop + 1]
        scored = iter(_score_batch(model, tokens_BT, targets_BT))
        for w in batch:
            found[w.sequence][w.first - 1 : w.stop] = [next(scored) for _ in range(w.first, w.stop + 1)]
        advance(sum(w.stop + 1 - w.first for w in batch))
    return found


def _score_batch(model: Transformer, tokens_BT: np.ndarray, targets_BT: np.ndarray) -> list[float]:
    """Log-probabilities (N) of the targets that are not -1, in row-major order. The head runs on those alone."""
    x_BTD, _ = model.features(torch.from_numpy(tokens_BT).to(model.device))
    targets = torch.from_numpy(targets_BT).to(model.device)
    x_ND, targets_N = x_BTD[targets >= 0], targets[targets >= 0]
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    found: list[float] = []
    for start in range(0, len(targets_N), rows):
        logits_NV = model.logits(x_ND[start : start + rows]).float()
        chosen_N = logits_NV.gather(1, targets_N[start : start + rows, None])[:, 0]
        found += (chosen_N - logits_NV.logsumexp(1)).tolist()
    return found


def check_ids(model: Transformer, sequences: Iterable[np.ndarray]) -> None:
    """Raise UserError if a token id lies outside of the model's vocabulary."""
    largest = max((int(ids.max()) for ids in sequences if len(ids)), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"token id {largest} is outside of the model's vocabulary of {model.config.vocab_size}: the tokenizer does "
            "not belong to this model"
        )


def score_texts(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, sequence_length: int | None = None,
    stride: int | None = None, batch_size: int = 8,
) -> list[Score]:  # fmt: skip
    """Score each text as a document of its own, by the convention above."""
    length, step = window_settings(model, sequence_length, stride)
    separator = np.array([separator_id(tokenizer)], np.uint32)
    ids = [np.array(one, np.uint32) for one in tokenizer.encode_batch(list(texts), as_text=True)]
    total = sum(len(one) for one in ids)
    with progress.current().task("held-out text", total, "tokens") as task:
        logprobs = token_logprobs(
            model, [np.concatenate([separator, one]) for one in ids], length=length, stride=step,
            batch_size=batch_size, advance=task.advance,
        )  # fmt: skip
    return [Score(one, cost, len(text.encode())) for one, cost, text in zip(ids, logprobs, texts, strict=True)]


# --- Figures over documents ---


def totals(scores: Sequence[Score]) -> dict[str, Any]:
    """Documents, bytes, tokens, nats, bits per byte, perplexity per token, bytes per token of scored documents."""
    n_bytes, tokens = sum(score.n_bytes for score in scores), sum(len(score.ids) for score in scores)
    nats = sum(score.nats for score in scores)
    return {
        "documents": len(scores), "bytes": n_bytes, "tokens": tokens, "nats": nats,
        "bits_per_byte": to_bits_per_byte(nats, n_bytes), "perplexity": to_perplexity(nats, tokens),
        "bytes_per_token": n_bytes / tokens if tokens else math.nan,
    }  # fmt: skip


def bootstrap(costs: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | None:
    """95 % interval of sum(costs) / sum(sizes), documents drawn with replacement (Efron 1979, percentile method).

    None for fewer than two documents or no resamples. The draws depend on the seed alone.
    """
    if len(costs) < 2 or not resamples:
        return None
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for index in range(resamples):
        drawn = generator.integers(0, len(costs), len(costs))
        ratios[index] = costs[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(scores: Sequence[Score], resamples: int, seed: int) -> tuple[float, float] | None:
    """95 % bootstrap interval over documents of the bits per byte."""
    whole = [score for score in scores if score.n_bytes]
    bits = np.array([score.nats / math.log(2) for score in whole])
    return bootstrap(bits, np.array([float(score.n_bytes) for score in whole]), resamples, seed)


def by_kind(scores: Sequence[Score], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`totals` for each kind of document, most bytes first."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score, kind in zip(scores, kinds, strict=True):
        groups[kind].append(score)
    found = {kind: totals(members) for kind, members in groups.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def ids_hash(ids: np.ndarray) -> str:
    """sha256 hex of token ids as little-endian uint32."""
    return sha256(ids.astype("<u4").tobytes()).hexdigest()


def all_ids_hash(scores: Iterable[Score]) -> str:
    """sha256 hex over the documents' id hashes, in order, a line each: what was scored, and in which pieces."""
    return sha256("".join(ids_hash(score.ids) + "\n" for score in scores).encode()).hexdigest()


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """`totals` of the texts; settings as for `score_texts`."""
    return totals(score_texts(model, tokenizer, texts, **settings))
