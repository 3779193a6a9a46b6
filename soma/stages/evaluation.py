"""Stages that measure a model, and the one that serves it to a probe."""

from collections.abc import Mapping
from pathlib import Path

from soma.base.artefact import read_json, write_json
from soma.evaluate.config import EvaluateConfig
from soma.recipe import ProbeConfig
from soma.stages.stage import Build, Stage, settings
from soma.stages.start import StartModel, model_folder, outside_of
from soma.train.config import PreferenceConfig, TrainConfig


def evaluate_stage(name: str, config: EvaluateConfig, inputs: Mapping[str, str], base: StartModel | None) -> Stage:
    """model, corpus → scores and samples"""

    def build(job: Build) -> None:
        from soma.evaluate.evaluate import evaluate

        model = model_folder(job, base)
        evaluate(config, job.out, model=model, corpus=job.inputs["corpus"], instruct=job.inputs.get("instruct"))

    def metrics(artefact: Path) -> dict[str, float]:
        scores = read_json(artefact / "scores.json")
        return {f"{name}_bits_per_byte": scores["bits_per_byte"]["value"]}

    return Stage(name, settings(config), build, {"corpus": "corpus", **inputs}, outside_of(base), metrics, 2)


def answers_stage(
    name: str,
    config: EvaluateConfig,
    tuning: TrainConfig,
    tokens: str,
    model: Mapping[str, str],
    start: Mapping[str, str],
    base: StartModel | None,
) -> Stage:
    """tuned model, the model it started from, held-out masked tokens → scores of the answers"""
    beta = tuning.beta if isinstance(tuning, PreferenceConfig) else 0.1

    def build(job: Build) -> None:
        from soma.evaluate.tuned import evaluate_tuned

        model, start = model_folder(job, base), model_folder(job, base, "start")
        evaluate_tuned(config, job.out, model=model, start=start, tokens=job.inputs["tokens"], beta=beta)

    def metrics(artefact: Path) -> dict[str, float]:
        facts = read_json(artefact / "answers.json")
        figures = facts if facts["kind"] == "pairs" else facts["after"] or {}
        return {f"{name}_{key}": value for key, value in figures.items() if isinstance(value, int | float)}

    inputs = {"tokens": tokens, **model, **({"start": start["model"]} if start else {})}
    return Stage(name, settings(config) | {"beta": beta}, build, inputs, outside_of(base), metrics)


def probe_stage(config: ProbeConfig, model: Mapping[str, str], base: StartModel | None) -> Stage:
    """model → a running service → answers and latencies"""

    def build(job: Build) -> str:
        from soma.serve.probe import probe
        from soma.serve.running import running_service

        folder = model_folder(job, base)
        logs = job.out / "logs"
        logs.mkdir()
        with running_service(folder, log=logs / "service.log") as url:
            write_json(logs / "probe.json", probe(url, **config.model_dump()))
        return "latencies are measured"

    return Stage("probe", settings(config), build, model, outside_of(base))
