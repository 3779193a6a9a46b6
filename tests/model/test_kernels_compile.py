"""Every kernel compiles for a Hopper GPU (sm_90) without one, uses its tensor cores, and fits its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on sm_90
PROGRAM = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from soma.model.kernels import flash, flash_backward, fused, gemv, paged

FLOATS = {"logsumexp", "delta", "parts"}
INTEGERS = {"starts", "query_starts", "lengths", "tables", "slots"}
POINTERS = {"q", "k", "v", "out", "grad", "dq", "dk", "dv", "keys", "values", "cos", "sin", "x", "residual", "weight",
            "added", "gate", "up", "bias"}


def compile(kernel, warps, stages, fp8=(), **constants):
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "scale_log2", "eps"):
            signature[name] = "fp32"
        else:
            kinds = {"*fp32": FLOATS, "*i32": INTEGERS, "*bf16": POINTERS}
            signature[name] = next((kind for kind, names in kinds.items() if name in names), "i32")
            if name in fp8:
                signature[name] = "*fp8e4nv"
            if signature[name] != "i32" or name.startswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    print(json.dumps({
        "kernel": kernel.__name__ + ("_fp8" if fp8 else ""), "cubin": len(made.asm["cubin"]),
        "shared": made.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"), "cp_async": ptx.count("cp.async.c"),
    }))


def attention(kernel, tile, **constants):
    compile(kernel, tile.warps, tile.stages, BLOCK_M=tile.rows, BLOCK_N=tile.columns, GROUP=4, HEAD=128, BLOCK_E=128,
            **constants)


import torch
half = torch.bfloat16
attention(flash.forward_kernel, flash.forward_tiles(128, half)[0], CAUSAL=True, WINDOWED=True)
attention(flash_backward.key_value_kernel, flash_backward.key_value_tile_sizes(128, half)[0], CAUSAL=True,
          WINDOWED=False)
attention(flash_backward.query_kernel, flash_backward.query_tile_sizes(128, half)[0], CAUSAL=True, WINDOWED=False)
attention(paged.chunk_kernel, paged.chunk_tiles(4, half)[0], PAGE=16, WINDOWED=False)
attention(paged.decode_kernel, paged.decode_tiles(4, half)[0], PAGE=16, WINDOWED=True)
attention(paged.chunk_kernel, paged.chunk_tiles(4, half)[0], fp8=("keys", "values"), PAGE=16, WINDOWED=False)
attention(paged.decode_kernel, paged.decode_tiles(4, half)[0], fp8=("keys", "values"), PAGE=16, WINDOWED=False)
compile(fused.rope_write_kernel, 1, 2, fp8=("keys", "values"), HEAD=80, BLOCK_E=128, BLOCK_R=64, PAGE=16, SATURATE=True)
compile(flash_backward.delta_kernel, 4, 2, HEAD=80, BLOCK_E=128, BLOCK_M=32)
compile(paged.reduce_kernel, 4, 2, HEAD=80, BLOCK_E=128, SPLITS=32)
compile(fused.rms_norm_kernel, 8, 2, WIDTH=4096, BLOCK_D=4096, ADD=True)
compile(fused.rope_write_kernel, 1, 2, HEAD=80, BLOCK_E=128, BLOCK_R=64, PAGE=16, SATURATE=False)
compile(fused.swiglu_kernel, 4, 2, BLOCK_F=1024)
compile(gemv.gemv_kernel, 8, 2, COLUMNS=4096, GATED=True, BIAS=True, ADD=True, BLOCK_K=1024, AHEAD=True, EARLY=True)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What the compiler made of each kernel, in a process of its own: the others here run Triton's interpreter."""
    folder = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    program = folder / "program.py"  # Triton reads the source of what it compiles: kernels come from files
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {record["kernel"]: record for record in map(json.loads, done.stdout.splitlines())}


def test_all_kernels_compile_and_fit(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) == 14
    assert all(record["cubin"] > 1000 and record["shared"] <= SHARED_MEMORY for record in compiled.values())


def test_attention_uses_tensor_cores_and_asynchronous_copies(compiled: dict[str, dict[str, int]]) -> None:
    for name in ("forward_kernel", "key_value_kernel", "query_kernel", "chunk_kernel"):
        assert compiled[name]["wgmma"] > 0 < compiled[name]["cp_async"], compiled[name]
    assert compiled["decode_kernel"]["mma"]
    assert compiled["decode_kernel"]["cp_async"]


def test_elementwise_kernels_have_no_products(compiled: dict[str, dict[str, int]]) -> None:
    """The counts above can be zero."""
    for name in ("delta_kernel", "swiglu_kernel", "rms_norm_kernel", "gemv_kernel"):
        assert not compiled[name]["wgmma"] + compiled[name]["mma"]
