"""When things happen on a rank, on one clock for all ranks of a machine."""

import time
from itertools import pairwise

import torch

from soma.train.parallel.pipeline.schedule import Compute
from soma.train.parallel.pipeline.simulate import Span

Mark = torch.cuda.Event | float  # a moment: of a GPU's stream, or in seconds


class Clock:
    """Times of actions in seconds: a monotonic clock, or a GPU's events, which do not hold the stream up."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[Compute, Mark]] = []
        self.zero: Mark = 0.0
        self.zero_time = 0.0

    def begin(self) -> None:
        """Forget all marks."""
        self.marks.clear()
        if self.on_gpu:
            torch.cuda.synchronize()
        self.zero_time = time.monotonic()
        self.zero = self.now()

    def now(self) -> Mark:
        """This moment, or the one when the GPU's stream gets here."""
        if not self.on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, step: Compute) -> None:
        """A step starts or ends here."""
        self.marks.append((step, self.now()))

    def spans(self) -> list[Span]:
        """The steps that were marked twice, in order; times on the monotonic clock."""
        times = [(step, self.seconds(mark)) for step, mark in self.marks]
        return [Span(step, start, end) for (step, start), (_, end) in list(pairwise(times))[::2]]

    def seconds(self, mark: Mark) -> float:
        """A mark on the monotonic clock."""
        if isinstance(mark, float):
            return mark
        assert isinstance(self.zero, torch.cuda.Event)
        mark.synchronize()
        return self.zero_time + self.zero.elapsed_time(mark) / 1000
