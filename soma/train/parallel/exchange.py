"""How rows travel between the ranks that share experts: started here, waited for there.

An exchange runs beside what its rank computes: over Gloo in its threads, on a GPU on a stream of its own. All ranks of
a group start theirs in one order, from one thread. Letters: P rows that leave, Q rows that arrive, D model width, R
ranks, E experts of a rank.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    """All-to-all between `ranks` ranks; on a GPU it is queued on the current stream."""

    ranks: int

    def counts(self, sent_RE: Tensor, /) -> Tensor:
        """How many rows come from each rank for each expert here, from what this one sends: int64, both (R, E)."""

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int], /) -> tuple[Tensor, dist.Work | None]:
        """Send the first to[0] rows to rank 0 and so on. The rows that arrive (Q, D), whole when the work is done."""


class GroupExchange:
    """The all-to-all of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()

    def counts(self, sent_RE: Tensor) -> Tensor:
        got_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(got_RE, sent_RE, group=self.group)
        return got_RE

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, dist.Work | None]:
        out_QD = x_PD.new_empty(sum(from_R), x_PD.size(1))
        # NCCL's work follows the stream that it was queued on; Gloo's has to be waited for.
        work = dist.all_to_all_single(out_QD, x_PD, from_R, to_R, group=self.group, async_op=not x_PD.is_cuda)
        return out_QD, work


_streams: dict[torch.device, Any] = {}


def communication_stream(device: torch.device) -> "torch.cuda.Stream":
    """The one stream of a GPU that exchanges run on: its blocks go before those of the computation."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    stream: torch.cuda.Stream = _streams[device]
    return stream


def moment(device: torch.device) -> "torch.cuda.Event | None":
    """What has been queued so far on the GPU's current stream, as an event; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def beside(device: torch.device, ready: "torch.cuda.Event") -> AbstractContextManager[Any]:
    """What is queued within goes to the communication stream, after the event."""
    stream = communication_stream(device)
    stream.wait_event(ready)
    return torch.cuda.stream(stream)


@dataclass
class Arriving:
    """Rows on their way.

    What was sent is kept until it is waited for: from then on its memory is used again only by what the computing
    stream does later. What arrives was allocated on the other stream, which must not use the memory again before the
    computing stream has read it: `record_stream`.
    """

    sent: Tensor | None
    rows: Tensor
    work: dist.Work | None = None
    done: "torch.cuda.Event | None" = None

    def wait(self) -> Tensor:
        """The rows (Q, D). On a GPU the current stream waits for them, not the process."""
        if self.work is not None:
            self.work.wait()
        if self.done is not None:
            current = torch.cuda.current_stream(self.rows.device)
            current.wait_event(self.done)
            self.rows.record_stream(current)
        self.sent = None
        return self.rows


def start(
    exchange: Exchange, x_PD: Tensor, to_R: list[int], from_R: list[int], ready: "torch.cuda.Event | None"
) -> Arriving:  # fmt: skip
    """Begin an exchange of rows that are whole, on a GPU, at the event `ready`, and do not change any more."""
    if ready is None:
        x_PD = x_PD.contiguous()
        return Arriving(x_PD, *exchange.rows(x_PD, to_R, from_R))
    with beside(x_PD.device, ready):
        sent_PD = x_PD.contiguous()
        out_QD, work = exchange.rows(sent_PD, to_R, from_R)
        return Arriving(x_PD, out_QD, work, moment(x_PD.device))


@dataclass
class Counts:
    """Rows that leave and rows that come.

    got: (R, E), from every rank for each expert here, on the device: for work that comes after the wait for the rows.
    both: (2, R, E), on the CPU: rows that leave for and come from each rank by expert; whole at the event `known`.
    """

    got: Tensor
    both: Tensor
    known: "torch.cuda.Event | None"

    def sizes(self) -> tuple[list[int], list[int], Tensor]:
        """Rows to each rank, from each rank, and for each expert here (E, on the CPU). Waits for a GPU to know."""
        if self.known is not None:
            self.known.synchronize()
        sent_RE, got_RE = self.both
        return sent_RE.sum(1).tolist(), got_RE.sum(1).tolist(), got_RE.sum(0)


def count(exchange: Exchange, sent_RE: Tensor) -> Counts:
    """Begin to tell every rank how many rows it will get."""
    ready = moment(sent_RE.device)
    if ready is None:
        got_RE = exchange.counts(sent_RE)
        return Counts(got_RE, torch.stack((sent_RE, got_RE)), None)
    with beside(sent_RE.device, ready):
        got_RE = exchange.counts(sent_RE)
        sizes_2RE = torch.empty(2, *sent_RE.shape, dtype=sent_RE.dtype, pin_memory=True)
        sizes_2RE.copy_(torch.stack((sent_RE, got_RE)), non_blocking=True)
        known = moment(sent_RE.device)
    sent_RE.record_stream(communication_stream(sent_RE.device))
    got_RE.record_stream(torch.cuda.current_stream(sent_RE.device))
    return Counts(got_RE, sizes_2RE, known)
