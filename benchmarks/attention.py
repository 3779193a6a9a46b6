"""Our Triton attention on a GPU: FlashAttention against torch's SDPA, and paged decode against a plain copy.

`--check` first holds every kernel to a float64 reference at a stated bound for each dtype and stops at the first miss.
TFLOP/s count two products of 2·T²·E / 2 a head forward (causal), and 3.5 times that for forward and backward; GB/s
count the keys and values read once.

    python benchmarks/attention.py --check --json
"""

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
from common import Case, compare, finish, parser
from torch import Tensor

from soma.model.kernels import flash, flash_backward, fused, paged, reference
from soma.model.kernels.flash import flash_attention
from soma.model.kernels.launch import Tile
from soma.model.kernels.paged import paged_attention

BAR_TFLOPS = 400.0
DEVICE = torch.device("cuda")
# Largest relative error ‖found - expected‖ / ‖expected‖ of outputs and of gradients.
BOUNDS = {torch.float32: (2e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1.5e-2)}
TILES = [(flash, "forward_tiles"), (flash_backward, "key_value_tile_sizes"), (flash_backward, "query_tile_sizes"),
         (paged, "chunk_tiles"), (paged, "decode_tiles")]  # fmt: skip


def main() -> None:
    arguments = parser("attention", __doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="hold every kernel to float64 before measuring")
    arguments.add_argument("--only-check", action="store_true", help="check and measure nothing")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py measures GPU kernels and found no CUDA GPU")
    torch.manual_seed(time.time_ns() % 2**31)
    if options.check or options.only_check:
        check()
    if not options.only_check:
        cases = [*measure_flash(options), *measure_packed(options), *measure_decode(options)]
        finish("attention", options, cases, packages=["triton"])


@contextmanager
def one_tile(choose: Callable[[tuple[Tile, ...]], tuple[Tile, ...]] = lambda tiles: tiles[:1]) -> Iterator[None]:
    """Tile sizes cut down to one, so that a check compiles one kernel and not one for every choice."""
    before = [getattr(module, name) for module, name in TILES]
    for (module, name), function in zip(TILES, before, strict=True):
        setattr(module, name, lambda *words, function=function: choose(function(*words)))
    yield
    for (module, name), function in zip(TILES, before, strict=True):
        setattr(module, name, function)


def check() -> None:
    """All kernels against float64; raises AssertionError at the first error over its bound."""
    random_starts = [0, *torch.randint(0, 600, (6,)).cumsum(0).tolist()]
    random_starts.append(random_starts[-1] + 1 + int(torch.randint(400, ())))
    odd = [0, 1, 130, 130, 777, 1500]
    with one_tile():
        for dtype, width, heads, kv_heads, causal, window, starts in [
            (torch.bfloat16, 128, 4, 1, True, None, odd), (torch.bfloat16, 128, 4, 1, True, None, random_starts),
            (torch.bfloat16, 128, 4, 1, True, 200, random_starts), (torch.bfloat16, 64, 2, 2, False, None, odd),
            (torch.bfloat16, 80, 6, 2, True, None, random_starts), (torch.bfloat16, 32, 4, 2, True, 33, odd),
            (torch.float16, 128, 4, 1, True, None, random_starts), (torch.float16, 80, 4, 4, True, 100, odd),
            (torch.float32, 64, 4, 2, True, None, odd), (torch.float32, 128, 2, 1, True, 100, [0, 333, 500]),
            (torch.bfloat16, 256, 2, 1, True, None, odd),
        ]:  # fmt: skip
            check_flash(dtype, width, heads, kv_heads, causal, window, starts)
        for dtype, width, window in [
            (torch.bfloat16, 128, None), (torch.bfloat16, 128, 150), (torch.bfloat16, 64, None),
            (torch.float16, 80, 77), (torch.float32, 64, None),
        ]:  # fmt: skip
            check_paged(dtype, width, window, new=[1, 300, 17, 64, 1], before=[900, 0, 250, 64, 0])
            check_paged(dtype, width, window, new=[1] * 6, before=[0, 15, 16, 1000, 2047, 333])
        for dtype in BOUNDS:
            check_fused(dtype)
    for index in range(1, 5):  # the other tile sizes of the shape that is measured
        with one_tile(lambda tiles, index=index: tiles[index : index + 1] or tiles[-1:]):
            check_flash(torch.bfloat16, 128, 4, 1, True, None, odd)
    print("check: every kernel is within its bounds", file=sys.stderr, flush=True)


def require(name: str, dtype: torch.dtype, pairs: list[tuple[Tensor, Tensor]], bounds: list[float]) -> None:
    """Assert that each (found, expected) is within its bound; say how far off they are."""
    errors = [reference.relative_error(found.detach(), expected.detach()) for found, expected in pairs]
    shown = " ".join(f"{error:.1e}" for error in errors)
    print(f"  check {name} {str(dtype).removeprefix('torch.')}: {shown}", file=sys.stderr, flush=True)
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (name, dtype, errors, bounds)


def check_flash(
    dtype: torch.dtype, width: int, heads: int, kv_heads: int, causal: bool, window: int | None, starts: list[int]
) -> None:
    """Output and three gradients; and with the window forgotten, or the documents joined, it must not pass."""
    shapes = [(starts[-1], count, width) for count in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference.packed_attention(*exact, starts, causal, window)
    expected.backward(grad.double())
    ours = [x.clone().requires_grad_() for x in inputs]
    longest = max(b - a for a, b in itertools.pairwise(starts))
    found = flash_attention(*ours, torch.tensor(starts, dtype=torch.int32, device=DEVICE), longest, causal, window)
    found.backward(grad)
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    forward, backward = BOUNDS[dtype]
    require(f"flash E={width} H={heads}/{kv_heads} causal={causal} window={window} T={starts[-1]}", dtype, pairs,
            [forward, backward, backward, backward])  # fmt: skip
    joined = torch.tensor([0, starts[-1]], dtype=torch.int32, device=DEVICE)
    wrong = flash_attention(*inputs, joined, starts[-1], causal, None)
    assert reference.relative_error(wrong, expected.detach()) > 5 * forward, "a broken mask passed"


def paged_case(
    dtype: torch.dtype, width: int, heads: int, kv_heads: int, new: list[int], before: list[int], page: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `paged_attention`: random queries and cache, blocks in random order."""
    lengths = [a + b for a, b in zip(new, before, strict=True)]
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts), device=DEVICE).int()
    tables = torch.zeros(len(new), max(counts), dtype=torch.int32, device=DEVICE)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    shape = (sum(counts), kv_heads, page, width)
    keys, values = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2))
    q = torch.randn(sum(new), heads, width, device=DEVICE, dtype=dtype)
    starts = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    return q, keys, values, starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), tables


def check_paged(dtype: torch.dtype, width: int, window: int | None, new: list[int], before: list[int]) -> None:
    """Mixed chunks, or decode with every number of splits that makes a difference."""
    q, keys, values, starts, lengths, tables = paged_case(dtype, width, 8, 2, new, before)
    expected = reference.paged_attention(
        q.double(), keys.double(), values.double(), starts.tolist(), lengths.tolist(), tables, window
    )
    decoding = len(new) == sum(new)
    for splits in (1, 5, None) if decoding else (None,):
        found = paged_attention(q, keys, values, starts, lengths, tables, window, splits=splits)
        name = f"paged {'decode' if decoding else 'chunks'} E={width} window={window} splits={splits}"
        require(name, dtype, [(found, expected)], [BOUNDS[dtype][0]])
    wrong = paged_attention(q, keys, values, starts, lengths, tables.flip(0), window)
    assert reference.relative_error(wrong, expected) > 5 * BOUNDS[dtype][0], "a wrong table passed"


def check_fused(dtype: torch.dtype) -> None:
    """Norm, norm of the residual sum, RoPE with the cache write, SwiGLU."""
    bound = BOUNDS[dtype][0]
    x, residual = (torch.randn(77, 4096, device=DEVICE, dtype=dtype) for _ in range(2))
    weight = torch.randn(4096, device=DEVICE, dtype=dtype)
    out, added = fused.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(added, x + residual)
    pairs = [
        (fused.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)),
        (out, reference.rms_norm(added.double(), weight.double(), 1e-5)),
        (fused.swiglu(x, residual), reference.swiglu(x.double(), residual.double())),
    ]
    q, k, v = torch.randn(77, 8 + 2 + 2, 80, device=DEVICE, dtype=dtype).split([8, 2, 2], 1)
    angle = torch.rand(77, 40, device=DEVICE) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (torch.randn(9, 2, 16, 80, device=DEVICE, dtype=dtype) for _ in range(2))
    slots = torch.randperm(9 * 16, device=DEVICE)[:77]
    rotated_k = reference.rotate(k.double(), cos.double(), sin.double())
    expected_keys, expected_values = reference.write(rotated_k, keys, slots), reference.write(v, values, slots)
    rotated_q = fused.rope_write(q, k, v, cos, sin, keys, values, slots.int())
    pairs += [(rotated_q, reference.rotate(q.double(), cos.double(), sin.double())), (keys, expected_keys)]
    assert torch.equal(values, expected_values)
    require("fused norm, add+norm, swiglu, rope q, rope k", dtype, pairs, [bound] * 5)


def timed(amount: float, function: Callable[[], object]) -> Callable[[], float]:
    """A run that returns `amount` a second (median of many launches)."""
    return lambda: amount / (triton.testing.do_bench(function, warmup=50, rep=300, return_mode="median") * 1e-3)


def both_ways(out: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Forward and backward of `out` with respect to `leaves`."""
    return lambda: torch.autograd.grad(out(), leaves, grad)


def measure_flash(options: Namespace) -> list[Case]:
    """Causal attention of 8,192 tokens, head size 128, bf16: two sequences of 16 heads, one of Llama-3-8B's GQA."""
    cases = []
    for name, batch, heads, kv_heads in [("16 heads", 2, 16, 16), ("32/8 heads", 1, 32, 8)]:
        tokens, width = 8192, 128
        q, k, v = (
            torch.randn(batch * tokens, n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        )
        q4, k4, v4 = (
            x.detach().view(batch, tokens, -1, width).transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)
        )
        starts = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=DEVICE)
        grad, grad4 = torch.randn_like(q), torch.randn_like(q4)

        def ours(q=q, k=k, v=v, starts=starts, tokens=tokens) -> Tensor:
            return flash_attention(q, k, v, starts, tokens)

        def theirs(q4=q4, k4=k4, v4=v4, gqa=heads != kv_heads) -> Tensor:
            return F.scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=gqa)

        def detached(function: Callable[[], Tensor]) -> Callable[[], object]:
            def run() -> None:
                with torch.no_grad():
                    function()

            return run

        work = batch * heads * 4 * tokens**2 * width / 2 * 1e-12
        cases += compare(
            f"forward {name}", "TFLOP/s", timed(work, detached(ours)),
            {"torch SDPA": timed(work, detached(theirs)), "the bar": lambda: BAR_TFLOPS},
            bars={"the bar": 1.0}, rounds=options.rounds, warmup=options.warmup,
        )  # fmt: skip
        cases += compare(
            f"forward+backward {name}", "TFLOP/s", timed(3.5 * work, both_ways(ours, [q, k, v], grad)),
            {"torch SDPA": timed(3.5 * work, both_ways(theirs, [q4, k4, v4], grad4))},
            rounds=options.rounds, warmup=options.warmup,
        )  # fmt: skip
    return cases


def measure_packed(options: Namespace) -> list[Case]:
    """A training microbatch of packed documents, 8,192 tokens, against SDPA with a dense mask."""
    tokens, heads, width = 8192, 16, 128
    cuts = torch.randperm(tokens - 1)[:15].add(1).sort().values.tolist()
    starts = torch.tensor([0, *cuts, tokens], dtype=torch.int32, device=DEVICE)
    q, k, v = (
        torch.randn(tokens, heads, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    documents = torch.bucketize(torch.arange(tokens, device=DEVICE), starts[1:], right=True)
    mask = (documents[:, None] == documents[None, :]).tril()
    q4, k4, v4 = (x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v))
    grad, grad4 = torch.randn_like(q), torch.randn_like(q4)
    return compare(
        "forward+backward, 16 packed documents", "tokens/s",
        timed(tokens, both_ways(lambda: flash_attention(q, k, v, starts, tokens), [q, k, v], grad)),
        {
            "torch SDPA, dense mask": timed(
                tokens,
                both_ways(lambda: F.scaled_dot_product_attention(q4, k4, v4, attn_mask=mask), [q4, k4, v4], grad4),
            )
        },
        rounds=options.rounds, warmup=options.warmup,
    )  # fmt: skip


def measure_decode(options: Namespace) -> list[Case]:
    """One new token for each sequence, Llama-3-8B's heads (32/8 of 128), bf16: keys and values read a second."""
    cases = []
    big = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(big)
    for name, count, length in [("64 x 4,096", 64, 4096), ("256 x 1,024", 256, 1024), ("1 x 32,768", 1, 32768)]:
        case = paged_case(torch.bfloat16, 128, 32, 8, [1] * count, [length - 1] * count)
        gigabytes = count * length * 8 * 128 * 2 * 2 * 1e-9
        k4, v4 = (torch.randn(count, 8, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        q4 = torch.randn(count, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        cases += compare(
            f"paged decode {name}", "GB/s", timed(gigabytes, lambda case=case: paged_attention(*case)),
            {
                "copy of 1 GiB": timed(2 * big.numel() * 1e-9, lambda: target.copy_(big)),
                "torch SDPA, contiguous cache": timed(
                    gigabytes,
                    lambda q=q4, k=k4, v=v4: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                ),
            },
            rounds=options.rounds, warmup=options.warmup,
        )  # fmt: skip
    return cases


if __name__ == "__main__":
    main()
