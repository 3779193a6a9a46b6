"""The grid of ranks: one DeviceMesh that the weights are cut over, and views of the same ranks for tokens and experts.

Ranks count through pp × dp × fsdp × cp × tp, the last fastest. Weights are cut over fsdp and cp alike, so these two are
one dimension (`shard`) of the weights' mesh. The experts' view splits the dp × fsdp × cp ranks into edp × ep: the ep
ranks of a group hold different experts, the edp ranks the same ones.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from soma.train.parallel.config import GRID, Layout


@dataclass(frozen=True)
class Mesh:
    """A resolved layout and this process's place in it.

    `axes`: one-dimensional meshes by name: the grid's dimensions, `tokens` (all ranks with different tokens: dp ×
    fsdp × cp), `edp` and `ep`. Those along which this rank is alone are not there. `shards`: what FSDP cuts dense
    weights over, one-dimensional, or two-dimensional with replicas first. `experts`: what the experts' tensors are cut
    over before FSDP: ep × tp.
    """

    layout: Layout
    rank: int = 0
    axes: dict[str, DeviceMesh] = field(default_factory=dict)
    shards: DeviceMesh | None = None
    experts: DeviceMesh | None = None

    @cached_property
    def place(self) -> dict[str, int]:
        """This rank's coordinate along each dimension of the grid."""
        rest, place = self.rank, {}
        for name in reversed(GRID):
            rest, place[name] = divmod(rest, getattr(self.layout, name))
        return place

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @property
    def data_rank(self) -> int:
        """Which rows of the batch are this rank's: a number below dp × fsdp."""
        return self.place["dp"] * self.layout.fsdp + self.place["fsdp"]

    def axis(self, name: str) -> DeviceMesh | None:
        """The one-dimensional mesh of a name; None if this rank is alone in it."""
        return self.axes.get(name)

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of an axis; None if this rank is alone in it."""
        return self.axes[name].get_group() if name in self.axes else None


def make_mesh(layout: Layout, device_type: str) -> Mesh:
    """The mesh of a layout that is resolved for the ranks of the default process group; all ranks call it together."""
    if layout.world == 1:  # FSDP2 is what offloads: it gets a mesh of this rank
        alone = init_device_mesh(device_type, (1,), mesh_dim_names=("shard",)) if layout.cpu_offload else None
        return Mesh(layout, shards=alone)
    assert dist.get_world_size() == layout.world, (dist.get_world_size(), layout)
    assert layout.dp is not None
    shard = layout.fsdp * layout.cp
    weights = grid(device_type, pp=layout.pp, dp=layout.dp, shard=shard, tp=layout.tp)
    names = weights.mesh_dim_names or ()
    axes = {name: weights[name] for name in names if name != "shard"}
    if "dp" in names and "shard" in names:
        axes["tokens"] = weights["dp", "shard"]._flatten("tokens")
    elif "dp" in names or "shard" in names:
        axes["tokens"] = weights["dp" if "dp" in names else "shard"]
    if layout.cp > 1:
        axes["cp"] = (
            axes["tokens"] if layout.fsdp * layout.dp == 1
            else grid(device_type, outer=layout.pp * layout.data_ranks, cp=layout.cp, tp=layout.tp)["cp"]
        )  # fmt: skip
    shards = None
    if layout.fsdp > 1:
        shards = weights["dp", "shard"] if layout.dp > 1 else weights["shard"]
    experts = weights["tp"] if layout.tp > 1 else None
    if layout.ep > 1:
        same = layout.data_ranks * layout.cp // layout.ep
        view = grid(device_type, pp=layout.pp, edp=same, ep=layout.ep, tp=layout.tp)
        experts = view["ep", "tp"] if layout.tp > 1 else view["ep"]
        axes |= {name: view[name] for name in ("edp", "ep") if name in (view.mesh_dim_names or ())}
    return Mesh(layout, dist.get_rank(), axes, shards, experts)


def grid(device_type: str, **sizes: int) -> DeviceMesh:
    """A DeviceMesh of the dimensions that are larger than 1."""
    wide = {name: size for name, size in sizes.items() if size > 1}
    return init_device_mesh(device_type, tuple(wide.values()), mesh_dim_names=tuple(wide))
