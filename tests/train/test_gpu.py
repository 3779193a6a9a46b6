"""The same loop on a GPU. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soma.model.config import ModelConfig
from soma.model.float8 import why_not
from soma.train.compute import fast_attention
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.trainer import TrainResult
from tests.train.conftest import Killed, stop_after

Run = Callable[..., TrainResult]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def gpu(small: dict) -> dict:
    """Settings of a small run on the GPU."""
    return small | {"device": "auto"}


def test_fp32_is_near_the_cpu(run: Run, small: dict, gpu: dict) -> None:
    assert run("a", TrainConfig(**gpu)).loss == pytest.approx(run("b", TrainConfig(**small)).loss, abs=1e-3)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_low_precision_learns(run: Run, gpu: dict, precision: str, optimizer: str) -> None:
    result = run("a", TrainConfig(**gpu | {"precision": precision, "optimizer": optimizer, "steps": 60}))
    assert result.loss < 3.5
    assert 0 < result.mfu < 1


def test_compiled_is_near_eager(run: Run, gpu: dict) -> None:
    eager, compiled = (run(str(on), TrainConfig(**gpu | {"compile": on})) for on in (False, True))
    assert compiled.loss == pytest.approx(eager.loss, abs=1e-3)


def test_resuming(run: Run, gpu: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**gpu | {"checkpoint_every": 2, "precision": "bf16", "sample_prompts": ["a"]})
    undisturbed = run("a", config)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            run("b", config)
    assert run("b", config).loss == pytest.approx(undisturbed.loss, abs=1e-3)


def test_preferences(run: Run, gpu: dict, pairs: Path) -> None:
    base = run("base", TrainConfig(**gpu))
    config = PreferenceConfig(**gpu | {"steps": 50, "sequence_length": 64, "learning_rate": 1e-3})
    assert run("dpo", config, tokens=pairs, model=base.model).loss < 0.3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16 parameters", "float8"])
def test_every_precision_by_the_layer(run: Run, gpu: dict, precision: str, compiled: bool) -> None:
    """What a recipe can ask for learns as bf16 with fp32 parameters does."""
    settings: dict[str, Any] = {
        "fp16": {"precision": "fp16"},
        "bf16 parameters": {"precision": "bf16", "parameters": "bf16"},
        "float8": {"precision": "bf16", "float8": True},
    }[precision]
    if "float8" in settings and (reason := why_not(torch.device("cuda"))):
        pytest.skip(reason)
    gpu |= {"steps": 60, "precision": "bf16"}
    expected = run("bf16", TrainConfig(**gpu)).loss
    assert run("other", TrainConfig(**gpu | settings | {"compile": compiled})).loss == pytest.approx(expected, abs=0.2)


WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FORMS = [True, "every:2", "selective", "budget:350MB"]  # of 437 MB


@pytest.mark.parametrize("compiled", [False, True])
def test_every_form_of_recomputation(run: Run, gpu: dict, shape: ModelConfig, compiled: bool) -> None:
    """The same loss in less memory; compiled, that of the plain run to rounding."""
    wide = ModelConfig(vocab_size=shape.vocab_size, **WIDE)
    gpu |= {"steps": 4, "warmup": 1, "sequence_length": 256, "batch_size": 16, "evaluate_batches": 0}

    def peak(mode: bool | str) -> tuple[float, int]:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        config = TrainConfig(**gpu | {"activation_checkpointing": mode, "compile": compiled})
        return run(f"{mode}".replace(":", "-"), config, model=wide).loss, torch.cuda.max_memory_allocated()

    plain, most = peak(False)
    for mode in FORMS:
        loss, memory = peak(mode)
        assert loss == pytest.approx(plain, abs=1e-3), mode
        # The compiler's own choice of what to keep is much like the selective one.
        assert memory < (1.02 if compiled and mode == "selective" else 0.9) * most, (mode, memory, most)


class Operators(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **kwargs or {})


def test_fast_attention_is_attention() -> None:
    """Outputs and gradients against float64, in bf16's bound; and it is cuDNN's on GPUs that have it."""
    torch.manual_seed(0)
    shapes = ((2, 8, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64), (2, 8, 256, 64))
    *inputs, seed = (torch.randn(shape, device="cuda", dtype=torch.float64) for shape in shapes)

    def attended(dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (each.to(dtype).requires_grad_() for each in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return [out, *torch.autograd.grad(out, (q, k, v), seed.to(dtype))]

    expected = attended(torch.float64)
    with Operators() as operators, fast_attention(torch.device("cuda")):
        ours = attended(torch.bfloat16)
    is_new = torch.cuda.get_device_capability() >= (9, 0)
    assert ("aten::_scaled_dot_product_cudnn_attention" in operators.names) == is_new
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_it_learns_without_documents_kept_apart(run: Run, gpu: dict) -> None:
    """Plain causal attention: cuDNN's, recomputed in the backward pass too."""
    gpu |= {"steps": 60, "precision": "bf16", "isolate_documents": False}
    for more in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": "selective"}):
        assert run(f"{more}", TrainConfig(**gpu | more)).loss < 3.5
