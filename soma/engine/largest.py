"""The likeliest token of each row of logits.

Shape letters: R rows, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from soma.engine.build import loaded


def largest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row (R), and the first place where it is (R), int64. A row with a NaN gives a NaN.

    On a CPU in C, where the engine's library is there: torch takes 4 ms for 64 rows of 49,152, C a fifth of that.
    """
    fits = x_RV.device.type == "cpu" and x_RV.dtype == torch.float32 and x_RV.stride() == (x_RV.size(1), 1)
    built = loaded() if fits else None
    if built is None:
        best_R, place_R = x_RV.max(-1)  # three times as fast as argmax on a CPU
        return best_R, place_R
    best_R, place_R = torch.empty(len(x_RV)), torch.empty(len(x_RV), dtype=torch.int64)
    take = built.soma_largest
    take.restype, take.argtypes = None, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 2]
    take(x_RV.data_ptr(), *x_RV.shape, best_R.data_ptr(), place_R.data_ptr())
    return best_R, place_R
