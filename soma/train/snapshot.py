"""What lets training go on while its checkpoint is written: a copy of the tensors, and a thread that works on it."""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soma.train.parallel.flat import FlatPiece

PATIENCE = 300.0  # seconds that a run which has failed waits for its last checkpoint


class Snapshot:
    """Copies tensors to the CPU's memory, into the same memory every time (page-locked beside a GPU)."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now. A cut one stays cut: this rank's piece is copied."""
        taken: dict[str, Tensor] = {}
        on_gpu = False
        for name, tensor in tensors.items():
            own = own_memory(tensor)
            on_gpu |= own.is_cuda
            copy = self.buffer(name, own)
            copy.copy_(own, non_blocking=True)
            # Not `from_local`, which would move the copy to the device of the mesh.
            if isinstance(tensor, DTensor):
                taken[name] = DTensor(copy, tensor._spec, requires_grad=False)
            else:
                taken[name] = FlatPiece(copy, tensor.start, tensor.shape) if isinstance(tensor, FlatPiece) else copy
        for name in self.buffers.keys() - taken.keys():
            del self.buffers[name]
        if on_gpu:
            torch.cuda.synchronize()
        return taken

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """The memory of a tensor's copy."""
        buffer = self.buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self.buffers[name] = buffer
        return buffer


def own_memory(tensor: Tensor) -> Tensor:
    """What a rank has of a tensor that may be cut."""
    if isinstance(tensor, FlatPiece):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Background:
    """Runs one piece of work at a time in a thread; what it raises comes out of the next `wait`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work; the one before must have been waited for."""
        assert self.thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - it is raised where the work is waited for
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until the work is done, or so many seconds. Raises what it raised."""
        if self.thread is None:
            return
        self.thread.join(seconds)
        if self.thread.is_alive():
            return
        self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error
