"""One forward pass through a pipeline's stages, one after the other, where no schedule is worth its while."""

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.pipeline.execute import PipelineStep


@torch.no_grad()
def hidden_states(pipeline: PipelineStep, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor | None:
    """Hidden states after the final norm, (B, T, D), on the rank of the last stage; None on the others.

    What a stage puts out goes to all ranks. The pass has no autocast. Sharded stages are gathered for their turn, the
    ends of the model until `pipeline.shards.finish`.
    """
    place = pipeline.schedule.placements[0]
    B, T = tokens_BT.shape
    x_BTD = torch.empty(
        B, T // pipeline.sequence_ranks, pipeline.width, dtype=pipeline.dtype, device=pipeline.device
    )  # fmt: skip
    if pipeline.shards is not None:
        pipeline.shards.begin()
    for index, rank in enumerate(place):
        if rank == pipeline.rank:
            shards = None if pipeline.shards is None else pipeline.shards.stages[index]
            if shards is not None:
                shards.unshard()
                shards.ready()
            entering = x_BTD if index else None
            x_BTD, _ = pipeline.workers[index].stage(entering, tokens_BT, positions_BT, None)
            x_BTD = x_BTD.contiguous()
            if shards is not None:
                shards.reshard()
        if index + 1 < len(place) and place[index + 1] != rank:
            dist.broadcast(x_BTD, group=pipeline.group, group_src=rank)
    return x_BTD if place[-1] == pipeline.rank else None
