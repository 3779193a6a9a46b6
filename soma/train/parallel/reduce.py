"""Data parallelism without sharding: gradients are summed in buckets while the backward pass still runs.

As torch's DistributedDataParallel does (Li et al. 2020, arXiv:2006.15704), with two differences that our loop needs:
the head's loss runs backward piece by piece before the rest of the model (`soma.train.loss.backward`), so a head's
gradient is complete when the first of the rest is, and a tied one's at the end; and gradients are summed, since each
rank's loss is divided by the global count.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default


class Reducer:
    """Sums the gradients of `parameters` over the ranks of `group`, once a step.

    Set `last` before the backward pass of a step's last microbatch (accumulated gradients are summed with it), then
    call `finish()`. Buckets are started in one order on all ranks. `late` parameters (an embedding, a head) get
    gradients from several places: their buckets start only after all others, or in `finish()`. `first` ones (a head of
    its own) are complete when the gradient of any other comes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], late: Sequence[nn.Parameter], group: dist.ProcessGroup,
                 bucket_bytes: int = BUCKET_BYTES, first: Sequence[nn.Parameter] = ()) -> None:  # fmt: skip
        self.group, self.last = group, False
        is_late, is_first = ({id(parameter) for parameter in some} for some in (late, first))
        early = [parameter for parameter in parameters if id(parameter) not in is_late | is_first]
        self.buckets = buckets([parameter for parameter in parameters if id(parameter) in is_first], bucket_bytes)
        self.buckets += buckets(early[::-1], bucket_bytes)
        self.hooked = len(self.buckets)
        self.buckets += buckets([parameter for parameter in parameters if id(parameter) in is_late], bucket_bytes)
        self.bucket_of = {id(p): index for index, bucket in enumerate(self.buckets[: self.hooked]) for p in bucket}
        self.hooks = {id(parameter) for parameter in early}
        self.missing: list[set[int]] = []
        self.running: list[tuple[list[Tensor], Tensor, Any]] = []
        for parameter in early:
            parameter.register_post_accumulate_grad_hook(self.arrived)
        self.begin()

    def begin(self) -> None:
        """Wait for all gradients anew."""
        self.last, self.running = False, []
        self.missing = [self.hooks.intersection(map(id, bucket)) for bucket in self.buckets[: self.hooked]]

    def arrived(self, parameter: Tensor) -> None:
        """A gradient is complete: start the buckets that are whole, in order."""
        if not self.last:
            return
        self.missing[self.bucket_of[id(parameter)]].discard(id(parameter))
        while len(self.running) < self.hooked and not self.missing[len(self.running)]:
            self.start()

    def start(self) -> None:
        """Begin to sum the next bucket."""
        grads = [local_gradient(parameter) for parameter in self.buckets[len(self.running)]]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        self.running.append((grads, flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def finish(self) -> None:
        """Sum what has not been started (late parameters, and those without a gradient), and put all sums in place."""
        while len(self.running) < len(self.buckets):
            self.start()
        for grads, flat, work in self.running:
            work.wait()
            pieces = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [piece.view_as(grad) for grad, piece in zip(grads, pieces, strict=True)])
        self.begin()


def buckets(parameters: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Cut a list of parameters into lists of one dtype and at most `size` bytes (a larger parameter has its own)."""
    lists: list[list[nn.Parameter]] = []
    used = size
    for parameter in parameters:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if used + local.nbytes > size or lists[-1][0].dtype != parameter.dtype:
            lists.append([])
            used = 0
        lists[-1].append(parameter)
        used += local.nbytes
    return lists


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's piece of the gradient, to be changed in place; zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


@torch.no_grad()
def settle_partial(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients that are still partial over ranks with the same piece (`local.cut`), one bucket for each group."""
    waiting: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(isinstance(placement, Partial) for placement in grad.placements):
            axes = tuple(axis for axis, placement in enumerate(grad.placements) if isinstance(placement, Partial))
            waiting.setdefault((grad.device_mesh, axes, grad.dtype), []).append(parameter)
    for (mesh, axes, _), members in waiting.items():
        pieces = [local_gradient(parameter) for parameter in members]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        for axis in axes:
            dist.all_reduce(flat, group=mesh.get_group(axis))
        for parameter, piece, total in zip(
            members, pieces, flat.split([piece.numel() for piece in pieces]), strict=True
        ):
            assert isinstance(parameter, DTensor)
            parameter.grad = DTensor.from_local(
                total.view_as(piece), mesh, parameter.placements, run_check=False, shape=parameter.shape,
                stride=parameter.stride(),
            )  # fmt: skip
