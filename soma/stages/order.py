"""Which stages a recipe has."""

from soma.data.config import InstructConfig, MixturePart
from soma.recipe import Recipe
from soma.stages.data import (
    corpus_stages,
    mixture_stages,
    pair_tokens_stage,
    pairs_stage,
    tokenizer_stage,
    tokens_stage,
)
from soma.stages.evaluation import answers_stage, evaluate_stage, probe_stage
from soma.stages.stage import Stage, seeded
from soma.stages.start import StartModel
from soma.stages.training import pretrain_stage, tune_stage
from soma.train.config import TrainConfig


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order in which they run."""
    stages: list[Stage] = []
    tokenizer = {} if recipe.base else {"tokenizer": "tokenizer"}
    if recipe.data is not None:
        stages += corpus_stages(seeded(recipe.data, recipe))
    if recipe.tokenizer is not None:
        stages.append(tokenizer_stage(recipe.tokenizer))
    base = StartModel(recipe.base) if recipe.base else None
    model: dict[str, str] = {}
    if recipe.train is not None:
        if recipe.data is not None and (recipe.mixture is None or any(_is_main(part) for part in recipe.mixture)):
            stages.append(tokens_stage(tokenizer, base))
        stages += mixture_stages(recipe, tokenizer, base)
        tokens = "tokens" if recipe.mixture is None else "mixture"
        stages.append(pretrain_stage(seeded(recipe.train, recipe), recipe.model, tokenizer, base, tokens))
        model = {"model": "train"}
    for block, data in (("tune", recipe.instruct), ("prefer", recipe.preferences)):
        config: TrainConfig | None = getattr(recipe, block)
        if config is None or data is None:
            continue
        corpus = {"corpus": "corpus"} if recipe.data is not None and not _own_files(data) else {}
        pairs = "instruct" if block == "tune" else "preferences"
        stages.append(pairs_stage(pairs, seeded(data, recipe), corpus))
        stages.append(pair_tokens_stage(f"{pairs}_tokens", pairs, tokenizer, base))
        tuning = seeded(config, recipe)
        stages.append(tune_stage(block, tuning, f"{pairs}_tokens", model, tokenizer, base, recipe.model))
        start, model = model, {"model": block}
        if recipe.evaluate is not None and (block == "prefer" or recipe.data is None):
            measure = seeded(recipe.evaluate, recipe)
            stages.append(answers_stage(f"{block}_scores", measure, config, f"{pairs}_tokens", model, start, base))
    if recipe.evaluate is not None and recipe.data is not None:
        answers = {"instruct": "instruct_tokens"} if recipe.tune is not None else {}
        measure = seeded(recipe.evaluate, recipe)
        if recipe.train is not None:
            stages.append(evaluate_stage("evaluate", measure, {"model": "train"} | answers, base))
        elif recipe.base:
            stages.append(evaluate_stage("evaluate", measure, answers, base))
        if model and model != {"model": "train"}:
            stages.append(evaluate_stage("evaluate_tuned", measure, model | answers, base))
    if recipe.probe is not None:
        stages.append(probe_stage(recipe.probe, model, base))
    return stages


def _own_files(config: InstructConfig) -> bool:
    """Whether instruction pairs come from files of their own rather than from the corpus."""
    return bool(config.sources)


def _is_main(part: MixturePart) -> bool:
    """Whether a part of a mixture is the recipe's own `data`."""
    return part.data is None and part.tokens is None
