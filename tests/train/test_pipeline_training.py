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
from soma.train.parallel.pipeline.training import make_plan
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


def samples(folder: Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(record["prompt"], record["text"]) for record in records if record["event"] == "sample"]


def test_what_does_not_fit_is_said() -> None:
    config = TrainConfig(steps=1, batch_size=8, microbatch_size=1)
    layout = Layout(pp=2, dp=1, microbatches=3)
    with pytest.raises(UserError, match=r"3 microbatches of 8 sequences .* microbatch_size 1: take microbatches 8"):
        make_plan(config, layout)
    for changes, said in (
        ({"schedule": "2f2b"}, "schedule '2f2b': expected one of gpipe, 1f1b"),
        ({"schedule": "interleaved"}, "virtual_stages 1 with schedule interleaved: interleaved has 2 or more"),
        ({"virtual_stages": 2}, "virtual_stages 2 with schedule 1f1b"),
        ({"pp": 6, "schedule": "dualpipe"}, "use 6 and 12"),
    ):
        with pytest.raises(UserError, match=said):
            make_plan(config, Layout(**({"pp": 2, "dp": 1} | changes)))
    assert make_plan(config, Layout(pp=2, dp=2, schedule="interleaved", virtual_stages=3)).stages == 6
    assert make_plan(config, Layout(pp=2, dp=2, schedule="interleaved", virtual_stages=3)).microbatches == 4
