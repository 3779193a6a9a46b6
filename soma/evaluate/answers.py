"""Loss on the answers of held-out instruction pairs: what instruction tuning is for, measured.

Each conversation stands alone, from its first token; only tokens with mask 1 (the assistant's, its end of turn
included) are counted, each predicted from everything before it in the window. Conversations longer than the window
count too (`longer_than_window`). A training stage's own held-out loss is taken on fewer: its first batches, without
the conversations that do not fit its sequence length. Where both score the same conversations they agree.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.errors import UserError
from soma.data.store import TokenStore, read_index
from soma.evaluate.perplexity import bootstrap, to_perplexity, token_logprobs
from soma.model.transformer import Transformer


def read_masked(tokens: Path, split: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and masks of a split's conversations, in order; none where there is no such split.

    Raises UserError for a folder without masks, or one that is broken.
    """
    index = read_index(tokens)
    if not index["masked"]:
        raise UserError(f"{tokens}: holds plain text, not conversations with loss masks")
    if split not in index["splits"]:
        return [], []
    store = TokenStore(tokens, split)
    found = [store.gather(np.arange(start, stop)) for start, stop in pairwise(store.starts.tolist())]
    return [ids for ids, _ in found], [mask for _, mask in found]


def score_answers(
    model: Transformer, tokens: Path, *, split: str, length: int, stride: int, batch_size: int,
    resamples: int, seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Conversations, how many are longer than the window, answer tokens, nats per token with its 95 % interval,
    perplexity; None where the split is empty.

    Worked number: answers of 3 and 1 tokens that cost 2 and 4 nats are 1.5 nats per token.
    """
    ids, masks = read_masked(tokens, split)
    with progress.current().task("held-out answers", sum(len(one) for one in ids), "tokens") as task:
        logprobs = token_logprobs(
            model, ids, length=length, stride=stride, batch_size=batch_size, advance=task.advance
        )  # fmt: skip
    costs, sizes = answer_costs(logprobs, masks)
    if not sizes.sum():
        return None
    nats, count = float(costs.sum()), int(sizes.sum())
    inside = bootstrap(costs, sizes, resamples, seed)
    return {
        "conversations": len(costs), "longer_than_window": sum(len(one) > length + 1 for one in ids),
        "tokens": count, "nats_per_token": nats / count,
        "interval": list(inside) if inside else None, "perplexity": to_perplexity(nats, count),
    }  # fmt: skip


def answer_costs(logprobs: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each conversation's answers; conversations without any are left out."""
    costs, sizes = [], []
    for cost, mask in zip(logprobs, masks, strict=True):
        answer = np.asarray(mask[1:], bool)
        if answer.any():
            costs.append(-float(cost[answer].sum(dtype=np.float64)))
            sizes.append(float(answer.sum()))
    return np.array(costs), np.array(sizes)
