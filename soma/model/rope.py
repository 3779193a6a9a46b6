"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864) and the ways to stretch them to longer contexts.

Shape letters: B batch, T tokens, H heads, R rotary width of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from soma.model.config import ModelConfig


def default_frequencies(theta: float, width: int) -> Tensor:
    """theta^(-2i/width) for i in 0..width/2 - 1, float32."""
    return 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def llama3_frequencies(theta: float, width: int, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""
    freq = default_frequencies(theta, width)
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * freq / factor + smooth * freq
    result = torch.where(wavelength > context / low, freq / factor, freq)
    return torch.where((wavelength >= context / high) & (wavelength <= context / low), between, result)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN (arXiv:2309.00071) eq. 22: 0.1·mscale·ln(factor) + 1; 1 for factor ≤ 1. yarn_mscale(4) = 1.1386."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_frequencies(theta: float, width: int, scaling: dict[str, Any]) -> Tensor:
    """YaRN section 3.2: fast dimensions keep their frequency, slow ones are interpolated, with a ramp between."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # as in the reference: no division by zero
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    freq = default_frequencies(theta, width)
    return freq / factor * ramp + freq * (1 - ramp)


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """YaRN's factor on cos and sin: `attention_factor` if given, else from `mscale` and `mscale_all_dim` (DeepSeek)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, mscale_all = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    return yarn_mscale(factor)


class Rope(nn.Module):
    """Cosines and sines of positions. The frequencies are float32 whatever the model's dtype, and are not saved.

    `dynamic` scaling (NTK by the length of the sequence at hand) looks at the largest position of each call: keys
    that are in a cache keep the rotation they got, as in transformers. `largest`, set from outside, gives the largest
    of a number over the processes that hold the other pieces of the sequences.
    """

    inv_freq: Tensor
    largest: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.width = config.qk_rope_head_dim if config.is_mla else config.head_dim
        self.context = config.max_position_embeddings
        self.scaling = config.rope_scaling or {}
        self.rope_type = self.scaling.get("rope_type", self.scaling.get("type", "default"))
        self.attention_factor = yarn_attention_factor(self.scaling) if self.rope_type == "yarn" else 1.0
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """Inverse frequencies, float32 of shape (R/2,), on the CPU."""
        with torch.device("cpu"):
            if self.rope_type == "llama3":
                return llama3_frequencies(self.theta, self.width, self.scaling)
            if self.rope_type == "yarn":
                return yarn_frequencies(self.theta, self.width, self.scaling)
            freq = default_frequencies(self.theta, self.width)
            return freq / self.scaling["factor"] if self.rope_type == "linear" else freq

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        # A change of dtype must not round the frequencies, and to_empty() must not leave them unset.
        super()._apply(fn, recurse)
        if self.inv_freq.device.type != "meta":
            self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (..., R/2) in `dtype`, for integer positions of shape (...)."""
        inv_freq = self.inv_freq
        if self.rope_type == "dynamic":
            last = positions.max() if self.largest is None else self.largest(positions.max())
            length = torch.clamp(last + 1, min=self.context).float()
            factor = self.scaling["factor"]
            stretch = factor * length / self.context - (factor - 1)
            theta = self.theta * stretch ** (self.width / (self.width - 2))
            exponent = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
            inv_freq = 1.0 / theta**exponent
        angle = positions[..., None].float() * inv_freq
        return (angle.cos() * self.attention_factor).to(dtype), (angle.sin() * self.attention_factor).to(dtype)


def rotate(x_BHTR: Tensor, cos_T: Tensor, sin_T: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of x by the angles of (…, T, R/2) cosines and sines, which broadcast over the heads.

    A pair is (i, i + R/2); with `interleaved` it is (2i, 2i+1) and the result is in halves layout, which leaves
    every query-key product as it is (DeepSeek checkpoints).
    """
    if interleaved:
        a, b = x_BHTR[..., 0::2], x_BHTR[..., 1::2]
    else:
        a, b = x_BHTR.chunk(2, dim=-1)
    return torch.cat((a * cos_T - b * sin_T, b * cos_T + a * sin_T), dim=-1)
