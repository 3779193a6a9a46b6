"""What can run a step's batch, one file each: plain PyTorch (the reference), C on a CPU, Triton on a GPU.

All of them hold one model and one paged cache, and are held to the reference in the tests.
"""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from soma.base.errors import UserError
from soma.engine.backends.reference import ReferenceModel
from soma.engine.batch import Batch
from soma.engine.native import NativeModel
from soma.engine.paged import PagedCache
from soma.model.transformer import Transformer

BACKENDS = ("auto", "native", "triton", "reference")


class Backend(Protocol):
    """One model over one paged cache. For use under `torch.inference_mode()`, one step at a time."""

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        ...


def why_not(name: str, model: Transformer, cache_dtype: torch.dtype | None = None) -> str | None:
    """Why a backend cannot run this model (over a cache of that dtype; None: the model's); None if it can."""
    if name == "native":
        if cache_dtype not in (None, model.dtype, torch.int8):
            return f"the cache is {cache_dtype}"
        return NativeModel.supports(model)
    if name == "triton":
        if find_spec("triton") is None:
            return "triton is not installed (the gpu extra has it)"
        from soma.engine.backends.triton import TritonModel

        if cache_dtype == torch.int8:
            return "its kernels read no int8 cache"
        return TritonModel.supports(model)
    return None


def make_backend(
    name: str, model: Transformer, cache: PagedCache, graphs: tuple[int, int] | None = None
) -> tuple[Backend, str, str | None]:
    """The backend of that name ("auto": the fastest that can), its own name, and why it is the reference, if it is.

    graphs: most sequences of a decode step and most tokens of each, where such steps should become CUDA graphs.
    Raises UserError for a name that is unknown, or that cannot run this model.
    """
    if name not in BACKENDS:
        raise UserError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name in ("native", "triton") and (reason := why_not(name, model, cache.dtype)) is not None:
        raise UserError(f"backend {name!r} cannot run this model: {reason}")
    reason = None
    if name == "auto":
        name = "triton" if model.device.type == "cuda" else "native"
        if (reason := why_not(name, model, cache.dtype)) is not None:
            name = "reference"
    if name == "native":
        scales = (cache.key_scales, cache.value_scales)
        return NativeModel(model, cache.keys, cache.values, cache.block_size, *scales), name, None
    if name == "triton":
        from soma.engine.backends.triton import TritonModel

        return TritonModel(model, cache, graphs if model.device.type == "cuda" else None), name, None
    return ReferenceModel(model, cache), name, reason
