"""Linear layers with weights of 8 or 4 bits, and rounding of a loaded model to them.

Shape letters: N rows (outputs), K columns (inputs), G groups of 32 columns, B blocks of 16 rows.

A weight is value · scale, with a scale for each group of columns of a row. What is stored is laid out for the CPU
kernels (`soma/engine/csrc/quantized.h`); everywhere else the layer multiplies with what `dequantize` gives.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.transformer import Transformer

GROUP = 32  # columns that share a stored scale
BLOCK = 16  # rows that lie together
LOWEST = {8: -128, 4: -8}


def pack(values_NK: Tensor, bits: int) -> Tensor:
    """Integers (N, K), int8 in -128…127 or -8…7, as uint8 (B, G, 64·bits).

    In a group of a block lie eight vectors of 16 rows x 4 columns, unsigned (value + 128, or value + 8). Of 4-bit
    vectors two share their bytes: the first is the low half. Missing rows and columns are 0.
    """
    N, K = values_NK.shape
    padded = F.pad(values_NK.to(torch.int16), (0, -K % GROUP, 0, -N % BLOCK)) - LOWEST[bits]
    steps = padded.to(torch.uint8).view(padded.size(0) // BLOCK, BLOCK, -1, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        steps = steps[:, :, 0::2] | (steps[:, :, 1::2] << 4)
    return steps.flatten(2).contiguous()


def unpack(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 (N, K)."""
    B, G, _ = packed.shape
    steps = packed.view(B, G, -1, BLOCK, 4)
    if bits == 4:
        steps = torch.stack([steps & 15, steps >> 4], dim=3).flatten(2, 3)
    values = steps.permute(0, 3, 1, 2, 4).reshape(B * BLOCK, G * GROUP).to(torch.int16) + LOWEST[bits]
    return values[:rows, :columns].to(torch.int8)


def round_to_nearest(weight_NK: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Values (N, K) int8 and scales (N, ⌈K/group⌉) float16 of each group's nearest multiples of its scale.

    8 bits: scale = largest magnitude / 127. 4 bits: the number of largest magnitude becomes -8, as in llama.cpp's
    Q4_0, so all 16 values are used; the scale may be negative. Worked: [-4, 1, 2] in 4 bits has scale 0.5 and values
    [-8, 2, 4]. Values are rounded with the scale that is stored.
    """
    N, K = weight_NK.shape
    groups = F.pad(weight_NK.detach().float(), (0, -K % group)).view(N, -1, group)
    if bits == 8:
        scale = groups.abs().amax(-1) / 127
    else:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scale = extreme / -8
    scale = scale.clamp(-65504, 65504).half()
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    high = -LOWEST[bits] - 1
    values = (groups * inverse[..., None]).round().clamp(-127 if bits == 8 else -8, high)
    return values.to(torch.int8).view(N, -1)[:, :K], scale


class QuantizedLinear(nn.Module):
    """x Wᵀ + bias with W in 8 or 4 bits.

    `packed` and `scales` (B, G, 16) float16 are its memory: 8.5 or 4.5 bits a weight.
    """

    packed: Tensor
    scales: Tensor

    def __init__(
        self, values_NK: Tensor, scales_NG: Tensor, bits: int, bias: Tensor | None = None, group: int = GROUP
    ) -> None:
        """values_NK: integers. scales_NG: one for each `group` (a multiple of 32, or all K) columns of a row.

        Raises UserError for other bits or groups.
        """
        super().__init__()
        self.out_features, self.in_features = values_NK.shape
        self.bits, self.group = bits, group
        if bits not in LOWEST:
            raise UserError(f"weights of {bits} bits: expected 8 or 4")
        if group % GROUP and group != self.in_features:
            raise UserError(f"groups of {group} weights: expected a multiple of {GROUP}, or whole rows")
        assert scales_NG.shape == (self.out_features, -(-self.in_features // group))
        fine = scales_NG.repeat_interleave(-(-group // GROUP), dim=1)[:, : -(-self.in_features // GROUP)]
        fine = F.pad(fine.half(), (0, 0, 0, -self.out_features % BLOCK))
        blocks = fine.view(-1, BLOCK, fine.size(1)).transpose(1, 2).contiguous()
        self.register_buffer("packed", pack(values_NK, bits))
        self.register_buffer("scales", blocks)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls, weight_NK: Tensor, bits: int, bias: Tensor | None = None, group: int = GROUP
    ) -> "QuantizedLinear":
        """A weight rounded to the nearest."""
        return cls(*round_to_nearest(weight_NK, bits, group), bits, bias, group)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)  # whatever dtype the model is cast to
        return self

    def keep(self, dimension: int, start: int, size: int) -> None:
        """Keep some outputs (0) or some inputs (1) of the weight, in place: the same numbers, not rounded anew.

        The bias is left alone. Raises UserError for inputs that do not end where groups do.
        """
        if dimension == 1 and (start % GROUP or size % GROUP):
            raise UserError(
                f"{self.in_features} inputs of a layer rounded in groups of {GROUP} cannot be cut into pieces of "
                f"{size}: take fewer pieces, so that each is a multiple of {GROUP}, or weights that are not rounded"
            )
        part = [slice(None), slice(None)]
        part[dimension] = slice(start, start + size)
        values_NK = unpack(self.packed, self.bits, self.out_features, self.in_features)[part[0], part[1]]
        columns = slice(start // GROUP, (start + size) // GROUP) if dimension else slice(None)
        scales_NG = self.scales.transpose(1, 2).flatten(0, 1)[: self.out_features][part[0], columns]
        kept = QuantizedLinear(values_NK, scales_NG, self.bits, group=GROUP)
        self.packed, self.scales = kept.packed, kept.scales
        self.out_features, self.in_features = kept.out_features, kept.in_features

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) in float32, for who needs it as a matrix (MLA)."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K)."""
        values = unpack(self.packed, self.bits, self.out_features, self.in_features).to(dtype)
        scales = self.scales.transpose(1, 2).flatten(0, 1)[: self.out_features].to(dtype)
        return values * scales.repeat_interleave(GROUP, dim=1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


@torch.no_grad()
def quantize(
    model: Transformer, bits: int, group: int = GROUP, head_bits: int | None = None, *, head: bool = True,
    fetch: Callable[[str], Tensor] | None = None,
) -> Transformer:  # fmt: skip
    """Round every linear layer of a model to the nearest, in place, for inference; before `Transformer.fuse`.

    The embedding stays as it is; where lm_head is tied to it, lm_head becomes a rounded copy (in `head_bits`, by
    default `bits`; `head` False: a stage of a pipeline that has none). `fetch` brings weights by name, where the model
    has no memory (meta device): one at a time is whole. Raises UserError for bits or groups that are not there.
    """
    model.eval().requires_grad_(False)
    for path, child in list(model.layers.named_modules(prefix="layers")):
        if isinstance(child, nn.Linear):
            weight_NK = child.weight if fetch is None else fetch(f"{path}.weight").to(child.weight.dtype)
            parent, _, name = path.rpartition(".")
            rounded = QuantizedLinear.from_weight(weight_NK, bits, child.bias, group)
            setattr(model.get_submodule(parent), name, rounded)
    if head:
        rows = model.embed_tokens if model.lm_head is None else model.lm_head
        rounded = QuantizedLinear.from_weight(rows.weight, head_bits or bits, None, group)
        model.lm_head = rounded  # type: ignore[assignment]
    return model
