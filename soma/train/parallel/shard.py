"""Fully sharded data parallelism: torch's FSDP2 over our model (ZeRO, arXiv:1910.02054)."""

from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from soma.model.moe import MoE
from soma.model.transformer import Transformer
from soma.train.parallel.mesh import Mesh


def apply_shards(model: Transformer, mesh: Mesh) -> None:
    """Cut parameters, gradients and optimizer state over the fsdp (and cp) ranks, a layer at a time.

    Embedding, final norm and head are the root's and stay whole from the forward pass to the end of the backward pass:
    the head's loss runs after `features` and before its backward pass.
    """
    dense = mesh.shards
    assert dense is not None
    same_experts = mesh.axis("edp")
    reshard = mesh.layout.zero == 3
    for layer in model.layers:
        apart: set[nn.Parameter] = set()
        if isinstance(layer.mlp, MoE) and mesh.layout.ep > 1:
            if same_experts is not None:
                fully_shard(layer.mlp.experts, mesh=same_experts, reshard_after_forward=reshard)
            else:
                apart = set(layer.mlp.experts.parameters())
        fully_shard(layer, mesh=dense, reshard_after_forward=reshard, ignored_params=apart)
    apart = {p for layer in model.layers for p in layer.parameters()}
    fully_shard(model, mesh=dense, reshard_after_forward=False, ignored_params=apart)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each rank's loss is divided by the global count, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")


def begin_microbatch(model: nn.Module, zero: int, last: bool) -> None:
    """What the next backward pass of a sharded model leaves behind.

    Stage 1 adds up whole gradients and reduces them once, stages 1 and 2 keep the parameters together from one
    microbatch to the next, stage 3 cuts everything after each use.
    """
    root = cast(FSDPModule, model)
    if zero == 1:
        root.set_requires_gradient_sync(last)
    if zero < 3:
        root.set_reshard_after_backward(last)
