"""Sampling: rows of logits of many requests → their next tokens, in one pass on the logits' device.

The order is bias, bad words, penalties (`soma.engine.adjust`), temperature, top-k, top-p, min-p; each filter sees the
distribution that the earlier ones left, renormalised. The random number of a token depends on its request's seed and
its place in the answer alone, and equal logits are ordered by id, so that the same logits give the same token whatever
else is in the batch.

Shapes: R rows, V vocabulary, F rows whose likeliest tokens are looked for, K so many of these, N rows with
log-probabilities.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from soma.engine.adjust import Row, adjust
from soma.engine.batch import to_device
from soma.engine.largest import largest
from soma.engine.params import MASK64, TokenLogprob

WIDTHS = (64, 512)  # the likeliest tokens to look for, until they decide what top-k and top-p keep; then all are sorted
CACHED = 1 << 19  # logits that a CPU works on at once: what is made of them stays in its cache, and off the page tables
CHUNK = 128  # the search for a quantile in a whole row adds up so many probabilities first
COLDEST = 1e-4  # lower temperatures would overflow
LAST_ID = 0x7FFFFFFF
GOLDEN = 0x9E3779B97F4A7C15


def sample(logits_RV: Tensor, rows: Sequence[Row]) -> list[TokenLogprob | None]:
    """The next token of every row; None where the logits hold a NaN, or leave no token to choose.

    logits_RV: any float type; not changed. Log-probabilities are those of the model's logits as they came, and NaN for
    requests that did not ask for them. One transfer from the device, a second one in the rare case that 64 tokens
    do not settle what top-k or top-p keeps.

    For speculation: a draft d_1 … d_k of a request gives the rows `Row(state, ())`, `Row(state, (d_1,))`, …,
    `Row(state, (d_1, …, d_k))` over the logits after each of these tokens. Row i then gives the very token that
    the request would have got without speculation, since its random number depends on (seed, position) alone. So a
    draft is exact if it is accepted as long as it agrees with these tokens: no other rejection rule is needed for
    drafts that are points (n-grams, greedy draft models), with penalties, filters and seeds as they are. Call
    `state.take` (`Request.accept` does) only for tokens that were accepted. `distribution` gives the same rows'
    probabilities, for rejection sampling against a draft model's distribution.
    """
    assert len(rows) == len(logits_RV)
    most = len(rows)
    if logits_RV.device.type == "cpu" and any(row.state.params.temperature > 0 for row in rows):
        most = max(1, CACHED // logits_RV.size(1))
    return [
        token for start in range(0, len(rows), most or 1)
        for token in sample_together(logits_RV[start : start + most], rows[start : start + most])
    ]  # fmt: skip


def sample_together(logits_RV: Tensor, rows: Sequence[Row]) -> list[TokenLogprob | None]:
    """`sample` of at least one row, without a bound on the memory that it takes."""
    raw_RV = logits_RV.float()
    adjusted_RV = adjust(raw_RV, rows)
    scored = [i for i, row in enumerate(rows) if row.state.params.logprobs is not None]
    random, filtered = kinds(rows)
    if len(random) + len(filtered) < len(rows):
        best_R, tokens_R = largest(adjusted_RV)
    else:
        best_R = adjusted_RV.amax(-1)
        tokens_R = torch.zeros(len(rows), dtype=torch.long, device=raw_RV.device)
    good_R = best_R.isfinite()  # a NaN carries on; minus infinity: nothing is allowed
    if random:
        tokens_R[random] = draw_whole(take(adjusted_RV, random), Settings.of([rows[i] for i in random], raw_RV.device))
    for width in (*WIDTHS, adjusted_RV.size(1)):
        short_R = torch.zeros_like(good_R)
        if filtered:
            settings = Settings.of([rows[i] for i in filtered], raw_RV.device)
            tokens_R[filtered], short_R[filtered] = draw_filtered(take(adjusted_RV, filtered), settings, width)
        alternatives = max((rows[i].state.params.logprobs or 0 for i in scored), default=0)
        parts = [tokens_R, good_R.long(), (short_R & good_R).long()]
        if scored:
            parts += logprobs(take(raw_RV, scored), tokens_R[scored], alternatives)
        tokens, good, short, *known = transfer(parts)
        filtered = np.flatnonzero(short).tolist()
        if not filtered:
            break
    found = {i: j for j, i in enumerate(scored)}
    return [
        None if not good[i]
        else TokenLogprob(int(tokens[i]), float("nan")) if i not in found
        else read_logprob(int(tokens[i]), known, found[i], row.state.params.logprobs or 0)
        for i, row in enumerate(rows)
    ]  # fmt: skip


def distribution(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The probabilities (R, V), float32, from which `sample` draws each row's token; one-hot where that is greedy.

    Rows are as for `sample`. A row with a NaN, or without a token to choose, gives NaNs.
    """
    adjusted_RV = adjust(logits_RV.float(), rows)
    best_R, tokens_R = adjusted_RV.max(-1)
    result_RV = torch.zeros_like(adjusted_RV).scatter_(1, tokens_R[:, None], 1.0)
    random, filtered = kinds(rows)
    if random:
        settings = Settings.of([rows[i] for i in random], result_RV.device)
        weights_RV = whole_weights(take(adjusted_RV, random), settings)
        result_RV[random] = weights_RV / weights_RV.sum(-1, keepdim=True)
    width = 0
    while filtered:
        width = next((one for one in WIDTHS if width < one < adjusted_RV.size(1)), adjusted_RV.size(1))
        settings = Settings.of([rows[i] for i in filtered], result_RV.device)
        weights_FK, ids_FK, short_F = candidates(take(adjusted_RV, filtered), settings, width)
        dense_FV = torch.zeros_like(adjusted_RV[filtered])
        dense_FV.scatter_(1, ids_FK, (weights_FK / weights_FK.sum(-1, keepdim=True)).float())
        result_RV[filtered] = dense_FV
        filtered = [i for i, short in zip(filtered, short_F.tolist(), strict=True) if short]
    return torch.where(best_R.isfinite()[:, None], result_RV, torch.nan)


def token_logprobs(logits_NV: Tensor, ids: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """Log-probability of `ids[n]` and of the `alternatives` likeliest tokens under row n of the logits."""
    if not ids:
        return []
    ids_N = torch.tensor(ids, dtype=torch.long).to(logits_NV.device)
    known = transfer(logprobs(logits_NV.float(), ids_N, alternatives))
    return [read_logprob(token, known, n, alternatives) for n, token in enumerate(ids)]


# Random numbers:


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: splitmix64 of both.

    Sebastiano Vigna's splitmix64, the seed mixed once so that neighbouring seeds share nothing.
    `uniform(0, 0)` is 0.8833108082136426.
    """
    return float(uniforms([seed], [position])[0])


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """`uniform` of many, float64."""
    mixed_R = _mix(np.array([seed & MASK64 for seed in seeds], dtype=np.uint64))
    steps_R = (np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    return (_mix(mixed_R + steps_R) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# Filters and draws:


class Settings(NamedTuple):
    """Columns (R, 1), float64, on the device: what the draws of R rows need of their requests."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    is_warm: bool  # any temperature but 1; this and the next on the host, to leave out what nobody needs
    any_min_p: bool
    all_top_k: bool

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "Settings":
        drawn = uniforms([row.state.seed for row in rows], [row.position for row in rows])
        params = [row.state.params for row in rows]
        columns = [(max(one.temperature, COLDEST), max(one.top_k, 0), one.top_p, one.min_p) for one in params]
        table = np.concatenate((np.array(columns, dtype=np.float64), drawn[:, None]), 1)
        temperature, top_k, top_p, min_p, uniform = to_device([table], device)[0].split(1, 1)
        return cls(
            temperature, top_k, top_p, min_p, uniform, is_warm=any(one.temperature != 1 for one in params),
            any_min_p=any(one.min_p > 0 for one in params), all_top_k=all(one.top_k > 0 for one in params),
        )  # fmt: skip


def kinds(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Rows to draw from all tokens (but for min-p), and rows that need their likeliest tokens; the rest is greedy."""
    whole: list[int] = []
    filtered: list[int] = []
    for i, row in enumerate(rows):
        params = row.state.params
        if params.temperature > 0:
            (filtered if params.top_k > 0 or params.top_p < 1 else whole).append(i)
    return whole, filtered


def take(x_RV: Tensor, places: Sequence[int]) -> Tensor:
    """These rows, without a copy if they are all."""
    return x_RV if len(places) == len(x_RV) else x_RV[list(places)]


def whole_weights(x_RV: Tensor, settings: Settings) -> Tensor:
    """exp(logits / temperature) relative to the likeliest token, float32, 0 below min-p of it."""
    weights_RV = x_RV - x_RV.amax(-1, keepdim=True)
    if settings.is_warm:
        weights_RV.div_(settings.temperature.float())
    weights_RV.exp_()
    return weights_RV.masked_fill_(weights_RV < settings.min_p.float(), 0.0) if settings.any_min_p else weights_RV


def draw_whole(x_RV: Tensor, settings: Settings) -> Tensor:
    """The token at each row's quantile, in the order of the ids: first its chunk, then its place in the chunk."""
    weights_RV = whole_weights(x_RV, settings)
    if missing := -weights_RV.size(1) % CHUNK:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, missing))
    weights_RCX = weights_RV.unflatten(1, (-1, CHUNK))
    sums_RC = weights_RCX.sum(-1).double().cumsum(-1)
    target_R1 = settings.uniform * sums_RC[:, -1:]
    chunk_R1 = pick(sums_RC, target_R1)
    before_R1 = torch.where(chunk_R1 > 0, sums_RC.gather(1, (chunk_R1 - 1).clamp(min=0)), 0.0)
    inner_RX = weights_RCX.gather(1, chunk_R1[:, :, None].expand(-1, 1, CHUNK))[:, 0].double().cumsum(-1)
    return (chunk_R1 * CHUNK + pick(inner_RX, target_R1 - before_R1))[:, 0]


def draw_filtered(x_FV: Tensor, settings: Settings, width: int) -> tuple[Tensor, Tensor]:
    """The token at each row's quantile among its `width` likeliest, likeliest first, and whether they were too few."""
    weights_FK, ids_FK, short_F = candidates(x_FV, settings, width)
    cumulative_FK = weights_FK.cumsum(-1)
    place_F1 = pick(cumulative_FK, settings.uniform * cumulative_FK[:, -1:])
    return ids_FK.gather(1, place_F1)[:, 0], short_F


def candidates(x_FV: Tensor, settings: Settings, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What top-k, top-p and min-p leave of each row's `width` likeliest tokens.

    Gives their weights (F, K) float64, 0 for what was dropped, likeliest first, equal ones by id; their ids (F, K);
    and (F) whether these K do not settle it: more would be kept, or the last one kept has equals beyond them.
    """
    width = min(width, x_FV.size(1))
    best_F1 = x_FV.amax(-1, keepdim=True)
    x_FK, ids_FK = likeliest(x_FV, width)
    cold_F1 = settings.temperature
    weights_FK = ((x_FK - best_F1).double() / cold_F1).exp()
    places_K = torch.arange(width, device=x_FV.device)
    wanted_F1 = torch.where(settings.top_k > 0, settings.top_k, x_FV.size(1))
    weights_FK = torch.where(places_K < wanted_F1, weights_FK, 0.0)
    total_F1 = weights_FK.sum(-1, keepdim=True)
    if not settings.all_top_k:
        whole_F1 = (x_FV - best_F1).div_(cold_F1.float()).exp_().sum(-1, keepdim=True).double()
        total_F1 = torch.where(settings.top_k > 0, total_F1, whole_F1)
    before_FK = weights_FK.cumsum(-1) - weights_FK
    dropped_FK = (before_FK >= settings.top_p * total_F1) & (settings.top_p < 1)
    dropped_FK |= weights_FK < settings.min_p * weights_FK[:, :1]
    weights_FK = weights_FK.masked_fill(dropped_FK, 0.0)
    last_F1 = (weights_FK > 0).sum(-1, keepdim=True).sub_(1).clamp_(min=0)
    short_F1 = (x_FK.gather(1, last_F1) == x_FK[:, -1:]) | (settings.top_k > width)
    return weights_FK, ids_FK, short_F1[:, 0] & (width < x_FV.size(1))


def likeliest(x_FV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest values of each row and their ids, by falling value, equal ones by rising id.

    One sort of 64-bit keys made of both. On a CPU NumPy does it: its sort uses vector instructions, and takes
    0.25 ms for 49,152 keys where torch takes 5.
    """
    if width < x_FV.size(1):
        x_FK, ids_FK = x_FV.topk(width, sorted=False)
    else:
        x_FK, ids_FK = x_FV, torch.arange(width, device=x_FV.device)
    bits_FK = (x_FK + 0.0).view(torch.int32).long()  # + 0.0: minus zero equals zero
    keys_FK = (flipped(bits_FK) << 32 | (LAST_ID - ids_FK)).bitwise_not_()
    if keys_FK.device.type == "cpu":
        keys_FK = torch.from_numpy(np.sort(keys_FK.numpy(), -1))
    else:
        keys_FK = keys_FK.sort(-1).values
    keys_FK = keys_FK.bitwise_not_()
    return flipped(keys_FK >> 32).int().view(torch.float32), LAST_ID - (keys_FK & 0xFFFFFFFF)


def flipped(bits: Tensor) -> Tensor:
    """A float32's bits as whole numbers of the same order, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def pick(cumulative_RK: Tensor, target_R1: Tensor) -> Tensor:
    """The first place (R, 1) whose cumulative weight is above the target, so never one of weight 0."""
    place_R1 = torch.searchsorted(cumulative_RK, target_R1, right=True)
    last_R1 = (cumulative_RK < cumulative_RK[:, -1:]).sum(-1, keepdim=True)  # rounding may reach for the total itself
    return torch.minimum(place_R1, last_R1)


# Log-probabilities:


def logprobs(logits_NV: Tensor, tokens_N: Tensor, alternatives: int) -> list[Tensor]:
    """Log-probabilities (N) of tokens; ids and log-probabilities (N, K) of the likeliest, if alternatives > 0."""
    normaliser_N1 = logits_NV.logsumexp(-1, keepdim=True)
    parts = [(logits_NV.gather(1, tokens_N[:, None]) - normaliser_N1)[:, 0]]
    if alternatives:
        values_NK, ids_NK = logits_NV.topk(min(alternatives, logits_NV.size(1)))
        parts += [ids_NK, values_NK - normaliser_N1]
    return parts


def read_logprob(token: int, known: Sequence[np.ndarray], n: int, alternatives: int) -> TokenLogprob:
    """Row n of what `logprobs` gave."""
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        _, ids, values = known
        top = tuple(zip(ids[n, :alternatives].tolist(), values[n, :alternatives].tolist(), strict=True))
    return TokenLogprob(token, float(known[0][n]), top)


def transfer(parts: Sequence[Tensor]) -> list[np.ndarray]:
    """Bring int64 and float32 tensors to the host in one transfer."""
    as_ints = [part if part.dtype == torch.int64 else part.double().view(torch.int64) for part in parts]
    whole = torch.cat([part.flatten() for part in as_ints]).cpu().numpy()
    arrays, end = [], 0
    for part in parts:
        piece = whole[end : end + part.numel()].reshape(tuple(part.shape))
        arrays.append(piece if part.dtype == torch.int64 else piece.view(np.float64))
        end += part.numel()
    return arrays
