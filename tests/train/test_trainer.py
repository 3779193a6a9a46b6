"""The training loop: it learns, resumes to the last bit, and guards itself."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from soma.base.artefact import content_hash, write_json
from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.hub import load_model
from soma.train import loop, loss
from soma.train.config import TrainConfig
from soma.train.trainer import DivergenceError, TrainResult

Run = Callable[..., TrainResult]


def log(result: TrainResult, event: str = "train") -> list[dict]:
    lines = (result.model.parent / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def losses(result: TrainResult) -> list[float]:
    return [record["loss"] for record in log(result)]


def test_it_learns_and_leaves_a_model_folder(run: Run, small: dict) -> None:
    result = run("a", TrainConfig(**small | {"steps": 60, "sample_prompts": ["the "], "sample_tokens": 5}))
    assert result.steps == 60
    assert not result.limited
    assert losses(result)[0] == pytest.approx(np.log(259), abs=0.1)
    assert result.loss < 3.5
    assert result.validation_loss is not None
    assert result.validation_loss < 3.5
    (sample,) = log(result, "sample")
    assert sample["prompt"] == "the "
    out = result.model.parent
    assert {path.name for path in out.iterdir()} == {"model", "train.json", "logs"}
    assert json.loads((out / "train.json").read_text())["limited"] is False
    summary = json.loads((out / "logs" / "summary.json").read_text())
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["mfu"] < 1
    model = load_model(result.model)
    assert model.config.eos_token_id == 256
    with safe_open(result.model / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.up_proj.weight" in set(file.keys())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_config_gives_the_same_bytes(run: Run, small: dict, optimizer: str) -> None:
    config = TrainConfig(**small, optimizer=optimizer)
    one, other = run("a", config), run("b", config)
    assert losses(one) == losses(other)
    assert content_hash(one.model.parent) == content_hash(other.model.parent)
    different = run("c", TrainConfig(**small, optimizer=optimizer, seed=1))
    assert content_hash(one.model.parent) != content_hash(different.model.parent)


def test_accumulation_is_the_large_batch(run: Run, small: dict, chats: Path) -> None:
    """Unequal answer lengths: microbatches have unequal numbers of targets."""
    small["sequence_length"] = 64
    whole = run("a", TrainConfig(**small), tokens=chats)
    parts = run("b", TrainConfig(**small, microbatch_size=1), tokens=chats)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    one, other = load_model(whole.model), load_model(parts.model)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a - b).abs().max() < 2e-4, name  # Adam's first steps magnify last-bit differences


def test_gradients_of_accumulation(shape: ModelConfig, chats: Path, small: dict) -> None:
    """Exact in the gradients; the mean of the microbatches' means (the usual mistake) is not."""
    from soma.model.transformer import Transformer
    from soma.train.compute import Compute
    from soma.train.objective import LanguageModeling, make_loader
    from soma.train.world import World

    config = TrainConfig(**small | {"sequence_length": 64})
    batch = next(make_loader(config, World(), chats, "train"))
    model = Transformer(shape, dtype=torch.float32).train()
    model.init_weights(1)
    objective = LanguageModeling(model, config, Compute(torch.device("cpu"), "fp32", False))

    def gradients(size: int, naive: bool = False) -> list[torch.Tensor]:
        model.zero_grad()
        for part in objective.parts(batch, size):
            rows = batch.targets[part[1]]
            count = (rows != loss.IGNORE).sum() * (len(batch.targets) / size) if naive else objective.count(batch)
            objective.backward(part, torch.tensor(1 / float(count)), torch.tensor(0.0))
        return [parameter.grad.clone() for parameter in model.parameters()]

    counts = (batch.targets != loss.IGNORE).sum(axis=1)
    assert len(set(counts.tolist())) > 1
    whole, parts, means = gradients(4), gradients(1), gradients(1, naive=True)
    scale = max(float(g.abs().max()) for g in whole)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) < 1e-6 * max(1, scale)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, means, strict=True)) > 1e-3 * scale


def test_chunked_loss_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    x_BTD = torch.randn(3, 11, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (3, 11), generator=generator)
    targets[1, 3:] = loss.IGNORE
    aux = (x_BTD**2).mean()
    logits = x_BTD @ weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected * 0.5 + aux * 2).backward()
    want_x, want_w = x_BTD.grad.clone(), weight.grad.clone()
    for piece in (4, 1000):
        x_BTD.grad = weight.grad = None
        inner = x_BTD * 1.0
        total = loss.backward(
            inner, (inner**2).mean(), targets, torch.from_numpy(loss.kept_rows(targets.numpy())),
            lambda x, t: loss.cross_entropy_sum(x @ weight.T, t), torch.tensor(0.5), torch.tensor(2.0), piece,
        )  # fmt: skip
        assert total == pytest.approx(expected.item(), rel=1e-6)
        assert torch.allclose(x_BTD.grad, want_x, atol=1e-6)
        assert torch.allclose(weight.grad, want_w, atol=1e-5)


def test_no_targets_at_all() -> None:
    x_BTD = torch.randn(1, 4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    total = loss.backward(
        x_BTD * 1, torch.zeros(()), torch.full((1, 4), loss.IGNORE), torch.zeros(0, dtype=torch.int64),
        lambda x, t: loss.cross_entropy_sum(x @ weight.T, t), torch.tensor(1.0), torch.tensor(1.0),
    )  # fmt: skip
    assert total == 0
    assert not x_BTD.grad.any()


@pytest.mark.parametrize("mode", [True, "every:2", "selective", "budget:100MB"])
def test_activation_checkpointing_is_bit_equal(run: Run, small: dict, mode: bool | str) -> None:
    plain = run("a", TrainConfig(**small))
    checkpointed = run("b", TrainConfig(**small, activation_checkpointing=mode))
    assert losses(plain) == losses(checkpointed)
    assert content_hash(plain.model) == content_hash(checkpointed.model)


def test_bf16_parameters_learn_as_fp32_ones(run: Run, small: dict) -> None:
    settings = small | {"optimizer": "adamw", "precision": "bf16"}
    whole = run("a", TrainConfig(**settings))
    half = run("b", TrainConfig(**settings, parameters="bf16"))
    again = run("c", TrainConfig(**settings, parameters="bf16"))
    assert losses(half) == pytest.approx(losses(whole), abs=0.05)
    assert content_hash(half.model) == content_hash(again.model)
    assert load_model(half.model).dtype == torch.float32, "save_precision decides"


def test_8_bits_need_a_gpu_that_has_them(run: Run, small: dict) -> None:
    with pytest.raises(UserError, match=r"float8: .*set float8: false"):
        run("a", TrainConfig(**small | {"device": "cpu", "float8": True}))


def test_bf16_stays_near_fp32(run: Run, small: dict) -> None:
    fp32, bf16 = run("a", TrainConfig(**small)), run("b", TrainConfig(**small | {"precision": "bf16"}))
    assert losses(bf16) == pytest.approx(losses(fp32), abs=0.03)
    assert losses(bf16) != losses(fp32)
    assert load_model(bf16.model).dtype == torch.float32


def test_fp16_scales_the_loss(run: Run, small: dict) -> None:
    fp32, fp16 = run("a", TrainConfig(**small)), run("b", TrainConfig(**small | {"precision": "fp16"}))
    assert losses(fp16) == pytest.approx(losses(fp32), abs=0.1)


def test_gradient_norm_is_clipped(run: Run, small: dict) -> None:
    free = run("a", TrainConfig(**small | {"grad_clip": 0, "steps": 3}))
    clipped = run("b", TrainConfig(**small | {"grad_clip": 1e-9, "steps": 3}))
    assert log(free)[0]["grad_norm"] == log(clipped)[0]["grad_norm"] > 0.1
    assert content_hash(free.model) != content_hash(clipped.model)


def test_logged_mfu_is_speed_times_flops_over_peak(run: Run, small: dict) -> None:
    result = run("a", TrainConfig(**small))
    for record in log(result):
        assert record["mfu"] == pytest.approx(
            record["tokens_per_second"] * result.flops_per_token / result.matmul_peak, rel=1e-6
        )


def test_mixture_of_experts_trains(run: Run, small: dict, shape: ModelConfig) -> None:
    changes = {"family": "mixtral", "num_experts": 4, "router_aux_loss_coef": 0.1, "norm_topk_prob": True}
    moe = ModelConfig(**shape.model_dump() | changes)
    result = run("a", TrainConfig(**small | {"steps": 30, "optimizer": "muon", "microbatch_size": 2}), model=moe)
    assert result.loss < 4.5


def test_early_stop_keeps_the_best_weights(run: Run, small: dict) -> None:
    settings = small | {"steps": 200, "learning_rate": 0.3, "evaluate_every": 4, "early_stop": 2, "warmup": 0}
    result = run("a", TrainConfig(**settings, divergence_factor=100))
    assert result.stopped_early
    assert result.steps < 200
    validation = [record["validation_loss"] for record in log(result, "evaluate")]
    assert result.validation_loss == min(validation) < validation[-1]


def test_nan_stops_with_step_batch_and_checkpoint(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    true_backward = loss.backward

    def poisoned(*arguments: object, **options: object) -> torch.Tensor:
        total = true_backward(*arguments, **options)  # type: ignore[arg-type]
        return total * float("nan") if next(calls) == 6 else total

    monkeypatch.setattr(loss, "backward", poisoned)
    with pytest.raises(DivergenceError, match=r"stopped at step 7: the loss is nan") as caught:
        run("a", TrainConfig(**small, checkpoint_every=3))
    message = str(caught.value)
    assert "step-00000006 (step 6)" in message
    path = Path(message.split("Its batch is in ")[1].split(" (")[0])
    assert np.load(path)["tokens"].shape == (4, 32)


def test_divergence_stops(run: Run, small: dict) -> None:
    config = TrainConfig(**small | {"steps": 200, "learning_rate": 30.0, "warmup": 30, "divergence_steps": 3})
    with pytest.raises(DivergenceError, match=r"the loss diverges: .* for 3 steps"):
        run("a", config)


def test_disk_full(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from soma.train import checkpoint

    true_save, calls = checkpoint.dcp.save, iter(range(100))

    def save(*arguments: object, **named: object) -> object:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return true_save(*arguments, **named)

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    full = r"the disk is full: the checkpoint of step 8 needs .*step 4\)\. Free some space"
    with pytest.raises(UserError, match=full):
        run("a", TrainConfig(**small, checkpoint_every=4))
    folder = tmp_path / "a-work" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    undisturbed = run("b", TrainConfig(**small))
    assert losses(run("a", TrainConfig(**small, checkpoint_every=4))) == losses(undisturbed)


def test_time_guard_shrinks_and_repeats_itself(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    true_record = loop.TimeGuard.record
    monkeypatch.setattr(loop.TimeGuard, "record", lambda guard, *_: true_record(guard, 0.05))  # a step "takes" 50 ms
    settings = small | {"steps": 5000, "max_seconds": 2.0, "checkpoint_every": 5, "warmup": 2, "schedule": "wsd"}
    result = run("a", TrainConfig(**settings))
    assert result.limited
    assert result.steps == 38  # 7 + (0.97 · 2.0 - 7 · 0.05) / 0.05 - 2 / 3
    assert result.planned_steps == 5000
    assert json.loads((result.model.parent / "train.json").read_text())["limited"] is True
    rates = [record["learning_rate"] for record in log(result)]
    assert rates[-1] < 0.1 * max(rates)  # the schedule ends where the run ends
    # Begun anew with the decisions on disk, the same run comes out whatever the clock says now.
    work = result.model.parent.parent / "a-work"
    for path in (work / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    monkeypatch.setattr(loop.TimeGuard, "decide", lambda *_: None)
    again = run("b", TrainConfig(**settings), work=work)
    assert again.steps == result.steps
    assert losses(again) == losses(result)
    assert content_hash(again.model) == content_hash(result.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 512}, "sequence_length 512 is more than the model's max_position_embeddings 256"),
        ({"device": "cuda:7"}, "torch sees"),
        ({"steps": None, "tokens": 256, "warmup": 5}, "warmup 5 steps is more than the 2 steps"),
    ],
)
def test_mistakes(run: Run, small: dict, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("a", TrainConfig(**small | changes))


def test_another_tokenizer(run: Run, small: dict, tokens: Path, tmp_path: Path) -> None:
    for path in tokens.iterdir():
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / path.name).write_bytes(path.read_bytes())
    index = json.loads((tokens / "index.json").read_text())
    write_json(tmp_path / "t" / "index.json", index | {"tokenizer_hash": "0" * 64})
    with pytest.raises(UserError, match="made with another tokenizer"):
        run("a", TrainConfig(**small), tokens=tmp_path / "t")


def test_vocabulary_too_small(run: Run, small: dict, shape: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"its tokenizer has 259 entries, the model's vocab_size is 200"):
        run("a", TrainConfig(**small), model=shape.model_copy(update={"vocab_size": 200}))


def test_what_cannot_be_saved_is_refused_before_training(run: Run, small: dict, shape: ModelConfig) -> None:
    unsaveable = ModelConfig(**shape.model_dump() | {"family": "mixtral", "num_experts": 4})
    with pytest.raises(UserError, match="norm_topk_prob"):
        run("a", TrainConfig(**small | {"steps": 10**9}), model=unsaveable)
