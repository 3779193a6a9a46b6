"""When training runs our FlashAttention in place of SDPA, and the document starts that it takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from soma.model.kernels.flash import flash_attention


class Packed(NamedTuple):
    """Stands where a mask would: documents one after the other in the flattened batch, none longer than max_length."""

    starts: Tensor
    max_length: int


@torch.compiler.disable
def pack(tokens_BT: Tensor, document_ids_BT: Tensor | None) -> Packed:
    """Starts of the runs of equal document ids in each row (padding is a run too); of the rows without ids.

    The count is padded to a power of two with empty documents, so that compiled code meets few different shapes.
    """
    B, T = tokens_BT.shape
    if document_ids_BT is None:
        return Packed(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=tokens_BT.device), T)
    first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    begins = first_BT.flatten().nonzero().flatten().int()
    count = 1 << (len(begins) - 1).bit_length()
    starts = torch.full((count + 1,), B * T, dtype=torch.int32, device=tokens_BT.device)
    starts[: len(begins)] = begins
    return Packed(starts, T)


def attend_packed(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, packed: Packed, window: int | None) -> Tensor:
    """Causal attention within documents, (B, T, H·E)."""
    B, _, T, _ = q_BHTE.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
    return flash_attention(q, k, v, *packed, window=window).view(B, T, -1)
