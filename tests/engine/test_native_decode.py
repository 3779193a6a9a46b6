"""The decode step in C against the Transformer, for every trait of the families that it runs."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_config

from soma.base import progress
from soma.base.machine import Compiler
from soma.engine import native_decode as native
from soma.engine.decode import Runner
from soma.model.cache import KVCache
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "odd sizes": {"hidden_size": 60, "head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3,
                  "intermediate_size": 101},
    "wide heads": {"head_dim": 32},
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


def build(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    config = make_config(V, **SHAPES[shape])
    model = Transformer(config, dtype=dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # biases and gains that do something
        if name.endswith("bias") or "norm" in name:
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def run(runner: Runner, ids: list[int], prompt: int) -> torch.Tensor:
    """Logits (len(ids) - prompt, V) of single steps after a prefill of `prompt` tokens."""
    cache = KVCache(runner.model.config, 1, 64, dtype=runner.dtype)
    with torch.inference_mode():
        runner.prefill(ids[:prompt], cache)
        return torch.stack([runner.decode(token, cache).float() for token in ids[prompt:]])


def tokens(seed: int, count: int = 40) -> list[int]:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if native.library(torch.float32) is None:
        pytest.skip("no C compiler")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits(shape: str, threads: int) -> None:
    """Within 1e-4 of logits whose spread is above 1; the same most likely token."""
    model = build(shape, seed=len(shape))
    runner = Runner(model, 64)
    assert runner.native is not None
    runner.native.threads = threads
    ids = tokens(threads)
    ours = run(runner, ids, 7)
    with torch.no_grad():
        right = model(torch.tensor([ids]))[0, 7:]
    assert right.std() > 1
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)
    assert ours.argmax(-1).tolist() == right.argmax(-1).tolist()


@pytest.mark.parametrize("shape", ["llama", "odd sizes", "qwen2", "qwen3", "window"])
def test_bf16_logits_are_nearer_to_the_truth_than_torch(shape: str) -> None:
    """Against the same weights in float32: our mean error is below that of the bf16 Transformer, and below 2 %."""
    model = build(shape, torch.bfloat16, seed=len(shape))
    exact = build(shape, seed=len(shape))
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    ids = tokens(5)
    with torch.no_grad():
        right = exact(torch.tensor([ids]))[0, 7:]
        torchs = model(torch.tensor([ids]))[0, 7:].float()
    runner = Runner(model, 64)
    assert runner.native is not None
    ours = run(runner, ids, 7)
    error, other = (ours - right).abs().mean() / right.std(), (torchs - right).abs().mean() / right.std()
    assert error < 0.02
    assert error < other


def test_a_wrong_step_would_be_seen() -> None:
    """Negative controls: a position off by one, a window forgotten, one weight changed."""
    for shape, spoil in (
        ("llama", lambda decoder: setattr(decoder.model, "sines", decoder.model.sines + 4)),
        ("window", lambda decoder: setattr(decoder.model.layer[0], "window", 0)),
        ("llama", lambda decoder: setattr(decoder.model, "epsilon", 0.1)),
        ("qwen3", lambda decoder: setattr(decoder.model.layer[1], "k_norm", decoder.model.layer[1].q_norm)),
    ):
        model = build(shape)
        runner = Runner(model, 64)
        assert runner.native is not None
        spoil(runner.native)
        with torch.no_grad():
            right = model(torch.tensor([tokens(1)]))[0, 7:]
        assert (run(runner, tokens(1), 7) - right).abs().max() > 1e-2, shape


def test_the_cache_is_the_transformers_own() -> None:
    """Prefill after decode, and decode after prefill, in any mixture, on several caches."""
    model = build("llama")
    runner = Runner(model, 64)
    ids, other = tokens(1), tokens(2)
    first, second = KVCache(model.config, 1, 64), KVCache(model.config, 1, 48)
    with torch.inference_mode():
        runner.prefill(ids[:5], first)
        for token in ids[5:9]:
            runner.decode(token, first)
        runner.prefill(other[:3], second)
        runner.decode(other[3], second)
        runner.prefill(ids[9:20], first)
        got, also = runner.decode(ids[20], first), runner.decode(other[4], second)
        torch.testing.assert_close(got, model(torch.tensor([ids[:21]]))[0, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(also, model(torch.tensor([other[:5]]))[0, -1], atol=1e-4, rtol=1e-4)
    assert (first.length, second.length) == (21, 5)


def test_a_full_cache_is_refused() -> None:
    runner = Runner(build("llama"), 64)
    cache = KVCache(runner.model.config, 1, 4)
    with torch.inference_mode():
        runner.prefill([1, 2, 3, 4], cache)
        with pytest.raises(ValueError, match="do not fit"):
            runner.decode(5, cache)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHERS = {
    "gpt2": ModelConfig(
        family="gpt2", vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "mixtral": make_config(V, family="mixtral", **MOE),
    "dynamic": make_config(V, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=64),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_on_torch(name: str) -> None:
    model = Transformer(OTHERS[name])
    runner = Runner(model, 64)
    assert runner.native is None
    with torch.no_grad():
        right = model(torch.tensor([tokens(3)]))[0, 7:]
    torch.testing.assert_close(run(runner, tokens(3), 7), right, atol=1e-4, rtol=1e-4)
    assert Runner(Transformer(make_config(V)), 64, use_native=False).native is None
    assert native.unsupported(Transformer(make_config(V), dtype=torch.float16)) is not None


class Notes(progress.Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Notes]:
    """An empty cache folder, and what is noted while it fills."""
    native.library.cache_clear()
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path / "cache"))
    with progress.use(Notes()) as notes:
        assert isinstance(notes, Notes)
        yield notes
    native.library.cache_clear()


def test_without_a_compiler_there_is_a_notice(fresh: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda language: None)
    assert Runner(build("llama"), 64).native is None
    assert "no C compiler" in fresh.said[0]


def test_a_compiler_that_fails_is_quoted(fresh: Notes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'it rains' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(native, "compiler", lambda language: Compiler(str(script), True))
    assert Runner(build("llama"), 64).native is None
    assert "it rains" in fresh.said[0]
    assert list((tmp_path / "cache" / "native").iterdir()) == []


def test_flags_that_a_compiler_does_not_know(
    fresh: Notes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """Without OpenMP and native instructions it still builds, and is still right."""
    real = shutil.which("cc")
    assert real
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *=native*|*-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(native, "compiler", lambda language: Compiler(str(script), True))
    model = build("llama")
    runner = Runner(model, 64)
    assert runner.native is not None
    with torch.no_grad():
        right = model(torch.tensor([tokens(3)]))[0, 7:]
    torch.testing.assert_close(run(runner, tokens(3), 7), right, atol=1e-4, rtol=1e-4)


def test_it_is_built_once(fresh: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = subprocess.run

    def counted(*given: object, **more: object) -> object:
        calls.append(given)
        return real(*given, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(native.subprocess, "run", counted)
    for _ in range(2):
        native.library.cache_clear()
        assert native.library(torch.float32) is not None
    compiled = [call for call in calls if str(native.SOURCE) in str(call)]
    assert len(compiled) == 1
