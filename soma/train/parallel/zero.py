"""ZeRO's stages 1 and 2 with whole parameters on every rank (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

The model is trained as a replica is: nothing is gathered for a layer's turn, there is no hook on a module. What is cut
is the gradient, which is scattered over the ranks while it is summed, bucket by bucket as the backward pass goes (in
stage 1 with a step's last microbatch, in stage 2 with each), and the optimizer: it gets this rank's rows of every
parameter, views of the whole ones' memory, and after its update the rows of all ranks are gathered. A step sends what
the all-reduce of replicas would: each number once on the way there, once on the way back.

Rows are those that FSDP2 gives a rank, so optimizer state has the form that it has in every other layout: Muon finds
its matrices, and a checkpoint of one is one of the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from soma.model.transformer import Transformer
from soma.train.parallel.mesh import Mesh
from soma.train.parallel.reduce import buckets

# Megatron-LM's default, 40 million numbers: an operation costs a rank its launch, and its part of a bucket gets small.
BUCKET_BYTES = 160_000_000
IN_FLIGHT = 2  # buckets that are on their way at a time: more would be copies of the gradients of the whole model
HAS_SINGLE = hasattr(dist, "reduce_scatter_single")  # what torch 2.13 calls them


def keeps_whole(mesh: Mesh) -> bool:
    """Whether a layout shares the optimizer like this. Where tensors are cut in other ways as well, where replicas of
    the shards exist, and in pipelines, it is FSDP2's (`shard`)."""
    layout = mesh.layout
    alone = layout.tp == layout.pp == layout.ep == layout.dp == 1
    return mesh.shards is not None and layout.zero < 3 and alone and not layout.cpu_offload


class Bucket:
    """Parameters whose gradients travel together; all of them are cut evenly, or none is.

    `pieces` are this rank's rows of them, as DTensors that share their memory; `sizes` the numbers that a rank has of
    each (the last ones have fewer, and are filled up).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Any) -> None:
        self.parameters, self.ranks, self.rank = parameters, mesh.size(), mesh.get_local_rank()
        self.pieces = [cut(parameter, mesh) for parameter in parameters]
        self.shapes = [piece.to_local().shape for piece in self.pieces]
        self.sizes = [-(-p.size(0) // self.ranks) * (p.numel() // p.size(0)) for p in parameters]
        self.size = sum(self.sizes)
        self.is_even = all(parameter.size(0) % self.ranks == 0 for parameter in parameters)
        self.total: Tensor | None = None  # gradients of this rank's rows, summed over ranks and microbatches

    def gradients(self) -> Tensor:
        """All gradients, (ranks, size), as they are scattered; the parameters have none afterwards."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        out_RS = grads[0].new_empty(self.ranks, self.size)
        torch._chunk_cat(grads, 0, self.ranks, out=out_RS)
        for parameter in self.parameters:
            parameter.grad = None
        return out_RS

    def add(self, part: Tensor) -> None:
        """Another microbatch's sum over the ranks."""
        self.total = part if self.total is None else self.total.add_(part)

    def deal(self) -> None:
        """Give the sums to the pieces, for the optimizer, and to the parameters, for who looks for gradients there."""
        assert self.total is not None
        rows = zip(self.parameters, self.pieces, self.shapes, self.total.split(self.sizes), strict=True)
        for parameter, piece, shape, sums in rows:
            grad = DTensor(sums[: shape.numel()].view(shape), piece._spec, requires_grad=False)
            parameter.grad = piece.grad = grad
        self.total = None

    def collect(self) -> Tensor:
        """Memory for all ranks' rows, (ranks, size), with this rank's in it."""
        out_RS = self.parameters[0].detach().new_empty(self.ranks, self.size)
        self.copy(self.rows(self.rank), out_RS[self.rank], back=True)
        return out_RS

    def spread(self, got_RS: Tensor) -> None:
        """Put all ranks' rows into the whole parameters."""
        if self.is_even:
            wholes = [parameter.detach().view(self.ranks, -1) for parameter in self.parameters]
            torch.split_with_sizes_copy(got_RS, self.sizes, 1, out=wholes)
            return
        for rank, got_S in enumerate(got_RS):
            self.copy(self.rows(rank), got_S)

    def rows(self, rank: int) -> list[Tensor]:
        """A rank's rows of the parameters, flat, in place."""
        return [
            parameter.detach().view(-1)[rank * size : (rank + 1) * size]
            for parameter, size in zip(self.parameters, self.sizes, strict=True)
        ]

    def copy(self, rows: list[Tensor], filled_S: Tensor, back: bool = False) -> None:
        """Copy rows from what is filled up, or `back` to it."""
        parts = [part[: row.numel()] for part, row in zip(filled_S.split(self.sizes), rows, strict=True)]
        torch._foreach_copy_(*((parts, rows) if back else (rows, parts)))


def cut(parameter: nn.Parameter, mesh: Any) -> Any:
    """This rank's rows of a whole parameter, sharing its memory, as a parameter of the optimizer's own."""
    height = -(-parameter.size(0) // mesh.size())
    start = min(mesh.get_local_rank() * height, parameter.size(0))
    local = parameter.detach()[start : start + height]
    piece = nn.Parameter(
        DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride())
    )
    piece.whole = parameter  # type: ignore[attr-defined]
    return piece


def whole_of(parameter: Any) -> Any:
    """What a parameter of an optimizer is a piece of; itself if it is none."""
    return getattr(parameter, "whole", parameter)


class SharedUpdates:
    """The gradients and the optimizer of a model, shared by the ranks of a mesh.

    Call `begin` before each microbatch, `finish` after a step's last one, and build the optimizers on `piece` of each
    parameter; `follow` them, and each update ends with whole parameters on every rank. Buckets start in one order on
    all ranks. A tied embedding, whose gradient comes in pieces, is the last; a head of its own has its gradient before
    the first layer has, so it is the first.
    """

    def __init__(self, model: Transformer, mesh: Mesh, bucket_bytes: int = BUCKET_BYTES) -> None:
        assert mesh.shards is not None
        self.is_stage_1, self.group = mesh.layout.zero == 1, mesh.shards.get_group()
        head = {id(parameter) for parameter in (model.lm_head.parameters() if model.lm_head is not None else ())}
        late = {id(parameter) for parameter in (model.embed_tokens.parameters() if model.lm_head is None else ())}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad][::-1]
        hooked = [parameter for parameter in trained if id(parameter) not in head | late]
        lists = [[p for p in trained if id(p) in head], hooked, [p for p in trained if id(p) in late]]
        ordered = [self.bucketed(parameters, mesh.shards, bucket_bytes) for parameters in lists]
        self.buckets = [bucket for part in ordered for bucket in part]
        self.hooked = len(ordered[0]) + len(ordered[1])
        self.place = {id(p): index for index, bucket in enumerate(self.buckets) for p in bucket.parameters}
        self.pieces = {
            id(parameter): piece
            for bucket in self.buckets for parameter, piece in zip(bucket.parameters, bucket.pieces, strict=True)
        }  # fmt: skip
        self.waiting = {id(parameter) for parameter in hooked}
        self.missing: list[set[int]] = []
        self.running: list[tuple[Bucket, Tensor, Tensor, Any]] = []
        self.is_summing, self.started = False, 0
        for parameter in hooked:
            parameter.register_post_accumulate_grad_hook(self.arrived)

    @staticmethod
    def bucketed(parameters: Sequence[nn.Parameter], mesh: Any, size: int) -> list[Bucket]:
        even = [parameter for parameter in parameters if parameter.size(0) % mesh.size() == 0]
        odd = [parameter for parameter in parameters if parameter.size(0) % mesh.size()]
        return [Bucket(members, mesh) for kind in (even, odd) for members in buckets(kind, size)]

    def piece(self, parameter: nn.Parameter) -> nn.Parameter:
        """What of a parameter this rank's optimizer updates."""
        return self.pieces[id(parameter)]

    def begin(self, last: bool) -> None:
        """Before a microbatch's forward pass; `last` of the step."""
        self.flush()
        self.is_summing, self.started = last or not self.is_stage_1, 0
        self.missing = [self.waiting.intersection(map(id, bucket.parameters)) for bucket in self.buckets]

    def arrived(self, parameter: Tensor) -> None:
        """A gradient is complete: start the buckets that are whole, in order."""
        if not self.is_summing:
            return
        self.missing[self.place[id(parameter)]].discard(id(parameter))
        while self.started < self.hooked and not self.missing[self.started]:
            self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begin to sum the next bucket."""
        bucket = self.buckets[self.started]
        self.started += 1
        while len(self.running) >= IN_FLIGHT:
            self.settle()
        sent_RS = bucket.gradients()
        got_S = sent_RS.new_empty(bucket.size)
        scatter = dist.reduce_scatter_single if HAS_SINGLE else dist.reduce_scatter_tensor
        work = scatter(got_S, sent_RS.view(-1), group=self.group, async_op=True)
        self.running.append((bucket, sent_RS, got_S, work))

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the bucket that was started first."""
        bucket, _, got_S, work = self.running.pop(0)
        work.wait()
        bucket.add(got_S)

    def flush(self) -> None:
        """Begin to sum what a microbatch has left: late parameters, and those without a gradient."""
        while self.is_summing and self.started < len(self.buckets):
            self.start()
        self.is_summing = False

    @torch.no_grad()
    def finish(self) -> None:
        """After the last microbatch: every parameter's gradient is this rank's rows of the sum over all ranks."""
        self.flush()
        while self.running:
            self.settle()
        for bucket in self.buckets:
            bucket.deal()

    def follow(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Gather the parameters whenever the last of these has made its update."""
        if optimizers:
            optimizers[-1].register_step_post_hook(lambda *_: self.gather())

    @torch.no_grad()
    def gather(self) -> None:
        """Bring all ranks' rows together on every rank."""
        running: list[tuple[Bucket, Tensor, Any]] = []

        def settle() -> None:
            bucket, got_RS, work = running.pop(0)
            work.wait()
            bucket.spread(got_RS)

        for bucket in reversed(self.buckets):
            while len(running) >= IN_FLIGHT:
                settle()
            got_RS = bucket.collect()
            gather = dist.all_gather_single if HAS_SINGLE else dist.all_gather_into_tensor
            work = gather(got_RS.view(-1), got_RS[bucket.rank], group=self.group, async_op=True)
            running.append((bucket, got_RS, work))
            for piece in bucket.pieces:
                piece.grad = None
        while running:
            settle()
