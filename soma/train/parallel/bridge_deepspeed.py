"""DeepSpeed's ZeRO-1, 2 and 3 as the engine of data parallelism (Rajbhandari et al. 2020, arXiv:1910.02054).

The ranks of `fsdp` share the optimizer state (`zero: 1`), the gradients too (2), or the parameters as well (3).
DeepSpeed cuts what is laid end to end, so a rank has a run of elements of a tensor, not rows. Checkpoints take these
runs as they are (`flat.FlatPiece`), under the names of every other layout: nothing is gathered, any layout can go on.

DeepSpeed knows no update without clipping, nor a norm without an update: both happen in `clip`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.optim import build_optimizers
from soma.train.parallel.apply import Parallel
from soma.train.parallel.config import Layout
from soma.train.parallel.flat import FlatPiece, kept_run
from soma.train.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000  # numbers in DeepSpeed's own buffer for gradients, by default; it is allocated whole


def check_deepspeed(config: TrainConfig, layout: Layout) -> None:
    """Raise UserError for what DeepSpeed's ZeRO cannot do in this loop."""
    name = "layout: engine deepspeed"
    if layout.world > layout.fsdp or layout.ep > 1:
        raise UserError(f"{name} has fsdp with zero alone: leave dp, tp, cp, pp and ep out, or take engine soma")
    if config.optimizer != "adamw":
        raise UserError(
            f"{name} cuts matrices anywhere, which {config.optimizer} does not bear: take adamw, or engine soma"
        )
    if config.parameters != "fp32":
        raise UserError(f"{name} with parameters {config.parameters}: take fp32, or engine soma")
    if layout.zero == 3 and config.sample_prompts:
        raise UserError(f"{name} draws no samples with zero 3: leave sample_prompts out, or take zero 1 or 2")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(f"{name} reads LOCAL_RANK, RANK and WORLD_SIZE from the environment: start it with torchrun")


class DeepSpeedParallel(Parallel):
    """A model in the hands of `deepspeed.initialize`, over the loop's own AdamW. The precision is the loop's own
    autocast."""

    def __init__(
        self, module: nn.Module, model: Transformer, config: TrainConfig, mesh: Mesh, compute: Compute
    ) -> None:  # fmt: skip
        super().__init__(model, mesh)
        self.deepspeed = import_deepspeed(compute.device)
        self.stage = mesh.layout.zero
        self.is_last = False
        (adamw,) = build_optimizers(model, config, torch.float32)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        chosen = settings(config, mesh, trained)
        self.deepspeed.init_distributed(dist_init_required=False)
        if self.stage == 3:  # of each parameter, which is whole on the device for a moment, a piece stays
            self.deepspeed.zero.Init(module=module, config_dict_or_path=chosen)
            if model.lm_head is None:  # the table is used as the head too, outside of its own module's forward pass
                self.deepspeed.zero.register_external_parameter(module, model.embed_tokens.weight)
        self.engine, self.zero, _, _ = self.deepspeed.initialize(model=module, optimizer=adamw, config=chosen)
        self.inner = self.zero.optimizer
        for flat in self.flats():
            # Before the first update: DeepSpeed 0.19 looks for the state of all groups when the first has stepped.
            self.inner.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
            }
        self.updates = Updates(self)

    def flats(self) -> list[Tensor]:
        """What DeepSpeed's optimizer updates: this rank's part of each group of parameters."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def optimizers(self, config: TrainConfig, compute: Compute) -> list[torch.optim.Optimizer]:
        return [self.updates]  # type: ignore[list-item]

    def begin(self, last: bool) -> None:
        self.is_last = last
        self.engine.set_gradient_accumulation_boundary(last)

    def finish(self) -> None:
        """The gradients were averaged with the backward passes."""

    def backward(self, value: Tensor) -> None:
        """Backward pass of this rank's share of the loss."""
        self.engine.backward(value, scale_wrt_gas=False)
        if not self.is_last:
            self.engine.step()  # counts the microbatch

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Clips to the config's `grad_clip` and updates, unless the norm is not finite; returns it."""
        for group in self.zero.param_groups:
            group["lr"] = self.updates.param_groups[0]["lr"]
        self.engine.step()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()), device=self.engine.device)

    def share(self, tensor: Tensor | None, name: str, like: Tensor) -> Tensor:
        if tensor is not None and tensor.shape == like.shape:
            return tensor
        parameter = self.model.get_parameter(name)  # of stage 3
        with self.deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def count_parameters(self) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters())

    @contextmanager
    def loading(self) -> Iterator[None]:
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()  # small parameters are whole otherwise
        yield
        self.zero.refresh_fp32_params()
        if self.stage == 3:
            self.zero.checkpoint_event_epilogue()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's run of a parameter's optimizer state, sharing its memory."""
        if self.stage == 3:
            group, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        else:
            place = parameter._hp_mapping  # type: ignore[attr-defined]
            if place is None:
                return self.no_moments(parameter)
            group = place.param_group_index
            start, count = place.hp_fragment_address.start, place.hp_fragment_address.numel
        state = self.inner.state[self.flats()[group]]
        runs = {key: state[key].narrow(0, start, count) for key in MOMENTS}
        if self.stage == 3:
            return {"step": state["step"], **{key: kept_run(parameter, run) for key, run in runs.items()}}
        first = place.lp_fragment_address.start
        return {
            "step": state["step"], **{key: FlatPiece(run, first, tuple(parameter.shape)) for key, run in runs.items()}
        }  # fmt: skip

    def no_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Of a parameter whose state is on other ranks."""
        step = self.inner.state[self.flats()[0]]["step"]
        nothing = FlatPiece(parameter.detach().new_empty(0), 0, tuple(parameter.shape))
        return {"step": step, **dict.fromkeys(MOMENTS, nothing)}


class Updates:
    """What the loop and its checkpoints see of DeepSpeed's optimizer: the learning rate, and the state by the model's
    own parameters. The update itself comes with the clipping."""

    def __init__(self, parallel: DeepSpeedParallel) -> None:
        self.parallel = parallel
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0}]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        trained = (parameter for parameter in self.parallel.model.parameters() if parameter.requires_grad)
        return {parameter: self.parallel.moments(parameter) for parameter in trained}

    def step(self) -> None:
        """Nothing is left to do."""


def starts_in_ram(layout: Layout) -> bool:
    """Whether a model is to be filled in the CPU's memory at first, whatever it trains on: not that of one rank alone,
    which no engine takes."""
    return layout.engine == "deepspeed" and layout.zero == 3 and layout.world > 1


def import_deepspeed(device: torch.device) -> Any:
    """The package, told what it runs on; raises UserError where it is not installed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"layout: engine deepspeed: {error}: pip install 'somacube[deepspeed]', or take engine soma"
        ) from error
    deepspeed.utils.logger.setLevel("WARNING")
    if device.type == "cpu":
        # Else it compiles an operator for inference on its first use, on all ranks: 100 s, and a compiler is needed.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def settings(config: TrainConfig, mesh: Mesh, trained: int) -> dict[str, Any]:
    """DeepSpeed's own config, for a model of which so many numbers are trained."""
    rows = config.batch_size // mesh.layout.data_ranks
    micro = config.microbatch_size or rows
    sharing: dict[str, Any] = {"stage": mesh.layout.zero, "reduce_bucket_size": min(trained, BUCKET)}
    if mesh.layout.cpu_offload:
        sharing["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if mesh.layout.zero == 3:
            sharing["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": rows // micro,
        "gradient_clipping": config.grad_clip or 0.0, "steps_per_print": 10**9, "zero_optimization": sharing,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW does it without a compiler
    }  # fmt: skip
