"""The matmul peak of this machine: what MFU is measured against."""

import time

import torch

SIZE = {"cpu": 1024, "cuda": 8192}
BUDGET = 0.3  # seconds of measuring
_measured: dict[tuple[str, torch.dtype, int], float] = {}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product seen in some 0.3 s, measured once per device, dtype and thread count.

    A product of two (n, n) matrices counts 2n³. The sizes (1024 on a CPU, 8192 on a GPU) are where this machine's curve
    is flat. Best of several, since neighbours only ever slow it down.
    """
    key = (str(device), dtype, torch.get_num_threads())
    if key not in _measured:
        _measured[key] = _measure(device, dtype)
    return _measured[key]


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    n = SIZE.get(device.type, 1024)
    generator = torch.Generator(device=device).manual_seed(0)  # a generator of its own: the run's random state stays
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    _wait(device)
    best, deadline = float("inf"), time.perf_counter() + BUDGET
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
