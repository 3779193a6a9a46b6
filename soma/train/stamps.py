"""The stamps of a step's tokens: what names them to dropout under every layout (`soma.model.dropout`).

Letters: B rows of a rank, T positions.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from soma.data.loader import Batch, PreferenceBatch
from soma.model.dropout import FIRST, GAMMA, SECOND
from soma.model.lora import lora_layers


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training drops anything."""
    return any(layer.dropout > 0 for layer in lora_layers(model).values())


def stamp(batch: Batch | PreferenceBatch, seed: int, step: int, data_rank: int) -> Any:
    """A rank's batch, as its loader gives it, with the stamps of its tokens.

    Rows are counted over the batches of all data ranks, which have as many each; the two answers of a preference pair
    are two rows.
    """
    if isinstance(batch, PreferenceBatch):
        rows = 2 * own_rows(len(batch.is_pair), data_rank)
        chosen, rejected = (with_stamps(side, seed, step, rows + number)
                            for number, side in enumerate((batch.chosen, batch.rejected)))  # fmt: skip
        return replace(batch, chosen=chosen, rejected=rejected)
    return with_stamps(batch, seed, step, own_rows(len(batch.tokens), data_rank))


def own_rows(count: int, data_rank: int) -> np.ndarray:
    return data_rank * count + np.arange(count)


def with_stamps(batch: Batch, seed: int, step: int, rows: np.ndarray) -> Batch:
    return replace(batch, stamps=stamps(seed, step, rows, batch.tokens.shape[1]))


def stamps(seed: int, step: int, rows: np.ndarray, length: int) -> np.ndarray:
    """(B, T), int64: seed, step, row and column, one after the other put into SplitMix64."""
    state = next_word(np.zeros(1, np.uint64), np.array([seed]))
    state_B = next_word(next_word(state, np.array([step])), rows)
    return next_word(state_B[:, None], np.arange(length)).view(np.int64)


def next_word(state: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Word `number`, from 0, of the generator with this seed; uint64, in arithmetic that wraps."""
    z = state + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))
