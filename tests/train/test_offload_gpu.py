"""cpu_offload beside real GPUs: the weights without it, less memory, checkpoints either way. Skipped without one."""

import multiprocessing as mp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soma.model.config import ModelConfig
from soma.model.float8 import why_not
from soma.model.hub import load_model
from soma.train import loop
from soma.train.config import LoRATraining, PreferenceConfig, TrainConfig
from soma.train.parallel.config import Layout
from soma.train.trainer import TrainResult
from tests.train.conftest import Killed, stop_after

Run = Callable[..., TrainResult]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

OFFLOAD = {"layout": Layout(cpu_offload=True, fsdp=-1), "device": "auto"}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "accumulated": {"microbatch_size": 1},
    "muon": {"optimizer": "muon"},
    "lora": {"lora": LoRATraining(r=4)},
    "recomputed": {"activation_checkpointing": True},
    "selective": {"activation_checkpointing": "selective"},
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "float8": {"precision": "bf16", "float8": True},
    "bf16 parameters": {"parameters": "bf16", "precision": "bf16"},
    "bf16 parameters, compiled": {"parameters": "bf16", "precision": "bf16", "compile": True},
}


@pytest.fixture
def gpu(small: dict) -> dict:
    """Settings of a small run on the GPU."""
    return small | {"device": "auto", "log_every": 5, "sample_prompts": ["a "], "sample_tokens": 4, "evaluate_every": 6}


@pytest.mark.parametrize("case", CASES)
def test_it_is_as_without(run: Run, gpu: dict, case: str) -> None:
    """Losses, and the weights of the model folder. In low precision the moments differ by roundings: the loss alone."""
    if "float8" in CASES[case] and (reason := why_not(torch.device("cuda"))):
        pytest.skip(reason)
    kept = run("kept", TrainConfig(**gpu | CASES[case]))
    taken = run("taken", TrainConfig(**gpu | CASES[case] | OFFLOAD))
    is_exact = "precision" not in CASES[case]
    assert taken.loss == pytest.approx(kept.loss, abs=1e-3 if is_exact else 3e-2)
    assert taken.validation_loss == pytest.approx(kept.validation_loss, abs=1e-3 if is_exact else 3e-2)
    if is_exact:
        ours, theirs = (load_model(each.model).state_dict() for each in (taken, kept))
        assert all((ours[name] - value).norm() < 2e-2 * value.norm() for name, value in theirs.items())
    assert not dist.is_initialized()


def test_preferences(run: Run, gpu: dict, pairs: Path) -> None:
    base = run("base", TrainConfig(**gpu))
    config = PreferenceConfig(**gpu | OFFLOAD | {"steps": 50, "sequence_length": 64, "learning_rate": 1e-3})
    assert run("dpo", config, tokens=pairs, model=base.model).loss < 0.3


def test_memory_is_the_cpus(run: Run, gpu: dict, shape: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 layers of 2.9M numbers: 92 MB of weights, 369 with gradients and moments; a layer in its turn has 12."""
    wide = ModelConfig(
        vocab_size=shape.vocab_size, hidden_size=512, intermediate_size=1365, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    seen: dict[str, Any] = {}
    true_step = loop.Trainer.train_step

    def step(trainer: loop.Trainer) -> None:
        true_step(trainer)
        weight = trainer.model.layers[0].mlp.up_proj.weight
        state = trainer.optimizers[0].state[weight]
        seen["devices"] = {each.device.type for each in (weight, state["exp_avg"], state["exp_avg_sq"])}
        seen["pinned"] = weight.to_local().is_pinned() if hasattr(weight, "to_local") else False

    monkeypatch.setattr(loop.Trainer, "train_step", step)
    peaks = []
    for name, more in (("kept", {}), ("taken", OFFLOAD)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, TrainConfig(**gpu | {"steps": 3, "warmup": 1} | more), model=wide)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert seen == {"devices": {"cpu" if more else "cuda"}, "pinned": bool(more)}
    assert peaks[0] > 350e6
    assert peaks[1] < 0.35 * peaks[0], peaks


@pytest.mark.parametrize("first", ["kept", "taken"])
def test_a_checkpoint_goes_on_either_way(run: Run, gpu: dict, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = {"kept": {}, "taken": OFFLOAD}
    then = "taken" if first == "kept" else "kept"
    config = gpu | {"checkpoint_every": 2}
    undisturbed = run("a", TrainConfig(**config))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            run("b", TrainConfig(**config | layouts[first]))
    assert run("b", TrainConfig(**config | layouts[then])).loss == pytest.approx(undisturbed.loss, abs=1e-3)


def on_rank(rank: int, ranks: int, store: str, calls: list[dict[str, Any]], queue: Any) -> None:
    """One rank with a GPU of its own: the losses of some runs."""
    from soma.train.trainer import train

    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=ranks)
    losses = []
    for call in calls:
        result = train(**call)
        losses.append((result.loss, result.validation_loss))
    queue.put((rank, losses))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs here")
def test_several_gpus(run: Run, gpu: dict, tmp_path: Path, tokens: Path, tokenizer: Path, shape: ModelConfig) -> None:
    """Shards over two GPUs, and on four with replicas or tensor parallelism too; gradients are summed over NCCL."""
    gpu = gpu | {"sample_prompts": [], "microbatch_size": 1}
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    layouts: list[dict[str, Any]] = [{"fsdp": ranks}]
    layouts += [{"fsdp": 2, "dp": 2}, {"fsdp": 2, "tp": 2, "sp": True}, {"fsdp": 2, "cp": 2}] if ranks == 4 else []
    cases: list[dict[str, Any]] = [{"layout": Layout(cpu_offload=True, **layout)} for layout in layouts]
    cases += [cases[0] | {"optimizer": "muon"}, cases[0] | {"lora": LoRATraining(r=4)}]
    calls, expected = [], []
    for number, case in enumerate(cases):
        out = tmp_path / f"ranks-{number}"
        out.mkdir()
        calls.append({
            "config": TrainConfig(**gpu | case), "out": out, "work": tmp_path / f"ranks-{number}-work",
            "tokens": tokens, "tokenizer": tokenizer, "model": shape,
        })  # fmt: skip
        expected.append(run(f"one-{number}", TrainConfig(**gpu | case | {"layout": Layout()})))
    context = mp.get_context("spawn")
    queue = context.Queue()
    store = str(tmp_path / "store")
    processes = [context.Process(target=on_rank, args=(rank, ranks, store, calls, queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        answers = dict(queue.get(timeout=300) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    for losses in answers.values():
        for (loss, held_out), one in zip(losses, expected, strict=True):
            assert loss == pytest.approx(one.loss, abs=1e-3)
            assert held_out == pytest.approx(one.validation_loss, abs=1e-3)
