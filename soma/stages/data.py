"""Stages that make the data: text → corpus → tokenizer → tokens, mixtures of them, and pairs to tune on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma.base.artefact import file_hash, json_hash, read_json
from soma.base.fetch import fetch
from soma.base.secrets import URL
from soma.data.config import DataConfig, InstructConfig, MixturePart, TokenizerConfig
from soma.recipe import Recipe
from soma.stages.stage import Build, Stage, seeded, settings
from soma.stages.start import StartModel, outside_of, tokenizer_folder


def corpus_stages(config: DataConfig, suffix: str = "") -> list[Stage]:
    """What makes a corpus of sources, and holds it to what was expected of it."""
    documents = [] if config.filters is None else [documents_stage(config, suffix)]
    return [*documents, corpus_stage(config, suffix), *expect_stages(config, suffix)]


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
    return Stage("tokenizer", settings(config), build, inputs, outside)


def tokens_stage(tokenizer: Mapping[str, str], base: StartModel | None, suffix: str = "") -> Stage:
    """corpus, tokenizer → tokens"""

    def build(job: Build) -> None:
        from soma.data.tokens import tokenize_corpus

        tokenize_corpus(job.inputs["corpus"], tokenizer_folder(job, base), job.out)

    return Stage(f"tokens{suffix}", {}, build, {"corpus": f"corpus{suffix}", **tokenizer}, outside_of(base))


def mixture_stages(recipe: Recipe, tokenizer: Mapping[str, str], base: StartModel | None) -> list[Stage]:
    """The corpora and tokens of a mixture's parts that have text of their own, then the mixture."""
    if recipe.mixture is None:
        return []
    stages: list[Stage] = []
    inputs = {}
    for part in recipe.mixture:
        if part.data is not None:
            suffix = f"_{part.name}"
            stages += [*corpus_stages(seeded(part.data, recipe), suffix), tokens_stage(tokenizer, base, suffix)]
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

    return Stage(name, settings(config), build, corpus, lambda: instruct_fingerprint(config))


def pair_tokens_stage(name: str, pairs: str, tokenizer: Mapping[str, str], base: StartModel | None) -> Stage:
    """pairs, tokenizer → tokens with loss masks"""

    def build(job: Build) -> None:
        from soma.data.tokens import tokenize_instruct

        tokenize_instruct(job.inputs["pairs"], tokenizer_folder(job, base), job.out)

    return Stage(name, {}, build, {"pairs": pairs, **tokenizer}, outside_of(base), format_version=2)
