"""A step's batch as one message to the other ranks, and cut into microbatches for the stages of a pipeline.

A message is one int32 vector: S, T, B, R, block size, then tokens, positions, query starts, lengths, tables, slots and
rows (`soma.engine.batch` has the letters). Slots fit: a cache of 2^31 tokens is beyond any machine of today.
"""

import numpy as np
import torch
from torch import Tensor

from soma.engine.batch import Batch

HEAD = 5


def pack(batch: Batch) -> np.ndarray:
    """The message, int32. One copy from the device. Adapters are for models in one process."""
    assert not batch.adapters
    tensors = (
        batch.tokens_T, batch.positions_T, batch.query_starts_S1, batch.lengths_S, batch.tables_SB.flatten(),
        batch.slots_T, batch.logit_rows_R,
    )  # fmt: skip
    body = torch.cat([tensor.to(torch.int32) for tensor in tensors]).cpu().numpy()
    S, B = batch.tables_SB.shape
    head = (S, batch.num_tokens, B, len(batch.logit_rows_R), batch.block_size)
    return np.concatenate([np.asarray(head, dtype=np.int32), body])


def unpack(message: np.ndarray, parts: int, device: torch.device) -> list[Batch]:
    """The batch again, as at most `parts` microbatches of whole sequences and about equally many tokens."""
    S, T, B, R, block_size = message[:HEAD].tolist()
    sizes = (T, T, S + 1, S, S * B, T, R)
    fields = np.split(message[HEAD:], np.cumsum(sizes)[:-1])
    tokens_T, positions_T, starts_S1, lengths_S, tables, slots_T, rows_R = fields
    tables_SB = tables.reshape(S, B)

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

    made = []
    for first, end in ranges(starts_S1, parts):
        low, high = int(starts_S1[first]), int(starts_S1[end])
        longest = int(lengths_S[first:end].max())
        blocks = -(-longest // block_size)
        rows = rows_R[(rows_R >= low) & (rows_R < high)] - low
        part = Batch(
            put(tokens_T[low:high], torch.int64), put(positions_T[low:high], torch.int64),
            put(starts_S1[first : end + 1] - low, torch.int32), put(lengths_S[first:end], torch.int32),
            put(tables_SB[first:end, :blocks], torch.int32), put(slots_T[low:high], torch.int64),
            put(rows, torch.int64), block_size, int(np.diff(starts_S1[first : end + 1]).max()), longest,
        )  # fmt: skip
        made.append(part)
    return made


def ranges(starts_S1: np.ndarray, parts: int) -> list[tuple[int, int]]:
    """Sequences first to end (not included) of each of at most `parts` parts, none of them empty.

    Worked: sequences of 6, 1, 1 and 4 tokens in two parts are (0, 1) and (1, 4).
    """
    total, made, first = int(starts_S1[-1]), [], 0
    for part in range(1, parts + 1):
        nearest = int(np.abs(starts_S1 - total * part / parts).argmin())
        if nearest > first:
            made.append((first, nearest))
            first = nearest
    return made
