"""Other engines for data parallelism (`layout: engine`), in the same loop: Hugging Face's Accelerate for replicas, and
DeepSpeed's ZeRO (`bridge_deepspeed`).

They take the place of `apply`'s reducers and shards; batches, loss, schedule, logs and checkpoints are the loop's. Both
average gradients over the ranks, so each rank's loss is scaled by their number. And both want the loss from one forward
pass of the module that they wrap, so the head does not run in pieces and all logits are in memory at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.data.loader import Batch
from soma.model.dropout import stamped
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.objective import LanguageModeling, stamps_of, to_device
from soma.train.parallel.apply import Parallel, share_balance
from soma.train.parallel.bridge_deepspeed import DeepSpeedParallel, check_deepspeed
from soma.train.parallel.config import Layout
from soma.train.parallel.mesh import Mesh
from soma.train.recompute import recompute_layers


def bridge(
    model: Transformer, config: TrainConfig, mesh: Mesh, compute: Compute, fill: Callable[[], None] = lambda: None
) -> tuple["AccelerateParallel | DeepSpeedParallel", "BridgedLanguageModeling"]:  # fmt: skip
    """The model, wrapped by the layout's engine, and the objective that trains it. `fill` gives a model that has no
    numbers yet its own. Raises UserError for what the engine cannot do, and where it is not installed."""
    check(config, mesh.layout)
    share_balance(model, mesh, whole_batch=config.microbatch_size is None)
    recompute_layers(model, config.activation_checkpointing, None)
    fill()
    module = WithLoss(model, compute)
    parallel: AccelerateParallel | DeepSpeedParallel
    if mesh.layout.engine == "deepspeed":
        parallel = DeepSpeedParallel(module, model, config, mesh, compute)
    else:
        parallel = AccelerateParallel(module, mesh, compute)
    return parallel, BridgedLanguageModeling(model, config, compute, parallel)


def check(config: TrainConfig, layout: Layout) -> None:
    """Raise UserError for what an engine cannot do."""
    name = f"layout: engine {layout.engine}"
    if layout.engine == "deepspeed":
        check_deepspeed(config, layout)
    elif layout.world > (layout.dp or 1) or layout.ep > 1:
        raise UserError(f"{name} is for replicas: take dp alone, or engine soma for fsdp, tp, cp, pp and ep")
    elif config.lora is not None:
        raise UserError(f"{name} has no lora: take engine soma or deepspeed")
    if isinstance(config, PreferenceConfig):
        raise UserError(f"{name} has no preference tuning: take engine soma")
    if config.precision == "fp16":
        raise UserError(f"{name} with precision fp16: take bf16, or engine soma")
    if config.compile is True:
        raise UserError(f"{name} with compile: leave it out, or take engine soma")
    if isinstance(config.activation_checkpointing, str) and config.activation_checkpointing.startswith("budget"):
        raise UserError(f"{name}: activation_checkpointing with a budget goes with engine soma alone")


class WithLoss(nn.Module):
    """The model with its loss in one forward pass."""

    def __init__(self, model: Transformer, compute: Compute) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, rows: Tensor | None, documents: Sequence[Any],
        stamps_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum of cross-entropies in nats, float32, and the auxiliary loss."""
        stamps_N = None if stamps_BT is None else stamps_BT.flatten()
        with self.compute.autocast():
            with stamped(stamps_BT):
                x_BTD, aux = self.model.features(tokens_BT, *documents)
            x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
            if rows is not None:
                x_ND, targets_N = x_ND[rows], targets_N[rows]
                stamps_N = None if stamps_N is None else stamps_N[rows]
            with stamped(stamps_N):
                logits_NV = self.model.logits(x_ND)
        return loss.cross_entropy_sum(logits_NV, targets_N), aux


class AccelerateParallel(Parallel):
    """A model in the hands of `Accelerator.prepare_model`: DistributedDataParallel, Accelerate's backward and clipping.
    The precision is the loop's own autocast."""

    def __init__(self, module: WithLoss, mesh: Mesh, compute: Compute) -> None:
        super().__init__(module.model, mesh)
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise UserError(
                f"layout: engine accelerate: {error}: pip install 'somacube[accelerate]', or take engine soma"
            ) from error
        # Routers count the tokens of their own rank in a buffer.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        threads = torch.get_num_threads()
        self.accelerator = Accelerator(
            cpu=compute.device.type == "cpu", mixed_precision="no", kwargs_handlers=[options]
        )  # fmt: skip
        torch.set_num_threads(threads)  # it takes all cores of the machine where OMP_NUM_THREADS says nothing
        if self.accelerator.num_processes != mesh.size:
            raise UserError(
                f"layout: engine accelerate sees {self.accelerator.num_processes} processes of {mesh.size}: start them "
                "with torchrun"
            )
        self.engine = self.accelerator.prepare_model(module)

    def begin(self, last: bool) -> None:
        self.engine.require_backward_grad_sync = last  # DistributedDataParallel's no_sync; it is asked in the forward

    def finish(self) -> None:
        """The gradients were summed with the last backward pass."""

    def backward(self, value: Tensor) -> None:
        """Backward pass of this rank's share of the loss."""
        self.accelerator.backward(value)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        assert norm is not None
        return norm


class Engine(Protocol):
    """What the objective needs of an engine."""

    engine: Any  # the wrapped module; `module` is what it wraps
    mesh: Mesh

    def backward(self, value: Tensor) -> None:
        """Backward pass of this rank's share of the loss."""


class BridgedLanguageModeling(LanguageModeling):
    """Next-token prediction through the engine's module."""

    def __init__(self, model: Transformer, config: TrainConfig, compute: Compute, parallel: Engine) -> None:
        super().__init__(model, config, Compute(compute.device, compute.precision, False))
        self.parallel = parallel

    def backward(self, part: tuple[Batch, slice], scale: Tensor, aux_scale: Tensor) -> Tensor:
        total, aux = self.forward(part, self.parallel.engine)
        value = total * scale + (aux * aux_scale if aux.requires_grad else 0.0)
        self.parallel.backward(value * self.parallel.mesh.size)
        return total.detach()

    @torch.no_grad()
    def loss(self, part: tuple[Batch, slice]) -> Tensor:
        return self.forward(part, self.parallel.engine.module)[0]  # ranks may have unequal numbers of parts here

    def forward(self, part: tuple[Batch, slice], module: nn.Module) -> tuple[Tensor, Tensor]:
        """Sum and auxiliary loss of a part."""
        batch, rows = part
        device = self.inputs.compute.device
        documents = []
        if self.inputs.isolate:
            documents = [to_device(batch.positions[rows], device), to_device(batch.document_ids[rows], device)]
        tokens_BT, targets_BT = to_device(batch.tokens[rows], device), to_device(batch.targets[rows], device)
        total, aux = module(tokens_BT, targets_BT, self.rows(part), documents, stamps_of(batch, rows, device))
        return total, aux
