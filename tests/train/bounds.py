"""How far the parity grid lets an outcome be from that of one process."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.train.parity import Outcome


@dataclass(frozen=True)
class Bounds:
    """What a precision is held to. In fp32 only the order of sums differs. In bf16 (fp16) every rank's matrix product
    is rounded to 8 (11) bits before the sum over the ranks.

    tensor: norm of the difference of a gradient over its norm, or, of a small one, over `least` of the norm of all.
    together: the same of all gradients as one. scalar: relative difference of losses and norms. update, updates: as
    tensor and together, of what three steps have added to the weights. AdamW adds the sign of a gradient more than its
    size, and Muon's iteration lifts what is small, so that a rounding which turns a sign counts whole.
    """

    tensor: float
    least: float
    together: float
    scalar: float
    update: float
    updates: float

    def limit(self, what: str) -> float:
        """The bound of an entry of `errors`."""
        if what.endswith(" together"):
            return self.updates if what.startswith("update") else self.together
        kinds = {"loss": self.scalar, "norm": self.scalar, "held-out": 4 * self.scalar, "update,": self.update}
        return kinds.get(what.split(" ")[0], self.tensor)


BOUNDS = {
    "fp32": Bounds(2e-5, 1e-3, 1e-5, 1e-5, 5e-5, 2e-5),
    "fp16": Bounds(6e-3, 1e-2, 3e-3, 1e-3, 0.02, 0.01),
    "bf16": Bounds(4e-2, 1e-2, 3e-2, 5e-3, 0.2, 0.08),
}


def errors(ours: Outcome, expected: Outcome, bounds: str) -> dict[str, float]:
    """Relative differences by what they are of; infinity where names differ, where ranks do, or where there is nothing
    to compare with."""
    least, found = BOUNDS[bounds].least, {}
    for name, mine, theirs in (("loss", ours.losses, expected.losses), ("norm", ours.norms, expected.norms)):
        for step, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
            found[f"{name} of step {step}"] = abs(a - b) / abs(b)
    assert expected.validation is not None
    away = float("inf") if ours.validation is None else abs(ours.validation - expected.validation)
    found["held-out loss"] = away / expected.validation
    for step, (mine_, theirs_) in enumerate(zip(ours.gradients, expected.gradients, strict=True), 1):
        found |= apart(f"gradient {step}", mine_, theirs_, theirs_, least)
        found |= {f"gradient {step}, {name} is 0 in one process": float("inf")
                  for name, value in theirs_.items() if not value.any()}  # fmt: skip
    added = {name: value - expected.start[name] for name, value in expected.weights.items()}
    found |= {
        what: error for what, error in apart("update", ours.weights, expected.weights, added, least).items()
        if not what.endswith("k_proj.bias")  # it moves all scores of a query alike: its gradient is rounding alone
    }  # fmt: skip
    return found | {f"{name} on several ranks": float("inf") for name in ours.unlike}


def apart(
    what: str, ours: dict[str, Tensor], expected: dict[str, Tensor], sizes: dict[str, Tensor], least: float
) -> dict[str, float]:
    """Norms of the differences of tensors over those of `sizes`, each and of all together."""
    if ours.keys() != expected.keys():
        return {f"{what}, names {sorted(ours.keys() ^ expected.keys())[:4]}": float("inf")}
    everything = float(torch.stack([size.norm() for size in sizes.values()]).norm())
    gaps = {name: float((ours[name] - value).norm()) for name, value in expected.items()}
    found = {f"{what}, {name}": gap / max(least * everything, float(sizes[name].norm())) for name, gap in gaps.items()}
    return found | {f"{what} together": sum(gap**2 for gap in gaps.values()) ** 0.5 / everything}


def differences(ours: Outcome, expected: Outcome, bounds: str) -> list[str]:
    """What is out of bounds, in words; empty if the outcomes are equal."""
    limit = BOUNDS[bounds].limit
    found = errors(ours, expected, bounds)
    return [f"{what}: {error:.2g} apart" for what, error in found.items() if not error <= limit(what)]
