"""Fully sharded data parallelism: torch's FSDP2 over our model (ZeRO, arXiv:1910.02054)."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)  # fmt: skip

from soma.model.moe import MoE
from soma.model.transformer import Transformer
from soma.train.parallel.mesh import Mesh


def apply_shards(model: Transformer, mesh: Mesh) -> None:
    """Cut parameters, gradients and optimizer state over the fsdp (and cp) ranks, a layer at a time.

    Embedding, final norm and head are the root's and stay whole from the forward pass to the end of the backward pass:
    the head's loss runs after `features` and before its backward pass. With `cpu_offload` the pieces lie in the CPU's
    memory (ZeRO-Offload, arXiv:2101.06840).
    """
    dense = mesh.shards
    assert dense is not None
    same_experts = mesh.axis("edp")
    reshard = mesh.layout.zero == 3
    policy = CPUOffloadPolicy(dense.device_type == "cuda") if mesh.layout.cpu_offload else OffloadPolicy()
    for layer in model.layers:
        apart: set[nn.Parameter] = set()
        if isinstance(layer.mlp, MoE) and mesh.layout.ep > 1:
            if same_experts is not None:
                fully_shard(layer.mlp.experts, mesh=same_experts, reshard_after_forward=reshard, offload_policy=policy)
            else:
                apart = set(layer.mlp.experts.parameters())
        fully_shard(layer, mesh=dense, reshard_after_forward=reshard, ignored_params=apart, offload_policy=policy)
    apart = {p for layer in model.layers for p in layer.parameters()}
    fully_shard(model, mesh=dense, reshard_after_forward=False, ignored_params=apart, offload_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each rank's loss is divided by the global count, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")


def begin_microbatch(model: nn.Module, zero: int, last: bool) -> None:
    """What the next backward pass of a sharded model leaves behind.

    Stage 1 adds up whole gradients and reduces them once, stages 1 and 2 keep the parameters together from one
    microbatch to the next, stage 3 cuts everything after each use. Between replicas of the shards (hybrid) all
    stages sum once a step.
    """
    root = cast(FSDPModule, model)
    if zero == 1:
        root.set_requires_gradient_sync(last)
    else:
        root.set_requires_all_reduce(last)
    if zero < 3:
        root.set_reshard_after_backward(last)


class StageShards:
    """The sharded modules of one stage of a pipeline. A schedule says when they are gathered, cut and reduced.

    Between two of these nothing of it happens by itself: forward and backward passes find the parameters together, and
    add to gradients that are whole.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = [module for part in modules for module in part.modules() if isinstance(module, FSDPModule)]
        self.handles: list[Any] = []
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_modules_to_backward_prefetch([module])  # itself: not what ran before it, which has no turn yet

    def unshard(self) -> None:
        """Begin to gather the parameters."""
        self.handles += [module.unshard(async_op=True) for module in self.modules]

    def ready(self) -> None:
        """Wait until they are there."""
        while self.handles:
            handle = self.handles.pop(0)
            if handle is not None:
                handle.wait()

    def reshard(self) -> None:
        """Keep this rank's pieces alone."""
        for module in self.modules:
            module.reshard()

    def reduce(self) -> None:
        """Sum the gradients so far over the ranks; each keeps its piece of the sum.

        FSDP2 has no public call for it: this is what torch's own pipelines do (`perform_reduce_grad`).
        """
        for module in self.modules:
            module.set_requires_gradient_sync(True, recurse=False)
            for group in parameter_groups(module):
                group.post_backward()
            module.set_requires_gradient_sync(False, recurse=False)


def parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of a module's own parameters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # one, by another name, in torch 2.11
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


class PipelineShards:
    """All that a rank of a pipeline has sharded: its stages, and the ends (embedding, final norm, head) that it holds.

    Call `begin` and `finish` around what the schedule does. The ends stay together in between.
    """

    def __init__(self, model: Transformer, mesh: Mesh, stages: dict[int, list[nn.Module]]) -> None:
        apply_shards(model, mesh)
        self.root = cast(FSDPModule, model)
        self.stages = {index: StageShards(layers) for index, layers in stages.items()}
        layers = {id(module) for shards in self.stages.values() for module in shards.modules}
        self.ends = StageShards([])
        self.ends.modules = [module for module in StageShards([model]).modules if id(module) not in layers]
        self.root.set_is_last_backward(False)

    def begin(self) -> None:
        """Before the schedule's first action. The model's own forward pass, which makes it FSDP's root, never runs."""
        self.root._get_fsdp_state()._lazy_init()
        self.ends.unshard()
        self.ends.ready()

    def finish(self, reduce: bool) -> None:
        """After its last: every gradient is a piece of the sum, and every parameter a piece."""
        if reduce:
            self.ends.reduce()
            self.root.set_is_last_backward(True)
            self.root._get_fsdp_state()._root_post_backward_final_callback()
            self.root.set_is_last_backward(False)
        self.ends.reshard()
