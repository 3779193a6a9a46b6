"""The training stages: `train` does pretraining, instruction tuning and preference tuning, by its config's type."""

import copy
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soma.base import progress
from soma.base.artefact import content_hash, json_hash, write_json
from soma.base.errors import UserError
from soma.data.loader import PreferenceLoader, TokenLoader
from soma.data.store import read_index
from soma.model import float8
from soma.model.config import ModelConfig
from soma.model.dropout import stamped
from soma.model.families import config_to_hf
from soma.model.formulas import flops_per_token
from soma.model.lora import add_lora
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import QuantizedLinear, quantize
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer
from soma.train.compute import DTYPES, Compute, resolve, resolve_device, seed_everything
from soma.train.config import LoRATraining, PreferenceConfig, TrainConfig, check_schedule, dump
from soma.train.journal import Journal
from soma.train.loop import DivergenceError, Trainer, TrainResult
from soma.train.objective import LanguageModeling, Objective, Preference, make_loader
from soma.train.parallel.apply import Parallel, parallelize
from soma.train.parallel.bridge import bridge
from soma.train.parallel.bridge_deepspeed import starts_in_ram
from soma.train.parallel.config import Layout
from soma.train.parallel.export import save_merged, save_whole
from soma.train.parallel.fit import check_fit
from soma.train.parallel.offload import offloading
from soma.train.parallel.pipeline.training import stage_model
from soma.train.parallel.watch import watched
from soma.train.start import Start, fill
from soma.train.tracking import NullTracker, Tracker
from soma.train.world import World

__all__ = ["DivergenceError", "TrainResult", "train"]

# What may change between a killed run and its resumption: it does not reach the weights.
HARMLESS = ("max_seconds", "log_every", "checkpoint_every", "keep_checkpoints", "background_checkpoints",
            "sample_prompts", "sample_tokens", "sample_temperature", "layout", "stream")  # fmt: skip


def train(
    config: TrainConfig, out: Path, work: Path, *, tokens: Path, tokenizer: Path, model: ModelConfig | Path,
    tracker: Tracker | None = None, world: World | None = None,
) -> TrainResult:  # fmt: skip
    """Train `model` (a shape: from scratch; a folder: from its weights) on the token shards in `tokens`.

    Fills `out` with `model/` (a Hugging Face folder with the tokenizer), `adapter/` (a PEFT folder, with `lora`),
    `train.json` (what was done) and `logs/` (`metrics.jsonl`, `summary.json`). `work` outlives a kill and holds
    `checkpoints/`; the same call with the same `work` goes on from the newest whole one and makes the same bytes. A
    TrainConfig or TuneConfig trains on wherever the tokens' mask says so, a PreferenceConfig does DPO against the
    starting weights.

    Raises UserError where config, model and data do not fit, the disk is full, or (DivergenceError) the loss is not
    finite or diverges.
    """
    device = resolve_device(config.device).type
    with offloading(config.layout, device):
        return train_in(
            world or World.join(config.layout, device), config, out, work, tokens, tokenizer, model,
            tracker or NullTracker(),
        )  # fmt: skip


def train_in(
    world: World, config: TrainConfig, out: Path, work: Path, tokens: Path, tokenizer: Path, model: ModelConfig | Path,
    tracker: Tracker,
) -> TrainResult:  # fmt: skip
    """`train`, in a world that has been joined."""
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    names, index = Tokenizer.load(tokenizer), read_index(tokens)
    if index["masked"]:
        names.eos_ids = names.answer_end_ids  # samples end where answers do
    check_tokens(config, tokens, index, names)
    network, start = make_model(config, model, names)
    check_model(config, network.config, index, tokens)
    check_layout(config, world.mesh.layout, network.config)
    if config.lora is not None and config.lora.base_weights != "full" and not isinstance(model, Path):
        raise UserError(
            f"lora.base_weights {config.lora.base_weights}: a model from scratch has no weights worth rounding: give a "
            "model folder, or base_weights full"
        )
    loader = make_loader(config, world, tokens, "train")
    steps = total_steps(config, loader.sequences_per_epoch)
    check_length(config, loader, steps)
    compute = resolve(
        config, steps * config.tokens_per_step() * flops_per_token(network.config, config.sequence_length)
    )
    prepare(config, network, start, compute)
    parallel, objective = lay_out(config, network, start, world, compute)
    start.close()
    work.mkdir(parents=True, exist_ok=True)
    tracker.params(dump(config))
    trainer = Trainer(
        config, work, parallel=parallel, objective=objective, loader=loader,
        validation=validation_loader(config, world, tokens), steps=steps, compute=compute, tokenizer=names,
        identity=identity(config, network.config, model, index), world=world,
        journal=Journal(work / "metrics.jsonl", tracker, world.is_main),
    )  # fmt: skip
    with watched(world.mesh.layout.timeout):
        trainer.run()
        result = trainer.result(out / "model")
        final = with_ends(network.config, names.eos_ids) if index["masked"] else network.config
        dtype = DTYPES.get(config.save_precision, start.dtype)
        if config.lora is None:
            save_whole(parallel, final, dtype, result.model, tokenizer)
        else:
            base = model if isinstance(model, Path) and config.lora.base_weights != "full" else None
            save_merged(parallel, plain_lora(config.lora), base, final, dtype, out / "adapter", result.model, tokenizer)
        if world.is_main:
            write_artefact(result, compute, out, work)
            tracker.artefact(out / "model")
        world.barrier()
    return result


def make_model(config: TrainConfig, model: ModelConfig | Path, tokenizer: Tokenizer) -> tuple[Transformer, Start]:
    """The network in float32, without memory yet, and the weights that it starts from."""
    lora = None if config.lora is None else plain_lora(config.lora)
    if isinstance(model, Path):
        start = Start(model, config.seed, lora)
    else:
        ends: dict[str, Any] = {}
        if model.eos_token_id is None and tokenizer.eos_ids:
            ends["eos_token_id"] = tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_ids[0]
        for name, value in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
            if getattr(model, name) is None and value is not None:
                ends[name] = value
        start = Start(model.model_copy(update=ends), config.seed, lora)
    return Transformer(start.config, device="meta", dtype=torch.float32), start


def prepare(config: TrainConfig, network: Transformer, start: Start, compute: Compute) -> None:
    """Dtype of the weights, updates, 8-bit layers. Raises UserError where the device has no 8-bit products."""
    network.to(torch.bfloat16 if config.parameters == "bf16" else torch.float32)
    if config.lora is not None:
        add_updates(config.lora, network, start, compute.device)
    if config.float8:
        if reason := float8.why_not(compute.device):
            raise UserError(f"float8: {reason}: set float8: false")
        float8.use_float8(network)


def add_updates(lora: LoRATraining, network: Transformer, start: Start, device: torch.device) -> None:
    """Freeze the network, round it if that is asked for, and put trainable updates beside its layers."""
    if lora.base_weights != "full":
        quantize(network, {"int8": 8, "int4": 4}[lora.base_weights], head=False, fetch=start.plain)
        for module in network.modules():
            if isinstance(module, QuantizedLinear):
                module.packed, module.scales = module.packed.to(device), module.scales.to(device)
    add_lora(network, lora, start.seed)


def plain_lora(lora: LoRATraining) -> LoRAConfig:
    """PEFT's settings of an update alone."""
    return LoRAConfig(**{name: getattr(lora, name) for name in LoRAConfig.model_fields})


def with_ends(shape: ModelConfig, ends: tuple[int, ...]) -> ModelConfig:
    """The config with `ends` after the end ids that it names: a tuned model stops at the end of its turn."""
    every = tuple(dict.fromkeys([*shape.eos_token_ids, *ends]))
    return shape.model_copy(update={"eos_token_id": every if len(every) > 1 else every[0]}) if every else shape


def lay_out(
    config: TrainConfig, network: Transformer, start: Start, world: World, compute: Compute
) -> tuple[Parallel, Objective]:  # fmt: skip
    """Apply the layout to the network, in place, fill it, and make the objective that trains it."""
    offload = world.mesh.layout.cpu_offload
    filled = partial(fill, network, start, compute.device, offload or starts_in_ram(world.mesh.layout))
    if world.mesh.layout.engine != "soma" and world.size > 1:
        return bridge(network, config, world.mesh, compute, filled)
    is_pairs = isinstance(config, PreferenceConfig)
    reference = copy.deepcopy(network) if is_pairs and config.lora is None else None  # else it lies below the updates
    filled_reference = partial(fill, reference, start, compute.device, offload) if reference is not None else filled
    if world.mesh.layout.pp > 1:
        return stage_model(network, config, world.mesh, compute, filled, reference, filled_reference)
    rows = (config.microbatch_size or config.batch_size // world.data_size) * (2 if is_pairs else 1)
    length = world.mesh.layout.padded_length(config.sequence_length) // world.mesh.layout.cp
    tokens_BT = torch.zeros(rows, length, dtype=torch.long, device=compute.device)

    def measure() -> None:
        with compute.autocast(), stamped(tokens_BT):
            network.features(tokens_BT)

    parallel = parallelize(
        network, world.mesh, activation_checkpointing=config.activation_checkpointing, compile_layers=compute.compile,
        whole_batch=config.microbatch_size is None, measure=measure, fill=filled,
    )  # fmt: skip
    if reference is not None:
        parallelize(reference.requires_grad_(False), world.mesh, fill=filled_reference)
    # Layers are compiled one by one where the layout is applied.
    layered = replace(compute, compile=False) if world.size > 1 or offload else compute
    return parallel, make_objective(config, parallel, reference, layered)


def make_objective(
    config: TrainConfig, parallel: Parallel, reference: Transformer | None, compute: Compute
) -> Objective:
    """DPO for a PreferenceConfig, against `reference` (as `Preference` has it); next-token prediction for others."""
    if not isinstance(config, PreferenceConfig):
        return LanguageModeling(parallel.model, config, compute, parallel.cross_entropy_sum)
    return Preference(parallel.model, reference, config, compute, parallel.target_logprobs, parallel.across)


def identity(config: TrainConfig, shape: ModelConfig, model: ModelConfig | Path, index: dict[str, Any]) -> str:
    """Hash of all that a run's weights follow from: checkpoints of another run are not taken up."""
    start = content_hash(model) if isinstance(model, Path) else None
    settings = {key: value for key, value in dump(config).items() if key not in HARMLESS}
    return json_hash([settings, shape.model_dump(mode="json"), start, index])


def validation_loader(config: TrainConfig, world: World, tokens: Path) -> TokenLoader | PreferenceLoader | None:
    """One pass over the held-out split; None, with a note, where there is nothing in it to learn from."""
    if not config.evaluate_batches:
        return None
    try:
        return make_loader(config, world, tokens, "validation", epochs=1)
    except UserError as error:
        if config.early_stop:
            raise
        progress.current().note(f"no held-out loss is taken: {error}")
        return None


def total_steps(config: TrainConfig, sequences_per_epoch: int) -> int:
    """Optimizer steps of the run; raises UserError where the schedule does not fit into them."""
    steps = config.total_steps(sequences_per_epoch / config.batch_size)
    try:
        check_schedule(config, steps)
    except ValueError as error:
        raise UserError(str(error)) from None
    return steps


def check_length(config: TrainConfig, loader: TokenLoader | PreferenceLoader, steps: int) -> None:
    """Raise UserError where a mixture's parts, all limited by their `epochs`, have fewer sequences than the run."""
    total = loader.total if isinstance(loader, TokenLoader) else None
    if total is not None and steps * config.batch_size >= total + config.batch_size:
        raise UserError(
            f"{steps} steps of {config.batch_size} sequences are asked for, the mixture has {total} within the epochs "
            "of its parts: train for fewer steps, or raise (or leave out) the epochs of a part"
        )


def check_tokens(config: TrainConfig, tokens: Path, index: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError where the shards are empty, of another kind, or made with another tokenizer."""
    split = "train.chosen" if isinstance(config, PreferenceConfig) else "train"
    if split not in index["splits"]:
        wanted = "preference pairs" if isinstance(config, PreferenceConfig) else "text or conversations"
        raise UserError(
            f"{tokens}: no split {split!r} (there are {', '.join(index['splits'])}): this stage needs {wanted}"
        )
    if not index["splits"][split]["tokens"]:
        raise UserError(f"{tokens}: the split {split!r} is empty, there is nothing to train on")
    if index["tokenizer_hash"] != tokenizer.hash:
        raise UserError(
            f"{tokens}: made with another tokenizer ({index['tokenizer_hash'][:12]}) than the model's "
            f"({tokenizer.hash[:12]}): tokenize the corpus again with the model's own"
        )


def check_model(config: TrainConfig, model: ModelConfig, index: dict[str, Any], tokens: Path) -> None:
    """Raise UserError where ids or positions go beyond the model's tables, or the model could not be saved."""
    config_to_hf(model, "float32")
    if index["vocab_size"] > model.vocab_size:
        raise UserError(
            f"{tokens}: its tokenizer has {index['vocab_size']} entries, the model's vocab_size is {model.vocab_size}: "
            "raise model.vocab_size, or take the model's own tokenizer"
        )
    if config.sequence_length > model.max_position_embeddings:
        raise UserError(
            f"sequence_length {config.sequence_length} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}: shorten the one or (RoPE models) raise the other"
        )


def check_layout(config: TrainConfig, layout: Layout, model: ModelConfig) -> None:
    """Raise UserError where the layout does not fit the batch, the model, or what else is asked for."""
    check_fit(config, layout, model)
    padded = layout.padded_length(config.sequence_length)
    if padded != config.sequence_length and model.num_experts and not config.isolate_documents:
        raise UserError(
            f"sequence_length {config.sequence_length} is not a multiple of {layout.column_unit} (2 × cp × tp, as far "
            "as cp and sp cut it), and its padding would be balanced over the experts where isolate_documents is "
            f"false: take {padded}, or isolate_documents true"
        )


def write_artefact(result: TrainResult, compute: Compute, out: Path, work: Path) -> None:
    """`train.json` and `logs/`. What a clock has touched goes under `logs/`, which is no content."""
    facts = {key: value for key, value in asdict(result).items() if key != "model"}
    stable = ("steps", "planned_steps", "limited", "stopped_early", "tokens", "loss", "validation_loss", "parameters",
              "documents_left_out", "documents_truncated")  # fmt: skip
    write_json(
        out / "train.json",
        {
            **{key: facts[key] for key in stable},
            "precision": compute.precision,
            "compile": compute.compile,
            "device": compute.device.type,
        },
    )
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    write_json(logs / "summary.json", facts)
    shutil.copyfile(work / "metrics.jsonl", logs / "metrics.jsonl")
    if result.limited:
        progress.current().note(f"limited by max_seconds: {result.steps} of {result.planned_steps} steps")
