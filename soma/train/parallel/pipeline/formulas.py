"""The bubbles that the schedules' papers promise, for equal stages and free transfers. Loads no torch."""

from soma.train.parallel.pipeline.costs import Costs
from soma.train.parallel.pipeline.schedule import Action, Overlap

FORMULAS = {
    "gpipe": "(p-1)(F+B)",
    "1f1b": "(p-1)(F+B)",
    "interleaved": "(p-1)(F+B)/v",
    "zb-h1": "(p-1)(F+B-2W)",
    "zb-h2": "(p-1)(F+B-3W), not below 0",
    "zb-v": "0 for F = B-W = W",
    "dualpipe": "(p/2-1)(F&B+B-3W) for F = B-W",
    "dualpipe-v": "(p-1)(F&B+B-3W)/2 for F = B-W",
}


def bubble(name: str, ranks: int, costs: Costs, chunks: int = 2) -> float | None:
    """Idle time of a step on the rank that waits longest; None for a schedule without a published formula.

    `FORMULAS`, where F and W are a rank's whole forward and weight gradient, B its whole backward (input and weights),
    F&B the overlapped pair; dualpipe-v has half of each in one of its 2p stages. Trips to experts belong to F and B.
    8 ranks, F = 1, B = 2, W = 1: 21, 21, 10.5, 7, 0, 0, 6, 7.
    """
    action, whole = Action("F", 0, 0), Action("BW", 0, 0)
    forward, backward, weight = costs.of(action), costs.of(whole), costs.of(Action("W", 0, 0))
    pair = costs.of(Overlap(action, whole))
    is_even = abs(forward - (backward - weight)) < 1e-9
    formulas: dict[str, float | None] = {
        "gpipe": (ranks - 1) * (forward + backward),
        "1f1b": (ranks - 1) * (forward + backward),
        "interleaved": (ranks - 1) * (forward + backward) / chunks,
        "zb-h1": (ranks - 1) * (forward + backward - 2 * weight),
        "zb-h2": max(0.0, (ranks - 1) * (forward + backward - 3 * weight)),
        "zb-v": 0.0 if is_even and abs(forward - weight) < 1e-9 else None,
        "dualpipe": (ranks / 2 - 1) * (pair + backward - 3 * weight) if is_even else None,
        "dualpipe-v": (ranks - 1) * (pair + backward - 3 * weight) / 2 if is_even else None,
    }
    return formulas.get(name)
