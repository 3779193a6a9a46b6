"""The step in C over the paged cache against the Transformer: every trait of the families that it runs, any batch."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_config
from torch import Tensor

from soma.base import progress
from soma.base.machine import Compiler
from soma.engine import build
from soma.engine.batch import Batch, make_batch
from soma.engine.largest import largest
from soma.engine.load import load_model_for
from soma.engine.native import NativeModel
from soma.model.config import ModelConfig
from soma.model.hub import load_model, save_model
from soma.model.quantized import GROUP, quantize
from soma.model.transformer import Transformer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "odd sizes": {"hidden_size": 60, "head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3,
                  "intermediate_size": 101},
    "wide heads": {"head_dim": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "window": {"family": "mistral", "sliding_window": 9},
    "mixed windows": {"sliding_window": 9, "layer_types": ("sliding_attention", "full_attention")},
    "yarn": {"rope_scaling": YARN},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip
V = 203
BLOCKS = 64


def make_model(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    model = Transformer(make_config(V, **SHAPES[shape]), dtype=dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # biases and gains that do something
        if name.endswith("bias") or "norm" in name:
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def make_native(model: Transformer, block_size: int = 16) -> NativeModel:
    """In a cache that holds NaN wherever no token was written: what reads there is seen."""
    shape = (BLOCKS, model.config.num_key_value_heads, block_size, model.config.head_dim)
    keys, values = (
        [torch.full(shape, float("nan"), dtype=model.dtype) for _ in model.layers] for _ in ("keys", "values")
    )
    return NativeModel(model, keys, values, block_size)


def random_ids(seed: int, count: int) -> list[int]:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_run(native: NativeModel, texts: list[list[int]], seed: int, single: bool = False) -> list[Tensor]:
    """Logits (tokens, V) of each text, computed in batches of random members and chunks, in random blocks."""
    rng = np.random.default_rng(seed)
    block_size = native.model.block_size
    free = rng.permutation(BLOCKS).astype(np.int32)
    tables, done = [], [0] * len(texts)
    for text in texts:
        count = -(-len(text) // block_size)
        tables.append(free[:count])
        free = free[count:]
    parts: list[list[Tensor]] = [[] for _ in texts]
    while open_ := [s for s, text in enumerate(texts) if done[s] < len(text)]:
        chosen = rng.permutation([s for s in open_ if rng.random() < 0.7] or open_[:1]).tolist()
        counts = [
            min(1 if single or rng.random() < 0.5 else int(rng.integers(2, 90)), len(texts[s]) - done[s])
            for s in chosen
        ]
        news = [texts[s][done[s] : done[s] + count] for s, count in zip(chosen, counts, strict=True)]
        used = [tables[s][: -(-(done[s] + count) // block_size)] for s, count in zip(chosen, counts, strict=True)]
        batch = make_batch(news, [done[s] for s in chosen], counts, used, np.arange(sum(counts)), block_size)
        for s, logits, count in zip(chosen, native.step(batch).split(counts), counts, strict=True):
            parts[s].append(logits)
            done[s] += count
    return [torch.cat(part) for part in parts]


def exact_logits(model: Transformer, texts: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([text]))[0].float() for text in texts]


TEXTS = [random_ids(seed, count) for seed, count in enumerate((150, 1, 33, 70, 64))]


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if build.library(torch.float32) is None:
        pytest.skip("no C compiler")


@pytest.mark.parametrize(("threads", "block_size"), [(1, 16), (3, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits(shape: str, threads: int, block_size: int) -> None:
    """Within 1e-4 of logits whose spread is above 1."""
    model = make_model(shape, seed=len(shape))
    native = make_native(model, block_size)
    native.threads = threads
    for ours, right in zip(random_run(native, TEXTS, threads), exact_logits(model, TEXTS), strict=True):
        assert right.std() > 1
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "odd sizes", "qwen2", "qwen3", "window", "wide heads"])
def test_bf16_logits_are_nearer_to_the_truth_than_torch(shape: str) -> None:
    """Against the same weights in float32: our mean error is below that of the bf16 Transformer, and below 2 %."""
    model = make_model(shape, torch.bfloat16, seed=len(shape))
    exact = make_model(shape, seed=len(shape))
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    right, torchs = torch.cat(exact_logits(exact, TEXTS)), torch.cat(exact_logits(model, TEXTS))
    ours = torch.cat(random_run(make_native(model), TEXTS, 1))
    error, other = (ours - right).abs().mean() / right.std(), (torchs - right).abs().mean() / right.std()
    assert error < 0.02
    assert error < other


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 4)])
def test_a_token_does_not_depend_on_its_company(dtype: torch.dtype, bits: int) -> None:
    """Token by token, alone or beside a few others' tokens: the same logits to the last bit."""
    model = make_model("qwen3", dtype)
    if bits:
        quantize(model, bits)
    texts = [random_ids(seed, 20) for seed in range(9)]
    alone = [random_run(make_native(model), [text], 1, single=True)[0] for text in texts]
    together = random_run(make_native(model), texts, 2, single=True)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def spoil_table(native: NativeModel) -> None:
    native.model.sines += 4


def spoil_window(native: NativeModel) -> None:
    native.model.layer[0].window = 0


def spoil_norm(native: NativeModel) -> None:
    native.model.layer[1].k_norm = native.model.layer[1].q_norm


def spoil_linear(native: NativeModel) -> None:
    native.model.layer[1].k = native.model.layer[1].v


@pytest.mark.parametrize(
    ("shape", "spoil"),
    [("llama", spoil_table), ("window", spoil_window), ("qwen3", spoil_norm), ("llama", spoil_linear)],
)
def test_a_wrong_step_would_be_seen(shape: str, spoil: Any) -> None:
    model = make_model(shape)
    native = make_native(model)
    native._rotate_up_to(256)
    spoil(native)
    ours, right = torch.cat(random_run(native, TEXTS, 1)), torch.cat(exact_logits(model, TEXTS))
    assert (ours - right).abs().max() > 1e-2


def rounded(x_RK: Tensor) -> Tensor:
    """x as the kernels see it: a group of 32 numbers rounded to 8 bits."""
    padded = torch.nn.functional.pad(x_RK, (0, -x_RK.size(1) % GROUP))
    groups = padded.view(len(x_RK), -1, GROUP)
    top = groups.abs().amax(-1, keepdim=True)
    return ((groups * (127 / top)).round() * (top.double() / 127)).view(padded.shape)[:, : x_RK.size(1)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["llama", "odd sizes"])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 29])
def test_quantized_product(shape: str, bits: int, rows: int) -> None:
    """lm_head from hidden states, in float64 from the rounded numbers: within 1e-5 of their spread."""
    model = quantize(make_model(shape), bits)
    batch = one_text(random_ids(rows, 40), np.arange(rows))
    logits_RV, hidden_RD = make_native(model).forward(batch)
    weight_VD = model.get_submodule("lm_head").dequantize().double()  # type: ignore[operator]
    right_RV = rounded(hidden_RD) @ weight_VD.T
    assert (logits_RV - right_RV).abs().max() < 1e-5 * right_RV.std()
    unrounded_RV = hidden_RD.double() @ weight_VD.T  # negative control: the rounding of activations is seen
    assert (logits_RV - unrounded_RV).abs().max() > 1e-4 * right_RV.std()


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("shape", ["llama", "odd sizes"])
def test_product_of_many_tokens(shape: str, bits: int) -> None:
    """In bf16, with more tokens than tiles of bytes are for: lm_head within 2 % of the spread, 0.3 % in the mean."""
    model = make_model(shape, torch.bfloat16)
    if bits:
        quantize(model, bits)
    rows = 117
    logits_RV, hidden_RD = make_native(model).forward(one_text(random_ids(rows, rows), np.arange(rows)))
    head = model.get_submodule("lm_head")
    weight_VD = (head.dequantize() if bits else head.weight).double()  # type: ignore[operator, union-attr]
    right_RV = hidden_RD.double() @ weight_VD.T
    error_RV = (logits_RV - right_RV).abs() / right_RV.std()
    assert error_RV.max() < 0.02
    assert error_RV.mean() < 0.003
    assert error_RV.mean() > 1e-5  # negative control: that operands are rounded is seen


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "odd sizes", "biases", "qwen3", "window"])
def test_quantized_logits(shape: str, dtype: torch.dtype, bits: int) -> None:
    """Against the torch layers with the same weights: 8-bit activations cost a mean error of less than 5 % of the
    logits' spread, and rounded weights alone change them more (4 bits) than that."""
    plain = make_model(shape, dtype)
    model = quantize(make_model(shape, dtype), bits).fuse()
    ours, right = torch.cat(random_run(make_native(model), TEXTS, bits)), torch.cat(exact_logits(model, TEXTS))
    assert (ours - right).abs().mean() < 0.05 * right.std()
    if bits == 4:
        assert (torch.cat(exact_logits(plain, TEXTS)) - right).abs().mean() > 0.05 * right.std()


def one_text(text: list[int], rows: np.ndarray) -> Batch:
    return make_batch([text], [0], [len(text)], [np.arange(-(-len(text) // 16), dtype=np.int32)], rows, 16)


def test_no_logits_wanted() -> None:
    native = make_native(make_model("llama"))
    assert native.step(one_text(random_ids(0, 20), np.arange(0))).shape == (0, V)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("tokens_T", V, "token"), ("slots_T", BLOCKS * 16, "slot"), ("logit_rows_R", 20, "logit row"),
     ("tables_SB", BLOCKS, "block of a table"), ("lengths_S", 10_000, "length")],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(field: str, value: int, message: str) -> None:
    """Before anything is written."""
    native = make_native(make_model("llama"))
    batch = one_text(random_ids(0, 20), np.arange(20))
    getattr(batch, field).view(-1)[-1] = value
    with pytest.raises(AssertionError, match=f"a {message} of the batch"):
        native.step(batch)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHERS = {
    "gpt2": ModelConfig(
        family="gpt2", vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "mixtral": make_config(V, family="mixtral", **MOE),
    "dynamic": make_config(V, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64),
}  # fmt: skip


def test_other_models_say_why() -> None:
    assert NativeModel.supports(make_model("llama")) is None
    for config in OTHERS.values():
        assert NativeModel.supports(Transformer(config))
    assert "float16" in str(NativeModel.supports(Transformer(make_config(V), dtype=torch.float16)))


class Notes(progress.Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Notes]:
    """An empty cache folder, and what is noted while it fills."""
    build.library.cache_clear()
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path / "cache"))
    with progress.use(Notes()) as notes:
        assert isinstance(notes, Notes)
        yield notes
    build.library.cache_clear()


def test_without_a_compiler_there_is_a_notice(fresh: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda language: None)
    assert NativeModel.supports(make_model("llama")) == "no working C compiler"
    assert "no C compiler" in fresh.said[0]


def test_a_compiler_that_fails_is_quoted(fresh: Notes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'it rains' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda language: Compiler(str(script), True))
    assert build.library(torch.float32) is None
    assert "it rains" in fresh.said[0]
    assert list((tmp_path / "cache" / "native").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(fresh: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMA_CACHE", str(Path(__file__) / "cache"))
    monkeypatch.setattr(build, "compiler", lambda language: Compiler("cc", True))
    assert build.library(torch.float32) is None
    assert f"{Path(__file__)}" in fresh.said[0]
    assert "SOMA_CACHE names a folder that can be written" in fresh.said[0]


@pytest.mark.parametrize("flags", ["", "-mavx2 -mfma", "-mavx512f -mavx512bw", "-march=native -mno-amx-tile"])
def test_other_instructions(fresh: Notes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    """Where native instructions and OpenMP are refused, and on lesser processors, it builds and is right."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if any(flag.removeprefix("-m") not in cpu for flag in flags.split() if "=" not in flag and "no-" not in flag):
        pytest.skip(f"this processor has no {flags}")
    if "no-amx" in flags and "amx_tile" not in cpu:
        pytest.skip("this processor has no AMX: its native build is that of every other test")
    real = shutil.which("cc")
    assert real
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *=native*|*-fopenmp*) exit 1;; esac\nexec {real} {flags} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda language: Compiler(str(script), True))
    texts = TEXTS[1:3]
    for bits in (8, 4):
        test_quantized_product("odd sizes", bits, 7)
        test_quantized_product("odd sizes", bits, 29)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = make_model("odd sizes", dtype)
        ours, right = torch.cat(random_run(make_native(model), texts, 1)), torch.cat(exact_logits(model, texts))
        torch.testing.assert_close(ours, right, atol=bound, rtol=bound)


def test_it_is_built_once(fresh: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = subprocess.run

    def counted(*given: object, **more: object) -> object:
        calls.append(given)
        return real(*given, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(build.subprocess, "run", counted)
    for _ in range(2):
        build.library.cache_clear()
        assert build.library(torch.float32) is not None
    assert len([call for call in calls if "forward.c" in str(call)]) == 1


def test_a_stored_rounded_model_runs_in_c(tmp_path: Path) -> None:
    """What `--weights int4` makes, stored and loaded: the same logits to the last bit."""
    model = quantize(make_model("qwen2"), 4)
    save_model(model, tmp_path / "small")
    again = load_model_for(tmp_path / "small", precision="auto", device="cpu")
    assert again.lm_head is not None
    assert NativeModel.supports(again) is None
    ours, right = (random_run(make_native(each), TEXTS, 1) for each in (again, model))
    assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))


def test_fp8_weights_are_computed_from_dense_ones(tmp_path: Path) -> None:
    save_model(make_model("llama"), tmp_path)
    tensors, exact = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].abs().amax() / 448
        exact[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {name: exact[name], name + "_scale": scale[None]}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rounded = load_model(tmp_path)
    assert NativeModel.supports(rounded) == "weights in a rounded format that C does not read"
    dense = load_model_for(tmp_path, precision="auto", device="cpu")
    ours, right = torch.cat(random_run(make_native(dense), TEXTS, 1)), torch.cat(exact_logits(rounded, TEXTS))
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bf16", [0, 1])
def test_the_first_set_of_flags_builds(tmp_path: Path, bf16: int) -> None:
    """Where it compiles anything: else a mistake in code for one processor would only make everything slow."""
    found = build.compiler("c")
    assert found is not None
    nothing = tmp_path / "nothing.c"
    nothing.write_text("int nothing(void) { return 0; }\n")

    def check(source: Path) -> subprocess.CompletedProcess[str]:
        flags = [*build.FLAGS, *build.EXTRAS[0], f"-DWEIGHT_BF16={bf16}"]
        command = [found.path, *flags, "-O0", "-fsyntax-only", str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if check(nothing).returncode:
        pytest.skip(f"this compiler has no {build.EXTRAS[0][0]}")
    assert check(build.SOURCES / "forward.c").stderr == ""


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 203, 1000])
def test_the_largest_of_a_row(columns: int) -> None:
    """As numpy says it, the first of equals; rows of minus infinities, with a NaN, and of another layout too."""
    assert build.loaded() is not None
    x_RV = torch.randint(-5, 5, (50, columns), generator=torch.Generator().manual_seed(columns)).float()
    x_RV[7], x_RV[8, -1], x_RV[9, 0] = -torch.inf, torch.inf, torch.nan
    x_RV[10, -1] = torch.nan
    for rows in (x_RV, torch.cat([x_RV, x_RV], 1)[:, :columns]):
        best_R, place_R = largest(rows)
        assert best_R[9:11].isnan().all()
        for r in [*range(9), *range(11, 50)]:
            right = int(np.argmax(x_RV[r].numpy()))
            assert (best_R[r], place_R[r]) == (x_RV[r, right], right)


def helpers() -> set[str]:
    """The threads that help to compute a step, by their places in /proc."""
    found = set()
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            if path.read_text().strip() == "soma-step":
                found.add(str(path))
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    """A thread has its name, or is gone from /proc, a moment after it was started, or joined."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("bits", [0, 8])
def test_who_computes_what_does_not_change_a_bit(bits: int) -> None:
    """More threads than processors, so that some are pushed aside at any moment and others take their share."""
    model = make_model("qwen3")
    native = make_native(quantize(model, bits).fuse() if bits else model)
    native.threads = 1
    right = random_run(native, TEXTS, 5)
    for threads in (2, 7, 16):
        native.threads = threads
        for ours, expected in zip(random_run(native, TEXTS, 5), right, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_helpers_end_with_their_model() -> None:
    before = helpers()
    native = make_native(make_model("llama"))
    native.threads = 4
    native.step(one_text(random_ids(0, 20), np.arange(20)))
    assert wait_for(lambda: len(helpers() - before) == 3)
    native.threads = 2
    assert wait_for(lambda: len(helpers() - before) == 1)
    del native
    assert wait_for(lambda: not helpers() - before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_without_the_helpers_can_drop_the_model() -> None:
    code = (
        "import os, sys\n"
        "from soma.engine.build import library\n"
        "from soma.engine.native import Team, declare\n"
        "import torch\n"
        "built = library(torch.float32)\n"
        "declare(built)\n"
        "team = Team(built, 3)\n"
        "if (child := os.fork()) == 0:\n"
        "    del team\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "del team\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "7", done.stderr
