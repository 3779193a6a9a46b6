"""The stages that a recipe can have: what each reads, what shapes it, and the room's function that makes it.

To add one, write a `Stage` in `stages_of` (see docs/stages.md). Rooms that need torch are imported when a stage runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from soma.base.artefact import content_hash, file_hash, json_hash, read_json, write_json
from soma.base.errors import UserError
from soma.base.fetch import fetch
from soma.base.secrets import URL
from soma.data.config import DataConfig, InstructConfig, MixturePart, TokenizerConfig
from soma.evaluate.config import EvaluateConfig
from soma.recipe import ModelShape, ProbeConfig, Recipe
from soma.tracking import Trackers
from soma.train.config import PreferenceConfig, TrainConfig


@dataclass(frozen=True)
class Build:
    """What a stage is given: an empty folder to fill, a folder that survives a kill, its inputs' artefacts."""

    out: Path
    state: Path
    inputs: Mapping[str, Path]
    tracking: Trackers


def _nothing() -> str:
    return ""


def _no_metrics(artefact: Path) -> dict[str, float]:
    return {}


def _no_check() -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One step of a run. Raise `format_version` when the same inputs and config give other bytes than before.

    `config` is JSON and part of the key; `inputs` maps a role to the stage that fills it; `fingerprint` hashes what
    lies outside of the store; `build` returns None, or the reason why a second run would not give the same bytes;
    `metrics` reads the figures of a finished artefact for `soma runs`; `check` raises UserError for what `build` would
    refuse, as far as that is known before any stage is made.
    """

    name: str
    config: dict[str, Any]
    build: Callable[[Build], str | None]
    inputs: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Callable[[], str] = _nothing
    metrics: Callable[[Path], dict[str, float]] = _no_metrics
    format_version: int = 1
    check: Callable[[], None] = _no_check


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order in which they run."""
    stages: list[Stage] = []
    tokenizer = {} if recipe.base else {"tokenizer": "tokenizer"}
    if recipe.data is not None:
        sources = _seeded(recipe.data, recipe)
        if sources.filters is not None:
            stages.append(documents_stage(sources))
        stages.append(corpus_stage(sources))
        stages += expect_stages(sources)
    if recipe.tokenizer is not None:
        stages.append(tokenizer_stage(recipe.tokenizer))
    base = _base_model(recipe.base)
    model: dict[str, str] = {}
    if recipe.train is not None:
        if recipe.data is not None and (recipe.mixture is None or any(_is_main(part) for part in recipe.mixture)):
            stages.append(tokens_stage(tokenizer, base))
        stages += mixture_stages(recipe, tokenizer, base)
        tokens = "tokens" if recipe.mixture is None else "mixture"
        stages.append(pretrain_stage(_seeded(recipe.train, recipe), recipe.model, tokenizer, base, tokens))
        model = {"model": "train"}
    for block, data in (("tune", recipe.instruct), ("prefer", recipe.preferences)):
        config: TrainConfig | None = getattr(recipe, block)
        if config is None or data is None:
            continue
        corpus = {"corpus": "corpus"} if recipe.data is not None and not _own_files(data) else {}
        pairs = "instruct" if block == "tune" else "preferences"
        stages.append(pairs_stage(pairs, _seeded(data, recipe), corpus))
        stages.append(pair_tokens_stage(f"{pairs}_tokens", pairs, tokenizer, base))
        tuning = _seeded(config, recipe)
        stages.append(tune_stage(block, tuning, f"{pairs}_tokens", model, tokenizer, base, recipe.model))
        start, model = model, {"model": block}
        if recipe.evaluate is not None and (block == "prefer" or recipe.data is None):
            measure = _seeded(recipe.evaluate, recipe)
            stages.append(answers_stage(f"{block}_scores", measure, config, f"{pairs}_tokens", model, start, base))
    if recipe.evaluate is not None and recipe.data is not None:
        answers = {"instruct": "instruct_tokens"} if recipe.tune is not None else {}
        if recipe.train is not None:
            stages.append(
                evaluate_stage("evaluate", _seeded(recipe.evaluate, recipe), {"model": "train"} | answers, base)
            )
        elif recipe.base:
            stages.append(evaluate_stage("evaluate", _seeded(recipe.evaluate, recipe), answers, base))
        if model and model != {"model": "train"}:
            stages.append(evaluate_stage("evaluate_tuned", _seeded(recipe.evaluate, recipe), model | answers, base))
    if recipe.probe is not None:
        stages.append(probe_stage(recipe.probe, model, base))
    return stages


@dataclass(frozen=True)
class StartModel:
    """The model that a recipe starts from."""

    ref: str

    def path(self) -> Path:
        """Its local folder, fetched if need be."""
        return fetch(self.ref)

    def fingerprint(self) -> str:
        """Hash of the folder's content."""
        return content_hash(self.path())


def _base_model(ref: str | None) -> "StartModel | None":
    return StartModel(ref) if ref else None


def _seeded(config: Any, recipe: Recipe) -> Any:
    """The block with the recipe's seed, unless it names its own."""
    if "seed" in type(config).model_fields and "seed" not in config.model_fields_set:
        return config.model_copy(update={"seed": recipe.seed})
    return config


def _json(config: BaseModel) -> dict[str, Any]:
    # The ranks' layout does not change what is trained, so it is no part of an artefact's key.
    return config.model_dump(mode="json", exclude={"layout", "stream"})


# --- Data ---


def _own_files(config: InstructConfig) -> bool:
    """Whether instruction pairs come from files of their own rather than from the corpus."""
    return bool(config.sources)


def _is_main(part: MixturePart) -> bool:
    """Whether a part of a mixture is the recipe's own `data`."""
    return part.data is None and part.tokens is None


def documents_stage(config: DataConfig, suffix: str = "") -> Stage:
    """sources → documents with attributes, on which the corpus stage decides: a threshold measures nothing again"""
    from soma.data.corpus import build_documents, source_fingerprint
    from soma.evaluate.scorer import open_model_scorer

    def build(job: Build) -> None:
        build_documents(config, job.out, job.state, open_model_scorer(config.scorer))

    def fingerprint() -> str:
        judge = open_model_scorer(config.scorer)
        return " ".join([source_fingerprint(config), *([] if judge is None else [judge.name])])

    return Stage(f"documents{suffix}", config.of_documents(), build, fingerprint=fingerprint)


def corpus_stage(config: DataConfig, suffix: str = "") -> Stage:
    """sources, or with filters documents → corpus"""
    from soma.data.corpus import build_corpus, source_fingerprint
    from soma.data.duplicates import outside_fingerprint

    def build(job: Build) -> str | None:
        build_corpus(config, job.out, job.state, job.inputs.get("documents"))
        return None if config.dedup.semantic is None else "its embeddings are an endpoint's, who may answer otherwise"

    def metrics(artefact: Path) -> dict[str, float]:
        splits = read_json(artefact / "report.json")["splits"]
        return {f"{split}_bytes": facts["bytes"] for split, facts in splits.items()}

    inputs = {} if config.filters is None else {"documents": f"documents{suffix}"}

    def fingerprint() -> str:
        return " ".join(filter(None, ["" if inputs else source_fingerprint(config), outside_fingerprint(config)]))

    return Stage(f"corpus{suffix}", config.content(), build, inputs, fingerprint, metrics, format_version=3)


def expect_stages(config: DataConfig, suffix: str = "") -> list[Stage]:
    """corpus → what it was expected to be, where the recipe says so; a figure out of its bounds stops the run"""

    def build(job: Build) -> None:
        from soma.data.profile.expect import check_expectations

        check_expectations(config.expect, job.inputs["corpus"], job.out, job.state)

    bounds = {name: list(sides) for name, sides in config.expect.items()}
    return [Stage(f"expect{suffix}", bounds, build, {"corpus": f"corpus{suffix}"})] if bounds else []


def tokenizer_stage(config: TokenizerConfig) -> Stage:
    """corpus → tokenizer, or a tokenizer that is there"""

    def build(job: Build) -> str | None:
        from soma.data.tokenizer import load_tokenizer, train_tokenizer

        if config.load is None:
            return train_tokenizer(config, job.inputs["corpus"], job.out)
        load_tokenizer(config, job.out)
        return None

    def outside() -> str:
        if config.load is not None:
            from soma.model.tokenizer import Tokenizer

            return Tokenizer.load(config.load).hash
        return "" if config.dictionary is None else file_hash(fetch(config.dictionary, "file"))

    inputs = {} if config.load is not None else {"corpus": "corpus"}
    return Stage("tokenizer", _json(config), build, inputs, outside)


def tokens_stage(tokenizer: Mapping[str, str], base: StartModel | None, suffix: str = "") -> Stage:
    """corpus, tokenizer → tokens"""

    def build(job: Build) -> None:
        from soma.data.tokens import tokenize_corpus

        tokenize_corpus(job.inputs["corpus"], _tokenizer(job, base), job.out)

    return Stage(f"tokens{suffix}", {}, build, {"corpus": f"corpus{suffix}", **tokenizer}, _fingerprint(base))


def mixture_stages(recipe: Recipe, tokenizer: Mapping[str, str], base: StartModel | None) -> list[Stage]:
    """The corpora and tokens of a mixture's parts that have text of their own, then the mixture."""
    if recipe.mixture is None:
        return []
    stages: list[Stage] = []
    inputs = {}
    for part in recipe.mixture:
        if part.data is not None:
            sources, suffix = _seeded(part.data, recipe), f"_{part.name}"
            stages += [] if sources.filters is None else [documents_stage(sources, suffix)]
            stages += [corpus_stage(sources, suffix), *expect_stages(sources, suffix)]
            stages += [tokens_stage(tokenizer, base, suffix)]
            inputs[part.name] = f"tokens_{part.name}"
        elif part.tokens is None:
            inputs[part.name] = "tokens"
    return [*stages, mixture_stage(recipe.mixture, inputs)]


def mixture_stage(parts: list[MixturePart], inputs: Mapping[str, str]) -> Stage:
    """tokens of several corpora → mixture"""

    def place(part: MixturePart) -> str:
        assert part.tokens is not None
        return part.tokens if URL.match(part.tokens) else str(Path(part.tokens).absolute())

    def build(job: Build) -> None:
        from soma.data.mixture import write_mixture

        entries: list[dict[str, Any]] = []
        for part in parts:
            tokens = job.inputs[part.name] if part.name in inputs else place(part)
            entries.append({"name": part.name, "tokens": tokens, "weight": part.weight, "epochs": part.epochs})
        beside = [path.parent / "mixture" for path in job.inputs.values()]  # where the artefact will lie
        write_mixture(job.out, entries, home=beside[0] if beside else None)

    def fingerprint() -> str:
        from soma.data.mixture import part_index

        return json_hash([part_index(place(part))["splits"] for part in parts if part.tokens is not None])

    config = [part.model_dump(mode="json", exclude={"data"}) for part in parts]
    return Stage("mixture", {"parts": config}, build, inputs, fingerprint)


def pairs_stage(name: str, config: InstructConfig, corpus: Mapping[str, str]) -> Stage:
    """corpus or files → instruction or preference pairs"""
    from soma.data.instruct import build_instruct, instruct_fingerprint

    def build(job: Build) -> None:
        build_instruct(config, job.inputs.get("corpus"), job.out)

    return Stage(name, _json(config), build, corpus, lambda: instruct_fingerprint(config))


def pair_tokens_stage(name: str, pairs: str, tokenizer: Mapping[str, str], base: StartModel | None) -> Stage:
    """pairs, tokenizer → tokens with loss masks"""

    def build(job: Build) -> None:
        from soma.data.tokens import tokenize_instruct

        tokenize_instruct(job.inputs["pairs"], _tokenizer(job, base), job.out)

    return Stage(name, {}, build, {"pairs": pairs, **tokenizer}, _fingerprint(base), format_version=2)


def _tokenizer(job: Build, base: StartModel | None) -> Path:
    """The trained tokenizer's folder, or the base model's, which holds its own."""
    return job.inputs["tokenizer"] if base is None else base.path()


def _fingerprint(base: StartModel | None) -> Callable[[], str]:
    return base.fingerprint if base else _nothing


# --- Training ---


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

    settings = {"train": _json(config), "model": shape.model_dump(mode="json", exclude_unset=True) if shape else None}
    return Stage(
        "train", settings, build, {"tokens": tokens, **tokenizer}, _fingerprint(base), training_metrics("train"),
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
        start = job.inputs["model"] / "model" if "model" in job.inputs else _required(base).path()
        return _train(job, name, config, start, job.inputs["tokens"], base)

    inputs = {"tokens": tokens, **model, **tokenizer}
    return Stage(
        name, _json(config), build, inputs, _fingerprint(base), training_metrics(name), format_version=2,
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


def _required(base: StartModel | None) -> StartModel:
    assert base is not None, "the recipe's validation asks for a model to start from"
    return base


def _train(job: Build, name: str, config: TrainConfig, model: Any, tokens: Path, base: StartModel | None) -> str | None:
    from soma.train.parallel import ranks
    from soma.train.trainer import train

    call: dict[str, Any] = {"config": config, "out": job.out, "work": job.state, "tokens": tokens, "model": model}
    call["tokenizer"] = _tokenizer(job, base)
    ranks.together(call)
    result = train(**call, tracker=job.tracking.for_stage(name))
    return "max_seconds cut the number of steps to what this machine's speed allowed" if result.limited else None


def training_metrics(name: str) -> Callable[[Path], dict[str, float]]:
    """Final figures of a training stage, with the stage's name before them."""

    def read(artefact: Path) -> dict[str, float]:
        facts = read_json(artefact / "logs" / "summary.json")
        return {f"{name}_{key}": value for key, value in facts.items() if isinstance(value, int | float)}

    return read


# --- Evaluation and service ---


def evaluate_stage(name: str, config: EvaluateConfig, inputs: Mapping[str, str], base: StartModel | None) -> Stage:
    """model, corpus → scores and samples"""

    def build(job: Build) -> None:
        from soma.evaluate.evaluate import evaluate

        model = job.inputs["model"] / "model" if "model" in job.inputs else _required(base).path()
        evaluate(config, job.out, model=model, corpus=job.inputs["corpus"], instruct=job.inputs.get("instruct"))

    def metrics(artefact: Path) -> dict[str, float]:
        scores = read_json(artefact / "scores.json")
        return {f"{name}_bits_per_byte": scores["bits_per_byte"]["value"]}

    return Stage(name, _json(config), build, {"corpus": "corpus", **inputs}, _fingerprint(base), metrics, 2)


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

        before = job.inputs["start"] / "model" if "start" in job.inputs else _required(base).path()
        evaluate_tuned(
            config,
            job.out,
            model=job.inputs["model"] / "model",
            start=before,
            tokens=job.inputs["tokens"],
            beta=beta,
        )

    def metrics(artefact: Path) -> dict[str, float]:
        facts = read_json(artefact / "answers.json")
        figures = facts if facts["kind"] == "pairs" else facts["after"] or {}
        return {f"{name}_{key}": value for key, value in figures.items() if isinstance(value, int | float)}

    inputs = {"tokens": tokens, **model, **({"start": start["model"]} if start else {})}
    return Stage(name, _json(config) | {"beta": beta}, build, inputs, _fingerprint(base), metrics)


def probe_stage(config: ProbeConfig, model: Mapping[str, str], base: StartModel | None) -> Stage:
    """model → a running service → answers and latencies"""

    def build(job: Build) -> str:
        from soma.serve.probe import probe
        from soma.serve.server import running_service

        folder = job.inputs["model"] / "model" if model else _required(base).path()
        logs = job.out / "logs"
        logs.mkdir()
        with running_service(folder, log=logs / "service.log") as url:
            write_json(logs / "probe.json", probe(url, **config.model_dump()))
        return "latencies are measured"

    return Stage("probe", _json(config), build, model, _fingerprint(base))
