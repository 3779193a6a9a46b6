"""Online softmax (arXiv:1805.02867), the recurrence that every attention kernel here runs tile by tile."""

from collections.abc import Iterable

import torch
from torch import Tensor


def online_attention(tiles: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """softmax(scores) · values and the scores' logsumexp, from tiles of scores (M, N) and values (N, E).

    Three things are kept for each row: the peak (largest score so far), the total of exp(score - peak), and the sum of
    values so weighted. When a tile raises the peak, total and sum shrink by exp(old peak - new peak); the division
    comes once, at the end. Rows whose scores are all -inf so far keep a total of 0.

    Scores [1, 3 | 0, 2] in two tiles with values [1,0], [0,2] | [-1,1], [3,1]: after the first tile the peak is 3, the
    total 1 + e^-2 = 1.1353, the sum [0.1353, 2]; after the second 1.5530 and [0.1353 - 0.0498 + 1.1036, 2 + 0.4177]
    = [1.1892, 2.4177]; divided: [0.76573417, 1.55676994].
    """
    peak: Tensor | None = None
    for scores_MN, values_NE in tiles:
        if peak is None:
            peak = torch.full_like(scores_MN[:, 0], -torch.inf)
            total, sum_ME = torch.zeros_like(peak), scores_MN.new_zeros(scores_MN.size(0), values_NE.size(1))
        new_peak = torch.maximum(peak, scores_MN.amax(1))
        shift = torch.where(new_peak == -torch.inf, 0.0, new_peak)  # -inf - -inf would be NaN
        weights_MN = torch.exp(scores_MN - shift[:, None])
        shrink = torch.exp(peak - shift)
        total = total * shrink + weights_MN.sum(1)
        sum_ME = sum_ME * shrink[:, None] + weights_MN @ values_NE
        peak = new_peak
    assert peak is not None, "no tiles"
    return sum_ME / total[:, None], peak + total.log()
