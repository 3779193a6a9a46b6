"""How the attention kernels are launched: tile sizes, and which of several is the fastest on this GPU."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    """Rows (queries) and columns (keys) that one program holds at once, its warps and its pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def unsupported(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels do not take heads of this width and dtype; None where they do."""
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head width {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype} is not float16, bfloat16 or float32"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter does not compute in bfloat16"
    return None


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels may begin while the one before them ends (programmatic dependent launch): Hopper or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def tuned(kernel: Any, tiles: tuple[Tile, ...], key: tuple[str, ...]) -> Any:
    """The kernel with Triton's autotuner around it: measured once for every value of the arguments named in `key`."""
    configs = [
        triton.Config({"BLOCK_M": tile.rows, "BLOCK_N": tile.columns}, num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles
    ]

    def bench(call: Callable[[], object], quantiles: list[float]) -> Any:
        return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)

    return triton.autotune(configs=configs, key=list(key), do_bench=bench)(kernel)


def launch(
    kernel: Any, grid: Callable[[dict[str, Any]], tuple[int, ...]], tiles: tuple[Tile, ...], key: tuple[str, ...],
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    """Run `kernel` with the fastest of `tiles` (there is nothing to choose under the interpreter or from one)."""
    if len(tiles) > 1 and not INTERPRETED:
        tuned(kernel, tiles, key)[grid](**arguments)
        return
    tile = tiles[0]
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
    kernel[grid(blocks)](**arguments, **blocks, num_warps=tile.warps, num_stages=tile.stages)
