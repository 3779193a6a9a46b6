"""The schedules. Each is a short function of p ranks and m microbatches that gives a `Schedule`. Loads no torch.

Bubble formulas: F, B, W are the times of a rank's forward, full backward (input and weights) and weight gradient.
"""

from collections.abc import Callable, Iterable

from soma.train.parallel.pipeline.schedule import Action, Kind, Overlap, Schedule, Step, looped, straight, vee


class Counter:
    """Makes the actions of one rank: each call of (kind, stage) takes the next microbatch."""

    def __init__(self, first: Callable[[int], int] = lambda stage: 0) -> None:
        self.first = first
        self.done: dict[tuple[str, int], int] = {}

    def __call__(self, kind: Kind, stage: int) -> Action:
        counted = "B" if kind == "BW" else kind
        index = self.done.get((counted, stage), 0)
        self.done[counted, stage] = index + 1
        return Action(kind, stage, self.first(stage) + index)

    def count(self, kind: Kind, stage: int) -> int:
        return self.done.get((kind, stage), 0)


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv:1811.06965). Idle share (p-1)/(m+p-1); m activations."""
    steps = [
        [Action("F", r, i) for i in range(microbatches)] + [Action("BW", r, i) for i in range(microbatches)]
        for r in range(ranks)
    ]
    return make("gpipe", microbatches, [straight(ranks)], steps, microbatches)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """A backward as soon as there is one (PipeDream-flush, arXiv:2006.09503). Idle (p-1)(F+B); p activations."""
    steps = []
    for r in range(ranks):
        ahead = min(ranks - r - 1, microbatches)
        row: list[Step] = [Action("F", r, i) for i in range(ahead)]
        for i in range(microbatches - ahead):
            row += [Action("F", r, ahead + i), Action("BW", r, i)]
        steps.append(row + [Action("BW", r, i) for i in range(microbatches - ahead, microbatches)])
    return make("1f1b", microbatches, [straight(ranks)], steps, min(ranks, microbatches))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B over `chunks` stages a rank (arXiv:2104.04473 section 2.2). Idle (p-1)(F+B)/v. m must be a multiple of p."""
    if microbatches % ranks:
        raise ValueError(
            f"interleaved: {microbatches} microbatches are no multiple of {ranks} ranks; "
            f"use {nearest(microbatches, ranks)}"
        )
    total = microbatches * chunks

    def forward(r: int, index: int) -> Action:
        chunk = index // ranks % chunks
        return Action("F", chunk * ranks + r, index // (ranks * chunks) * ranks + index % ranks)

    def backward(r: int, index: int) -> Action:
        chunk = chunks - 1 - index // ranks % chunks
        return Action("BW", chunk * ranks + r, index // (ranks * chunks) * ranks + index % ranks)

    steps = []
    for r in range(ranks):
        ahead = min((ranks - r - 1) * 2 + (chunks - 1) * ranks, total)
        row: list[Step] = [forward(r, i) for i in range(ahead)]
        for i in range(total - ahead):
            row += [forward(r, ahead + i), backward(r, i)]
        steps.append(row + [backward(r, i) for i in range(total - ahead, total)])
    most = min(2 * (ranks - 1) + (chunks - 1) * ranks + 1, total) / chunks
    return make("interleaved", microbatches, [looped(ranks, chunks)], steps, most)


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """Zero bubble with the memory of 1F1B (arXiv:2401.10241 section 2.1). Idle (p-1)(F+B-2W); p activations."""
    return zero_bubble("zb-h1", ranks, microbatches, [ranks - r - 1 for r in range(ranks)], ranks)


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """Zero bubble with twice the memory (section 2.2). Idle (p-1)(F+B-3W); 2p-1 activations."""
    return zero_bubble("zb-h2", ranks, microbatches, [2 * (ranks - r - 1) for r in range(ranks)], 2 * ranks - 1)


def zero_bubble(name: str, ranks: int, microbatches: int, ahead: list[int], most: int) -> Schedule:
    """1F1B with `ahead` forwards before the first backward, and weight gradients put off until they fill a gap.

    A rank puts off as many as keep its activations (live forwards and open weight gradients) at `most`.
    """
    steps = []
    for r in range(ranks):
        make_action = Counter()
        first = min(ahead[r], microbatches)
        row: list[Step] = [make_action("F", r) for _ in range(first)]
        open_weights = most - 1 - ahead[r]
        for _ in range(microbatches - first):
            row += [make_action("F", r), make_action("B", r)]
            if make_action.count("B", r) - make_action.count("W", r) > open_weights:
                row.append(make_action("W", r))
        while make_action.count("B", r) < microbatches:
            row.append(make_action("B", r))
            row.append(make_action("W", r))
        row += [make_action("W", r) for _ in range(microbatches - make_action.count("W", r))]
        steps.append(row)
    return make(name, microbatches, [straight(ranks)], steps, min(most, microbatches))


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Zero bubble on a V (arXiv:2401.10241 section 6, algorithm ZB-V): no idle time for F = B-W = W; p activations.

    Written for at least 2p-1 microbatches; of fewer, those that are not there are left out of the same plan.
    """
    counted = max(microbatches, 2 * ranks - 1)
    steps = []
    for r in range(ranks):
        down, up = r, 2 * ranks - 1 - r
        do = Counter()
        row: list[Step] = [do("F", down) for _ in range(2 * (ranks - r) - 1)]
        for _ in range(r):
            row += [do("F", up), do("F", down)]
        for _ in range(ranks - r):
            row += [do("F", up), do("B", up), do("W", up)]
        while do.count("F", up) < counted:
            if do.count("F", down) < counted:
                row.append(do("F", down))
            row += [do("B", down), do("W", down), do("F", up), do("B", up), do("W", up)]
        for _ in range(r):
            row += [do("B", down), do("B", up)]
        for _ in range(ranks - r):
            row += [do("B", down), do("W", down)]
        for stage in (up, down):
            row += [do("W", stage) for _ in range(counted - do.count("W", stage))]
        steps.append(only(row, microbatches))
    return make("zb-v", microbatches, [vee(ranks)], steps, ranks)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Both ends feed the pipe (DeepSeek-V3, arXiv:2412.19437 section 3.2.1). Idle (p/2-1)(F&B+B-3W); p+1 activations.

    Stage s lies on rank s for the first half of the microbatches, on rank p-1-s for the second half. p and m even,
    m at least 2p.
    """
    if ranks % 2 or microbatches % 2 or microbatches < 2 * ranks:
        raise ValueError(
            f"dualpipe: needs an even number of ranks and an even number of microbatches, at least twice the ranks; "
            f"got {ranks} and {microbatches}: use {ranks + ranks % 2} and "
            f"{max(microbatches + microbatches % 2, 2 * (ranks + ranks % 2))}"
        )
    half = ranks // 2
    steps = []
    for r in range(ranks):
        near = min(r, ranks - 1 - r)
        # Stream 0 enters the rank's nearer end; stages and microbatches of the two streams.
        stages = (near, ranks - 1 - near)
        streams = (0, microbatches // 2) if r < half else (microbatches // 2, 0)
        do = Counter(lambda stage, near=near, streams=streams: streams[0 if stage == near else 1])  # type: ignore[misc]
        steps.append(dual_row(do, stages, half, near, microbatches // 2, middle=near == half - 1))
    return make("dualpipe", microbatches, [straight(ranks), straight(ranks)[::-1]], steps, ranks + 1)


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipe cut in half (Sea AI Lab): a V of 2p stages in place of two copies. m at least 2p; p+1 activations."""
    if microbatches < 2 * ranks:
        raise ValueError(f"dualpipe-v: {microbatches} microbatches are fewer than twice {ranks} ranks: use {2 * ranks}")
    steps = [
        dual_row(Counter(), (r, 2 * ranks - 1 - r), ranks, r, microbatches, middle=r == ranks - 1) for r in range(ranks)
    ]
    return make("dualpipe-v", microbatches, [vee(ranks)], steps, ranks + 0.5)


def dual_row(
    do: Counter, stages: tuple[int, int], depth: int, near: int, microbatches: int, *, middle: bool
) -> list[Step]:
    """One rank of DualPipe: stream 0 is at its stage `near` of `depth`, stream 1 on its way back out.

    The eight phases of figure 5 of the DeepSeek-V3 report, named by what they repeat.
    """
    a, b = stages
    far = depth - near - 1
    row: list[Step] = [do("F", a) for _ in range(2 * far)]
    for _ in range(near + 1):
        row += [do("F", a), do("F", b)]
    for _ in range(far):
        row += [do("B", b), do("W", b), do("F", b)]
    for i in range(microbatches - 2 * depth + near + 1):
        if i == 0 and middle:  # its own forward feeds this backward: nothing to overlap
            row += [do("F", a), do("BW", b)]
        else:
            row.append(Overlap(do("F", a), do("BW", b)))
        row.append(Overlap(do("F", b), do("BW", a)))
    for _ in range(far):
        row += [do("BW", b), Overlap(do("F", b), do("BW", a))]
    put_off: list[Action] = []

    def backward(stage: int, split: bool) -> None:
        row.append(do("B" if split else "BW", stage))
        if split:
            put_off.append(Action("W", stage, row[-1].microbatch))  # type: ignore[union-attr]

    for i in range(near + 1):
        turned = i > (near + 1) // 2
        at_turn = i == (near + 1) // 2
        backward(b, turned or (at_turn and near % 2 == 1))
        backward(a, turned or at_turn)
    for _ in range(far):
        row.append(put_off.pop(0))
        backward(a, True)
    return row + put_off


def make(
    name: str, microbatches: int, placements: Iterable[tuple[int, ...]], steps: Iterable[Iterable[Step]],
    activations: float | None,
) -> Schedule:  # fmt: skip
    """A schedule from lists."""
    return Schedule(name, microbatches, tuple(placements), tuple(tuple(row) for row in steps), activations)


def only(row: Iterable[Step], microbatches: int) -> list[Step]:
    """The actions of microbatches that exist."""
    return [step for step in row if isinstance(step, Action) and step.microbatch < microbatches]


def nearest(value: int, multiple: int) -> int:
    """The multiple (at least one) that is nearest."""
    return max(1, round(value / multiple)) * multiple


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe": dualpipe,
    "dualpipe-v": dualpipe_v,
}
