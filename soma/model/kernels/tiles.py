"""Device functions that the attention kernels share."""

import triton
import triton.language as tl


@triton.jit
def find_document(starts, num_documents, tile, BLOCK: tl.constexpr):
    """Which document a tile of BLOCK rows belongs to, where document s owns the tiles from starts[s] // BLOCK + s on.

    That many tiles are enough for every document whatever the lengths, so the grid needs no lengths:
    total // BLOCK + num_documents programs, of which at most one a document has nothing to do.
    """
    low = 0
    high = num_documents
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_tile(
    base, first, stride, limit, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Rows first … first + BLOCK of a (…, HEAD) tensor, zero from row `limit` on and in columns beyond HEAD."""
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_E)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if HEAD != BLOCK_E:
        if MASKED:
            return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < HEAD), other=0.0)
        return tl.load(pointers, mask=columns[None, :] < HEAD, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, first, stride, limit, tile, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows of `tile` below `limit`, its first HEAD columns."""
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_E)
    mask = (rows[:, None] < limit) & (columns[None, :] < HEAD)
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible(rows, keys, length, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which of `keys` each of `rows` attends to, positions within the document; the two broadcast."""
    mask = keys < length
    if CAUSAL:
        mask = mask & (keys <= rows)
    if WINDOWED:
        mask = mask & (keys > rows - window)
    return mask


@triton.jit
def online_step(scores, peak, total, scale, MASKED: tl.constexpr):
    """One step of the online softmax (online_softmax.py) in base 2, before the values: weights, shrink, peak, total.

    `scale` holds log2(e), so that exp2 can be used; scores are not yet scaled. Without a mask the peak is finite.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    if MASKED:
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        shift = new_peak
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(peak - shift)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def key_range(
    first, length, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys that query rows first … first + BLOCK_M look at: low, full_low, full_high, high.

    Tiles of BLOCK_N in [full_low, full_high) are seen whole by every row and need no mask; [low, full_low) and
    [full_high, high) do. All but `high` are multiples of BLOCK_N.
    """
    high = length
    full_high = length // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.minimum(length, first + BLOCK_M)
        full_high = tl.minimum(full_high, (first + 1) // BLOCK_N * BLOCK_N)
    low = 0
    full_low = 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = (tl.maximum(first + BLOCK_M - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_low = tl.minimum(full_low, tl.maximum(full_high, low))
        full_high = tl.maximum(full_low, full_high)
    return low, full_low, full_high, high
