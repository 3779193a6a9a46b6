"""The parts of the layouts by themselves, on small numbers that can be followed by hand."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from soma.model.attention import make_mask
from soma.train.optim import orthogonalize
from soma.train.parallel import context
from soma.train.parallel.context import Sight, columns_of, gathered_attention, merge, ring_attention
from soma.train.parallel.groups import make_groups
from soma.train.parallel.local import cut, enter, leave
from soma.train.parallel.matrices import WholeMatrices
from soma.train.parallel.reduce import Reducer
from soma.train.parallel.vocabulary import cross_entropy
from tests.train.pool import Pool

X = [1.0, 2.0, 0.0, 1.0]
W = [[1.0, 2, 5, 6], [3, 4, 7, 8], [2, 0, 3, 1], [-1, 4, 8, 2]]


def linear(inputs: int, outputs: int, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight.data.copy_(weight)
    return layer


def columns_and_rows(rank: int, world_size: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """x·W by columns, then the sum of it by rows; and the gradient of x and of this rank's piece of W."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    first, second = linear(4, 4, torch.tensor(W).T), linear(4, 1, torch.ones(1, 4))
    cut(first, "weight", mesh, [Shard(0)])
    cut(second, "weight", mesh, [Shard(1)])
    x_BTD = torch.tensor([[X]], requires_grad=True)
    half = first(enter(x_BTD, mesh.get_group(), False))
    out = leave(second(half), mesh.get_group(), False)
    out.backward()
    assert x_BTD.grad is not None
    assert isinstance(first.weight, Tensor)
    grad = first._parameters["weight"].grad  # type: ignore[union-attr]
    assert isinstance(grad, DTensor)
    return half.flatten().tolist(), out.flatten().tolist(), x_BTD.grad.flatten().tolist(), grad.to_local()[0].tolist()


def test_worked_example(pool: Pool) -> None:
    """x = [1, 2, 0, 1] times W split by columns on two ranks: [6, 14 | 27, 24]; summed by rows on one: 71."""
    (left, total, grad_x, grad_w), (right, *_) = pool.run(columns_and_rows, 2)
    assert (left, right) == ([6.0, 14.0], [27.0, 24.0])
    assert total == [71.0]
    assert grad_x == [14.0, 22.0, 6.0, 13.0]  # the sums of W's rows
    assert grad_w == X


def vocabulary(rank: int, world_size: int) -> tuple[float, float, float]:
    """The worked number of `cross_entropy`, and random scores against torch: differences of loss and gradient."""
    group = dist.group.WORLD
    assert group is not None
    worked = cross_entropy(torch.tensor([[0.0, math.log(3)]])[:, rank : rank + 1], torch.tensor([1]), rank, group)
    torch.manual_seed(1)
    logits, targets = torch.randn(7, 10) * 5, torch.tensor([0, 9, 4, 5, -100, 2, 7])
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole, targets, ignore_index=-100, reduction="none")
    expected.pow(2).sum().backward()
    part = logits[:, 5 * rank : 5 * rank + 5].clone().requires_grad_()
    ours = cross_entropy(part, targets, 5 * rank, group)
    ours.pow(2).sum().backward()
    assert whole.grad is not None
    assert part.grad is not None
    gap = (part.grad - whole.grad[:, 5 * rank : 5 * rank + 5]).abs().max()
    return float(worked), float((ours - expected).abs().max()), float(gap)


def test_vocabulary(pool: Pool) -> None:
    for worked, loss, gradient in pool.run(vocabulary, 2):
        assert worked == pytest.approx(math.log(4 / 3), abs=1e-6)
        assert loss < 1e-5
        assert gradient < 1e-5


def test_merge() -> None:
    out, lse = torch.zeros(1, 1), torch.full((1,), float("-inf"))
    merge(out, lse, torch.full((1, 2), float("-inf")), torch.ones(2, 1))  # a block that is not seen at all
    assert (out.item(), lse.item()) == (0.0, float("-inf"))
    merge(out, lse, torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    merge(out, lse, torch.tensor([[math.log(3)]]), torch.tensor([[5.0]]))
    assert out.item() == pytest.approx(4.0)


def test_columns() -> None:
    assert columns_of(16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert columns_of(16, 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


ATTENTION = [(None, False), (None, True), (5, True), (5, False)]


def attention(rank: int, world_size: int, method: str, seed: int, fault: bool) -> list[float]:
    """Largest difference of output and gradients from one process, for windows and documents; T = 32."""
    B, H, K, T, E, V = 2, 4, 2, 32, 8, 6
    group = dist.group.WORLD
    assert group is not None
    columns = torch.from_numpy(columns_of(T, world_size, rank))
    gaps = []
    for window, has_documents in ATTENTION:
        torch.manual_seed(seed)
        q, k, v, weight = (torch.randn(B, heads, T, width) for heads, width in ((H, E), (K, E), (K, V), (H, V)))
        documents = torch.sort(torch.randint(0, 4, (B, T))).values if has_documents else None
        wholes = [x.clone().requires_grad_() for x in (q, k, v)]
        mask = make_mask(T, 0, window, documents, q.device)
        out = F.scaled_dot_product_attention(*wholes, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        (out * weight).sum().backward()
        parts = [x[:, :, columns].clone().requires_grad_() for x in (q, k, v)]
        places = torch.stack([torch.from_numpy(columns_of(T, world_size, other)) for other in range(world_size)])
        ids = None if documents is None else torch.stack([documents[:, columns_] for columns_ in places])
        sight = Sight(group, places.roll(1, 0) if fault else places, ids, window)
        attend = ring_attention if method == "ring" else gathered_attention
        ours = attend(*parts, None, sight)
        (ours * weight[:, :, columns]).sum().backward()
        gaps.append(float((ours - out[:, :, columns]).abs().max()))
        for part, whole in zip(parts, wholes, strict=True):
            assert part.grad is not None
            assert whole.grad is not None
            gaps.append(float((part.grad - whole.grad[:, :, columns]).abs().max()))
    return gaps


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention(pool: Pool, method: str, ranks: int) -> None:
    """Within 2e-5 in fp32, on fresh inputs; with the places of another rank it is not."""
    seed = int(torch.randint(0, 2**31, ()))
    assert max(max(gaps) for gaps in pool.run(attention, ranks, method, seed, False)) < 2e-5, seed
    assert max(max(gaps) for gaps in pool.run(attention, ranks, method, seed, True)) > 1e-2, seed


def small_chunks(rank: int, world_size: int, seed: int) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "QUERIES", 3)
        return attention(rank, world_size, "ring", seed, False)


def test_attention_in_small_chunks(pool: Pool) -> None:
    assert max(max(gaps) for gaps in pool.run(small_chunks, 2, 7)) < 2e-5


def whole_matrices(rank: int, world_size: int, shape: tuple[int, ...], cuts: list[int]) -> float:
    """Largest difference of Muon's direction on cut matrices from that on whole ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(3)
    wholes = [torch.randn(shape) for _ in range(3)]  # fewer than ranks: one rank has none
    placements = [Shard(dimension) for dimension in cuts]
    pieces: list[Any] = [distribute_tensor(x, mesh, placements, src_data_rank=None) for x in wholes]
    updates = WholeMatrices(pieces).map(orthogonalize, pieces, [piece.to_local() for piece in pieces])
    gap = 0.0
    for whole, piece, update in zip(wholes, pieces, updates, strict=True):
        expected: Any = distribute_tensor(orthogonalize(whole), mesh, placements, src_data_rank=None)
        gap = max(
            gap, float((update - expected.to_local()).abs().max()), 0.0 if update.shape == piece.to_local().shape else 9
        )
    return gap


@pytest.mark.parametrize(
    ("shape", "cuts"), [((8, 6), [0, 1]), ((7, 5), [0, 0]), ((4, 6, 5), [0, 2]), ((4, 6, 5), [0, 0]), ((5, 9), [1, 0])]
)
def test_muon_sees_whole_matrices(pool: Pool, shape: tuple[int, ...], cuts: list[int]) -> None:
    assert max(pool.run(whole_matrices, 4, shape, cuts)) < 1e-5


def neighbours(rank: int, world_size: int) -> list[tuple[tuple[int, ...], float]]:
    """Groups of a chain, made twice: the ranks at its ends are in fewer groups than the others."""
    chain = [(lower, lower + 1) for lower in range(world_size - 1)]
    found = []
    for _ in range(2):
        for ranks, group in make_groups(pair for pair in chain if rank in pair).items():
            value = torch.tensor([float(rank)])
            dist.all_reduce(value, group=group)
            found.append((ranks, value.item()))
    assert make_groups(()) == {}
    return found


def test_groups_of_unequal_numbers(pool: Pool) -> None:
    ends = pool.run(neighbours, 4)
    assert ends[0] == [((0, 1), 1.0)] * 2
    assert ends[2] == [((1, 2), 3.0), ((2, 3), 5.0)] * 2


def overlap(rank: int, world_size: int, has_first: bool) -> tuple[int, int, list[list[float]]]:
    """How many buckets are on their way when the backward pass returns: after a first microbatch, after the last."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for layer in layers:
        layer.weight.data.fill_(0.1)  # type: ignore[union-attr]
    group = dist.group.WORLD
    assert group is not None
    parameters = list(layers.parameters())
    first = parameters[2:] if has_first else []  # it has its gradient before the others have
    reducer = Reducer(parameters, parameters[:1], group, bucket_bytes=64, first=first)
    started = []
    for last in (False, True):
        reducer.last = last
        layers(torch.full((1, 4), float(rank + 1))).sum().backward()
        started.append(len(reducer.running))
    reducer.finish()
    return started[0], started[1], [p.grad[0].tolist() for p in parameters]  # type: ignore[index]


@pytest.mark.parametrize("has_first", [False, True])
def test_sums_overlap_the_backward_pass(pool: Pool, has_first: bool) -> None:
    """Nothing travels before the last microbatch; then all but the late bucket have started when it ends."""
    (first, last, mine), (_, _, other) = pool.run(overlap, 2, has_first)
    assert (first, last) == (0, 2)
    assert mine == other
    assert mine[0] == pytest.approx([2 * (1 + 2) * 0.16] * 4)
