"""FlashAttention in Triton's interpreter against float64: outputs and all gradients; a broken mask must not pass."""

import pytest
import torch

from soma.model.kernels.online_softmax import online_attention

pytest.importorskip("triton")

import itertools

from soma.model.kernels import flash, flash_backward, reference, tiles
from soma.model.kernels.flash import flash_attention
from soma.model.kernels.launch import INTERPRETED, Tile

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU these run as benchmarks/attention.py --check")
BOUNDS = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3)}  # output, gradients: relative error


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short documents need several; different for queries and keys."""
    monkeypatch.setattr(flash, "forward_tiles", lambda block_e, dtype: (Tile(16, 32, 4, 1),))
    monkeypatch.setattr(flash_backward, "key_value_tile_sizes", lambda block_e, dtype: (Tile(32, 16, 4, 1),))
    monkeypatch.setattr(flash_backward, "query_tile_sizes", lambda block_e, dtype: (Tile(32, 32, 4, 1),))


def inputs(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Fresh q, k, v and an output gradient, float64 values that `dtype` can hold."""
    shapes = [heads, kv_heads, kv_heads, heads]
    return [torch.randn(tokens, n, width, dtype=torch.float64).to(dtype).double() for n in shapes]


def errors(starts, heads, kv_heads, width, dtype=torch.float32, causal=True, window=None, scale=None) -> list[float]:
    """Relative errors of the output and of dq, dk, dv."""
    *exact, grad = inputs(starts[-1], heads, kv_heads, width, dtype)
    exact = [x.requires_grad_() for x in exact]
    expected = reference.packed_attention(*exact, starts, causal, window, scale)
    expected.backward(grad)
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    longest = max(b - a for a, b in itertools.pairwise(starts))
    found = flash_attention(*ours, torch.tensor(starts, dtype=torch.int32), longest, causal, window, scale)
    assert found.dtype == dtype
    found.backward(grad.to(dtype))
    pairs = [(found, expected)] + [(a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
    return [reference.relative_error(a.detach(), b.detach()) for a, b in pairs]


def check(found: list[float], dtype: torch.dtype) -> None:
    forward, backward = BOUNDS[dtype]
    assert found[0] < forward, found
    assert max(found[1:]) < backward, found


WORKED = [0.76573417, 1.55676994]
VALUES = [[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [3.0, 1.0]]


def test_worked_example_plain() -> None:
    scores, values = torch.tensor([[1.0, 3.0, 0.0, 2.0]], dtype=torch.float64), torch.tensor(VALUES).double()
    out, logsumexp = online_attention([(scores[:, :2], values[:2]), (scores[:, 2:], values[2:])])
    assert out[0].tolist() == pytest.approx(WORKED, abs=1e-8)
    assert logsumexp.item() == pytest.approx(torch.logsumexp(scores, 1).item(), abs=1e-12)


def test_plain_online_softmax_on_random_tiles_and_masked_ones() -> None:
    scores, values = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    scores[2, :5] = -torch.inf  # the whole first tile of a row
    out, _ = online_attention(zip(scores.split([4, 1, 7], 1), values.split([4, 1, 7]), strict=True))
    assert reference.relative_error(out, scores.softmax(1) @ values) < 1e-14


@pytest.mark.parametrize("causal", [False, True])
def test_worked_example_through_the_kernel(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """The last of four tokens scores 1, 3 | 0, 2, keys in two tiles of two."""
    monkeypatch.setattr(flash, "forward_tiles", lambda block_e, dtype: (Tile(4, 2, 4, 1),))
    q, k, v = (torch.zeros(4, 1, 32) for _ in range(3))
    q[3, 0, 0] = 1.0
    k[:, 0, 0] = torch.tensor([1.0, 3.0, 0.0, 2.0])
    v[:, 0, :2] = torch.tensor(VALUES)
    out = flash_attention(q, k, v, torch.tensor([0, 4], dtype=torch.int32), 4, causal=causal, scale=1.0)
    assert out[3, 0, :2].tolist() == pytest.approx(WORKED, abs=1e-6)
    assert not out[3, 0, 2:].any()


@pytest.mark.parametrize(
    ("starts", "heads", "kv_heads", "width", "causal", "window"),
    [
        ([0, 67], 2, 1, 32, True, None),
        ([0, 1, 1, 34, 75], 4, 2, 32, True, None),
        ([0, 33, 70], 2, 2, 64, False, None),
        ([0, 5, 69], 3, 1, 64, True, 7),
        ([0, 71], 2, 1, 80, True, 33),
        ([0, 16, 48], 1, 1, 128, True, None),
        ([0, 35, 40], 2, 2, 128, True, 16),
        ([0, 40], 1, 1, 80, False, None),
    ],
)
def test_against_float64(
    starts: list[int], heads: int, kv_heads: int, width: int, causal: bool, window: int | None
) -> None:
    check(errors(starts, heads, kv_heads, width, torch.float32, causal, window), torch.float32)


def test_random_packings() -> None:
    for _ in range(4):
        lengths = [*torch.randint(0, 40, (int(torch.randint(1, 5, ())),)).tolist(), int(torch.randint(1, 40, ()))]
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        kv_heads, group = int(torch.randint(1, 3, ())), int(torch.randint(1, 4, ()))
        window = None if torch.rand(()) < 0.5 else int(torch.randint(1, 45, ()))
        found = errors(starts, kv_heads * group, kv_heads, 32, torch.float32, True, window, 0.3)
        assert max(found) < 2e-6, (starts, kv_heads, group, window, found)


def test_half_precision() -> None:
    check(errors([0, 20, 61], 2, 1, 64, torch.float16), torch.float16)
    check(errors([0, 45], 2, 1, 80, torch.float16, True, 11), torch.float16)


def test_strided_inputs_and_large_scores() -> None:
    """Heads of one fused projection; scores of some hundreds, where a softmax without its peak would overflow."""
    fused = torch.randn(37, 4, 32) * 12
    q, k, v = fused.split([2, 1, 1], 1)
    out = flash_attention(q, k, v, torch.tensor([0, 37], dtype=torch.int32), 37)
    assert reference.relative_error(out, reference.packed_attention(q.double(), k.double(), v.double(), [0, 37])) < 1e-5


def test_it_is_deterministic_and_compiles_whole() -> None:
    q, k, v, grad = (x.float() for x in inputs(30, 2, 1, 32, torch.float32))
    starts = torch.tensor([0, 11, 30], dtype=torch.int32)

    def run(function) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, starts, 19)
        out.backward(grad)
        return [out.detach(), *(x.grad for x in leaves)]

    eager = run(flash_attention)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(flash_attention), strict=True))
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(eager, run(compiled), strict=True))


def test_wrong_arguments_are_refused() -> None:
    q = torch.randn(4, 2, 36)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(AssertionError, match="head width 36"):
        flash_attention(q, q, q, starts, 4)
    q = torch.randn(4, 2, 32)
    with pytest.raises(AssertionError, match="window"):
        flash_attention(q, q, q, starts, 4, causal=False, window=2)


def sees_one_too_far(rows, keys, length, window, CAUSAL, WINDOWED):
    return (keys < length) & (keys <= rows + 1)


def forgets_the_window(rows, keys, length, window, CAUSAL, WINDOWED):
    return (keys < length) & (keys <= rows)


def test_a_broken_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "visible", sees_one_too_far)
    monkeypatch.setattr(flash_backward, "visible", sees_one_too_far)
    assert min(errors([0, 50], 2, 1, 32)) > 1e-3
    monkeypatch.setattr(flash, "visible", forgets_the_window)
    monkeypatch.setattr(flash_backward, "visible", tiles.visible)
    assert errors([0, 50], 2, 1, 32, window=5)[0] > 1e-3


def test_a_broken_backward_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_backward, "visible", sees_one_too_far)
    found = errors([0, 50], 2, 1, 32)
    assert found[0] < 1e-6 < 1e-3 < min(found[1:])
