"""`train` on the ranks of a pipeline: the run of one process, and checkpoints that any other layout takes up."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.hub import load_model
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.plan import head_layers, layers_for, make_plan, weighed_split
from soma.train.trainer import TrainResult, train
from tests.train.pipeline_case import MODELS, SHAPE
from tests.train.pool import Pool

Run = Callable[..., TrainResult]


def train_rank(rank: int, world_size: int, job: dict[str, Any]) -> dict[str, Any]:
    kind = PreferenceConfig if job.get("pairs") else TrainConfig
    model = job["model"]
    result = train(
        kind(**job["config"]), Path(job["out"]), Path(job["work"]), tokens=Path(job["tokens"]),
        tokenizer=Path(job["tokenizer"]), model=Path(model) if isinstance(model, str) else ModelConfig(**model),
    )  # fmt: skip
    return {"parameters": result.parameters, "validation": result.validation_loss, "loss": result.loss}


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "train"]


def same_model(one: Path, other: Path) -> None:
    a, b = load_model(one), load_model(other)
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (x - y).abs().max() < 2e-4, name


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ({"pp": 2, "schedule": "1f1b"}, "dense"),
        ({"pp": 2, "dp": 2, "schedule": "dualpipe"}, "moe"),
        ({"pp": 2, "schedule": "zb-v", "microbatches": 4}, "moe"),
        ({"pp": 2, "tp": 2, "sp": True, "schedule": "zb-h1"}, "dense"),
        ({"pp": 2, "fsdp": 2, "schedule": "interleaved", "virtual_stages": 2}, "dense"),
        pytest.param({"pp": 2, "tp": 2, "schedule": "dualpipe"}, "moe", marks=pytest.mark.parallel),
        pytest.param(
            {"pp": 2, "dp": 2, "tp": 2, "sp": True, "schedule": "interleaved", "virtual_stages": 2},
            "moe",
            marks=pytest.mark.parallel,
        ),
    ],
)
def test_pipeline_trains_as_one_process(
    run: Run, pool: Pool, small: dict, tmp_path: Path, chats: Path, tokenizer: Path, shape: ModelConfig,
    layout: dict[str, Any], family: str,
) -> None:  # fmt: skip
    """Unequal answers, a validation loss, a whole model at the end; then one process goes on from a checkpoint."""
    vocabulary = {"vocab_size": shape.vocab_size + 1, "max_position_embeddings": 256}
    model = ModelConfig(
        **SHAPE | vocabulary, **MODELS[family], num_hidden_layers=4, tie_word_embeddings=family == "dense"
    )
    settings = small | {
        "sequence_length": 64, "batch_size": 8 if {"dp", "fsdp"} & layout.keys() else 4,
        "microbatch_size": 1, "checkpoint_every": 3,
        "steps": 6,
    }  # fmt: skip
    alone = run("a", TrainConfig(**settings), tokens=chats, model=model)
    out, work = tmp_path / "b", tmp_path / "b-work"
    out.mkdir()
    job = {
        "config": settings | {"layout": layout}, "out": str(out), "work": str(work), "tokens": str(chats),
        "tokenizer": str(tokenizer), "model": model.model_dump(mode="json"),
    }  # fmt: skip
    for answer in pool.run(train_rank, prod(layout.get(name, 1) for name in ("pp", "dp", "fsdp", "tp")), job):
        assert answer["parameters"] == alone.parameters
        assert answer["validation"] == pytest.approx(alone.validation_loss, abs=1e-4)
        assert answer["loss"] == pytest.approx(alone.loss, abs=1e-4)
    assert losses(out) == pytest.approx(losses(tmp_path / "a"), abs=1e-4)
    same_model(alone.model, out / "model")
    newest = sorted((work / "checkpoints").iterdir())[-1]
    (newest / "manifest.json").unlink()
    shutil.rmtree(out)
    again = run("b", TrainConfig(**settings), tokens=chats, model=model, work=work)
    same_model(alone.model, again.model)


def test_pipeline_prefers_as_one_process(
    run: Run, pool: Pool, small: dict, tmp_path: Path, pairs: Path, tokenizer: Path, shape: ModelConfig
) -> None:  # fmt: skip
    """Low-rank updates by DPO, from a folder, with samples on the way."""
    base = run("base", TrainConfig(**small | {"steps": 2, "warmup": 0})).model
    settings = small | {
        "sequence_length": 64, "microbatch_size": 1, "steps": 4, "warmup": 1, "learning_rate": 1e-2,
        "lora": {"r": 4}, "evaluate_every": 2, "sample_prompts": ["say 1", "say"], "sample_tokens": 6,
    }  # fmt: skip
    alone = run("a", PreferenceConfig(**settings), tokens=pairs, model=base)
    out = tmp_path / "b"
    out.mkdir()
    job = {
        "config": settings | {"layout": {"pp": 2, "schedule": "zb-h1"}}, "pairs": True, "out": str(out),
        "work": str(tmp_path / "b-work"), "tokens": str(pairs), "tokenizer": str(tokenizer), "model": str(base),
    }  # fmt: skip
    for answer in pool.run(train_rank, 2, job):
        assert answer["validation"] == pytest.approx(alone.validation_loss, abs=1e-4)
    assert losses(out) == pytest.approx(losses(tmp_path / "a"), abs=1e-4)
    same_model(alone.model, out / "model")
    assert samples(out) == samples(tmp_path / "a")
    assert len(samples(out)) == 4


def test_dropout_masks_of_a_stage_that_is_computed_again(
    run: Run, pool: Pool, small: dict, tmp_path: Path, tokens: Path, tokenizer: Path
) -> None:  # fmt: skip
    """They are those of its forward pass, and of one process."""
    base = run("base", TrainConfig(**small | {"steps": 1, "warmup": 0})).model
    settings = small | {
        "microbatch_size": 1, "steps": 2, "warmup": 0, "learning_rate": 1e-2, "evaluate_every": 0,
        "lora": {"r": 4, "lora_dropout": 0.5},
    }  # fmt: skip
    run("alone", TrainConfig(**settings), tokens=tokens, model=base)
    for name, again in (("kept", False), ("again", True)):
        (tmp_path / name).mkdir()
        job = {
            "config": settings | {"layout": {"pp": 2}, "activation_checkpointing": again}, "out": str(tmp_path / name),
            "work": str(tmp_path / f"{name}-work"), "tokens": str(tokens), "tokenizer": str(tokenizer),
            "model": str(base),
        }  # fmt: skip
        pool.run(train_rank, 2, job)
    assert len(losses(tmp_path / "kept")) == 2
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), abs=1e-6)


def samples(folder: Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(record["prompt"], record["text"]) for record in records if record["event"] == "sample"]


def test_what_does_not_fit_is_said() -> None:
    for changes, size, said in (
        ({"microbatches": 3}, None, r"3 microbatches do not divide 8 sequences .*: take microbatches 2"),
        ({"microbatches": 4}, 1, r"4 microbatches × microbatch_size 1 = 4, not the 8 sequences .* microbatches 8"),
        ({"schedule": "interleaved"}, 1, "2 or more virtual_stages, and there is 1: take 2, or 1f1b"),
        ({"virtual_stages": 2}, 1, "virtual_stages 2 with schedule 1f1b: only interleaved"),
        ({"pp": 6, "schedule": "dualpipe"}, 1, "got 6 and 8.*: take batch_size 12, or schedule 1f1b"),
        ({"pp": 2, "schedule": "dualpipe"}, 4, "got 2 and 2.*: take microbatch_size 2, or batch_size 16"),
        ({"pp": 3, "schedule": "dualpipe"}, 1, "got 3 and 8.*: take pp 4 or 2, or schedule 1f1b"),
        ({"pp": 3, "schedule": "interleaved", "virtual_stages": 2}, None, "take microbatches 3 and batch_size 9"),
    ):
        with pytest.raises(UserError, match=said):
            make_plan(Layout(**({"pp": 2, "dp": 1} | changes)), 8, size)
    plan = make_plan(Layout(pp=2, dp=2, schedule="interleaved", virtual_stages=3), 8, 1)
    assert (plan.stages, plan.microbatches) == (6, 4)
    model = ModelConfig(**SHAPE, **MODELS["dense"], num_hidden_layers=4)
    for changes, said in (
        (
            {"stage_layers": [1, 2, 1]},
            r"\[1, 2, 1\] are 3 stages, and schedule 1f1b on pp 2 has 2: .* such as \[2, 2\]",
        ),
        ({"stage_layers": [3, 2]}, r"3 \+ 2 = 5 layers, and the model has 4: take 4, such as \[2, 2\]"),
        (
            {"pp": 4, "schedule": "zb-v"},
            r"zb-v on pp 4 has 8 stages \(2 a rank\), and the model has 4 layers.*take pp 2",
        ),
        ({"pp": 3, "schedule": "zb-v"}, r"take pp 2 on a multiple of 2 ranks$"),  # which three are not
    ):
        layout = Layout(**({"pp": 2, "dp": 1} | changes))
        with pytest.raises(UserError, match=said):
            layers_for(layout, make_plan(layout, 8, 1), model, 16)
    layout = Layout(pp=2, dp=1, stage_layers=[3, 1])
    assert layers_for(layout, make_plan(layout, 8, 1), model, 16) == [[0, 1, 2], [3]]


def test_the_last_stage_has_fewer_layers_for_its_head() -> None:
    assert [len(stage) for stage in weighed_split(16, 4, 1.8)] == [5, 4, 4, 3]
    assert [len(stage) for stage in weighed_split(8, 2, 0.2)] == [4, 4]
    llama = ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    assert head_layers(llama, 8192) == pytest.approx(1.84, abs=0.01)
    plan = make_plan(Layout(pp=4, dp=1), 8, 1)
    assert [len(stage) for stage in layers_for(Layout(pp=4, dp=1), plan, llama, 8192)] == [9, 8, 8, 7]
