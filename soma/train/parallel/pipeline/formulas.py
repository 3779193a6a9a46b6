"""The bubbles that the schedules' papers promise, for equal stages and free transfers. Loads no torch."""

from soma.train.parallel.pipeline.simulate import Costs


def bubble(name: str, ranks: int, costs: Costs, chunks: int = 2) -> float | None:
    """Idle time of a step on the rank that waits longest; None for a schedule without a published formula.

    F and W are a rank's whole forward and weight gradient, B its whole backward (input and weights), F&B the
    overlapped pair: gpipe, 1f1b (p-1)(F+B); interleaved (p-1)(F+B)/v; zb-h1 (p-1)(F+B-2W); zb-h2 (p-1)(F+B-3W), not
    below 0; zb-v 0 for F = B-W = W; dualpipe (p/2-1)(F&B+B-3W); dualpipe-v (p-1)(F&B+B-3W)/2, since its 2p stages are
    half as long; both for F = B-W. 8 ranks, F = 1, B = 2, W = 1: 21, 21, 10.5, 7, 0, 0, 6, 7.
    """
    forward, weight = costs.forward, costs.weight
    assert isinstance(forward, int | float)
    assert isinstance(costs.backward, int | float)
    assert isinstance(weight, int | float)
    backward = costs.backward + weight
    pair = forward + backward if costs.overlapped is None else costs.overlapped
    even = forward == costs.backward == weight
    formulas: dict[str, float | None] = {
        "gpipe": (ranks - 1) * (forward + backward),
        "1f1b": (ranks - 1) * (forward + backward),
        "interleaved": (ranks - 1) * (forward + backward) / chunks,
        "zb-h1": (ranks - 1) * (forward + backward - 2 * weight),
        "zb-h2": max(0.0, (ranks - 1) * (forward + backward - 3 * weight)),
        "zb-v": 0.0 if even else None,
        "dualpipe": (ranks / 2 - 1) * (pair + backward - 3 * weight) if forward == costs.backward else None,
        "dualpipe-v": (ranks - 1) * (pair + backward - 3 * weight) / 2 if forward == costs.backward else None,
    }
    return formulas.get(name)
