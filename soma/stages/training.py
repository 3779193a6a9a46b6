"""Stages that train: on tokens, on instruction pairs, on preferences."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.recipe import ModelShape
from soma.stages.stage import Build, Stage, settings
from soma.stages.start import StartModel, model_folder, outside_of, tokenizer_folder
from soma.train.config import TrainConfig


def pretrain_stage(
    config: TrainConfig, shape: ModelShape | None, tokenizer: Mapping[str, str], base: StartModel | None,
    tokens: str = "tokens",
) -> Stage:  # fmt: skip
    """tokens → model"""

    def build(job: Build) -> str | None:
        from soma.model.tokenizer import Tokenizer

        if base is not None:
            return _train(job, "train", config, base.path(), job.inputs["tokens"], base)
        assert shape is not None, "the recipe's validation asks for a model block"
        config_of_model = shape.with_tokenizer(Tokenizer.load(job.inputs["tokenizer"]))
        return _train(job, "train", config, config_of_model, job.inputs["tokens"], base)

    both = {"train": settings(config), "model": shape.model_dump(mode="json", exclude_unset=True) if shape else None}
    return Stage(
        "train", both, build, {"tokens": tokens, **tokenizer}, outside_of(base), training_metrics("train"),
        check=lambda: _check_fit("train", config, shape),
    )  # fmt: skip


def tune_stage(
    name: str,
    config: TrainConfig,
    tokens: str,
    model: Mapping[str, str],
    tokenizer: Mapping[str, str],
    base: StartModel | None,
    shape: ModelShape | None,
) -> Stage:
    """model, masked tokens → model (instruction or preference tuning, by the config's type)"""

    def build(job: Build) -> str | None:
        return _train(job, name, config, model_folder(job, base), job.inputs["tokens"], base)

    inputs = {"tokens": tokens, **model, **tokenizer}
    return Stage(
        name, settings(config), build, inputs, outside_of(base), training_metrics(name), format_version=2,
        check=lambda: _check_fit(name, config, shape),
    )  # fmt: skip


def _check_fit(name: str, config: TrainConfig, shape: ModelShape | None) -> None:
    """Raise UserError where the ranks that there are cannot train this."""
    from soma.train.parallel.fit import check_fit
    from soma.train.parallel.launch import world_size

    try:
        check_fit(config, config.layout.resolve(world_size()), shape)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _train(job: Build, name: str, config: TrainConfig, model: Any, tokens: Path, base: StartModel | None) -> str | None:
    from soma.train.parallel import ranks
    from soma.train.trainer import train

    call: dict[str, Any] = {"config": config, "out": job.out, "work": job.state, "tokens": tokens, "model": model}
    call["tokenizer"] = tokenizer_folder(job, base)
    ranks.together(call)
    result = train(**call, tracker=job.tracking.for_stage(name))
    return "max_seconds cut the number of steps to what this machine's speed allowed" if result.limited else None


def training_metrics(name: str) -> Callable[[Path], dict[str, float]]:
    """Final figures of a training stage, with the stage's name before them."""

    def read(artefact: Path) -> dict[str, float]:
        facts = read_json(artefact / "logs" / "summary.json")
        return {f"{name}_{key}": value for key, value in facts.items() if isinstance(value, int | float)}

    return read
