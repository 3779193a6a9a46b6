"""Process groups of which each rank knows only those that it is in."""

from collections.abc import Iterable

import torch.distributed as dist

Ranks = tuple[int, ...]  # of the whole world, ascending


def make_groups(wanted: Iterable[Ranks], backend: str | None = None) -> dict[Ranks, dist.ProcessGroup]:
    """A process group for each of `wanted`, the sets of ranks that this rank is in. All ranks of the world must call
    it together, those that want nothing too.

    Everybody makes all groups in one order. `new_group(use_local_synchronization=True)` asks the members alone, but
    torch (2.13) names such a group by its members and by how many groups the rank has: ranks that have been in
    different numbers of groups wait for each other for ever.
    """
    if not dist.is_initialized():
        return {}
    mine = sorted(set(wanted))
    of_all: list[list[Ranks]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, mine)
    made = {}
    for ranks in sorted({ranks for theirs in of_all for ranks in theirs}):
        group = dist.new_group(list(ranks), backend=backend)
        if ranks in mine:
            made[ranks] = group
    return made
