"""What a training stage can be told. Loads no torch.

Lengths of schedule parts (`warmup`, `decay`) are a share of all steps when below 1, a number of steps from 1 on.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soma.data.config import StreamConfig
from soma.model.lora_config import LoRAConfig
from soma.train.parallel.config import Layout

DEFAULT_EPOCHS = 1.0
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class LoRATraining(LoRAConfig):
    """Train low-rank updates beside frozen weights, by PEFT's names. The artefact holds them as `adapter/`, a PEFT
    folder, and merged into the weights as `model/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_weights: Literal["full", "int8", "int4"] = Field(
        "full",
        description="Of the frozen layers in training. int8, int4: rounded to the nearest in groups of 32 (QLoRA, "
        "arXiv:2305.14314, with plain integers in place of NF4); `model/` has the update merged into the whole "
        "weights.",
    )


class TrainConfig(BaseModel):
    """Pretraining, and what all other training stages share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # How long
    steps: int | None = Field(None, ge=1, description="Optimizer steps. Give one of steps, tokens, epochs.")
    tokens: int | None = Field(None, ge=1, description="Positions to train on; rounded up to whole steps.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data (1 where no length is given).")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Guard on the training time: the steps shrink when the measured speed says they would take "
        "longer. The artefact is then marked `limited`.",
    )

    # The batch
    sequence_length: int = Field(512, ge=2, description="Tokens of one sequence.")
    batch_size: int = Field(16, ge=1, description="Sequences of one optimizer step, over all ranks.")
    microbatch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences in one forward and backward pass; gradients accumulate up to batch_size. "
        "None: the whole batch of a rank at once.",
    )
    pack: Literal["auto", "concat", "whole"] = Field(
        "auto",
        description="concat: cut the stream of documents into full sequences; whole: never cut a document. "
        "auto: whole where there are loss masks.",
    )
    pack_buffer: int | None = Field(
        None,
        ge=1,
        description="Documents that are packed and shuffled at a time, in a row as they are stored; blocks of them "
        "come in a permuted order. None: all. Shards at a URL need it where they are more than stream.cache_gb.",
    )
    length_stages: list[int] = Field(
        default_factory=list,
        description="Curriculum by length: [256, 1024] begins each epoch with the documents of at most 256 tokens, "
        "goes on with those of at most 1024, ends with the longer ones.",
    )
    stream: StreamConfig = Field(StreamConfig(), description="Shards at a URL: how much of them lies here.")
    long_conversations: Literal["drop", "truncate"] = Field(
        "drop",
        description="Conversations longer than sequence_length. drop: leave them out; truncate: end them after the "
        "last answer that fits, and leave out those without one. An answer is never cut. Counted in train.json.",
    )
    isolate_documents: bool = Field(
        True, description="Attention stays within a document. False: a packed sequence is one text (plain causal)."
    )

    # The optimizer
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw (fused), or muon for the hidden matrices with adamw for the rest."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate; Muon's update is scaled to use AdamW's.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the denominator.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon: Nesterov momentum.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices (not norms, biases, embeddings).")
    grad_clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 does not clip.")
    router_bias_rate: float = Field(
        1e-3,
        ge=0,
        description="DeepSeek-V3's routers: the expert bias moves by this much towards balance after each step "
        "(arXiv:2408.15664). 0: it stays.",
    )
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine, or wsd: warmup, stable, then a decay in the last steps."
    )
    warmup: float = Field(0.02, ge=0, description="Linear warm-up: share of the steps (<1) or steps.")
    decay: float = Field(0.2, ge=0, description="wsd: length of the decay: share of the steps (<1) or steps.")
    minimum_learning_rate: float = Field(
        0.0, ge=0, le=1, description="Where the schedule ends, as a share of the peak."
    )

    lora: LoRATraining | None = Field(
        None, description="Train low-rank updates (LoRA) beside the frozen weights instead of the weights."
    )

    # How it computes
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where there is one, else the CPU."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the matrix products; parameters stay fp32. auto: bf16 where it is native, else fp32. "
        "fp16 scales the loss.",
    )
    save_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Of the weights on disk. auto: as in the model that it starts from; fp32 from scratch."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile. auto: when there is a C++ compiler and the run is long enough to pay for it.",
    )
    parameters: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Of the weights in training. bf16: weights, gradients and moments in bf16, rounded stochastically: "
        "half of the memory; adamw only.",
    )
    float8: bool = Field(
        False, description="Products of the layers' matrices in 8-bit floating point, on GPUs that have it."
    )
    activation_checkpointing: bool | str = Field(
        False,
        description="What is computed again in the backward pass, to save memory. true: every layer (about a third "
        "more time); every:N: each Nth; selective: all but products and attention; budget:SIZE (budget:8GB): as few "
        "layers as keep the activations of a microbatch below it.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; None: as torch decides.")
    layout: Layout = Field(
        Layout(), description="How the ranks of torchrun share the work (docs/parallel.md); the result is the same."
    )
    seed: int = Field(0, ge=0, description="Of the weights, the order of the data, and sampling.")

    # What it reports and keeps
    log_every: int = Field(10, ge=1, description="Steps between two lines of the log.")
    evaluate_every: int = Field(0, ge=0, description="Steps between held-out losses; 0: only at the end.")
    evaluate_batches: int = Field(8, ge=0, description="Batches of a held-out loss; 0: none is taken.")
    early_stop: int = Field(
        0,
        ge=0,
        description="Stop after so many evaluations without gain in the held-out loss; the best weights stay. 0: off.",
    )
    checkpoint_every: int = Field(100, ge=0, description="Steps between two checkpoints; 0: none.")
    background_checkpoints: bool = Field(
        True,
        description="Training goes on while a checkpoint is written, from a copy in the CPU's memory as large as "
        "weights and optimizer state. False: it waits, without the copy.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept, the newest (the best one is kept besides).")
    sample_prompts: list[str] = Field(default_factory=list, description="Continued at every evaluation, for the log.")
    sample_tokens: int = Field(64, ge=1, description="Tokens of a sample.")
    sample_temperature: float = Field(0.8, ge=0, description="Of the samples; 0: the likeliest token.")

    # When it gives up
    divergence_factor: float = Field(
        2.0, gt=1, description="The loss diverges when it is this many times the best running mean …"
    )
    divergence_steps: int = Field(10, ge=1, description="… for this many steps on end.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        lengths = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} all say how long to train: keep one")
        micro = self.microbatch_size
        if micro is not None and self.batch_size % micro:
            low = self.batch_size // micro * micro
            near = f"{low} or {low + micro}" if low else f"{micro}"
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of microbatch_size {micro} "
                f"({self.batch_size} / {micro} = {self.batch_size / micro:.3g} microbatches): take {near}"
            )
        if self.early_stop and not self.evaluate_every:
            raise ValueError("early_stop counts evaluations and evaluate_every is 0: set evaluate_every (steps)")
        if self.early_stop and not self.evaluate_batches:
            raise ValueError("early_stop needs a held-out loss and evaluate_batches is 0: set evaluate_batches")
        if self.parameters == "bf16" and (self.optimizer == "muon" or self.precision == "fp16"):
            other = "optimizer muon" if self.optimizer == "muon" else "precision fp16"
            raise ValueError(f"parameters bf16 and {other} exclude each other: take adamw and precision auto or bf16")
        if self.lora is not None and (self.optimizer == "muon" or self.float8):
            other = "float8" if self.float8 else "optimizer muon"
            raise ValueError(f"lora and {other} exclude each other: take adamw and float8: false")
        if self.length_stages != sorted({stage for stage in self.length_stages if stage > 0}):
            raise ValueError(f"length_stages {self.length_stages}: give lengths above 0 in ascending order")
        form, _ = checkpointing_form(self.activation_checkpointing)
        if form == "budget" and self.layout.cpu_offload:
            raise ValueError(
                "activation_checkpointing with a budget is measured with whole layers on the GPU, and layout: "
                "cpu_offload keeps them from there: take true, every:N or selective"
            )
        if self.steps is not None:
            check_schedule(self, self.steps)
        return self

    def tokens_per_step(self) -> int:
        """Positions of one optimizer step over all ranks: batch_size × sequence_length."""
        return self.batch_size * self.sequence_length

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the run. 100k tokens at 16 × 512 = 8,192 a step: 12.2, rounded up to 13."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // self.tokens_per_step())
        return max(1, round((self.epochs or DEFAULT_EPOCHS) * steps_per_epoch))


def checkpointing_form(mode: bool | str) -> tuple[str, int]:
    """activation_checkpointing as (kind, number): ("none", 0), ("every", N), ("selective", 0), ("budget", bytes).

    Raises ValueError for other words. `budget:8GB` is 8·10⁹ bytes, `budget:8GiB` 8·2³⁰.
    """
    if isinstance(mode, bool):
        return ("every", 1) if mode else ("none", 0)
    kind, _, text = mode.partition(":")
    if kind == "selective" and not text:
        return "selective", 0
    if kind == "every" and text.isdigit() and int(text) > 0:
        return "every", int(text)
    unit = next((name for name in UNITS if text.upper().endswith(name)), "")
    number = text[: len(text) - len(unit)].strip()
    if kind == "budget" and unit and number.replace(".", "", 1).isdigit():
        return "budget", int(float(number) * UNITS[unit])
    raise ValueError(
        f"activation_checkpointing {mode!r}: expected false, true (every layer), every:N, selective, or budget:SIZE "
        "(such as budget:8GB)"
    )


def part_steps(value: float, steps: int) -> int:
    """A schedule part in steps: a share of `steps` when below 1 (0.02 of 500: 10), the number itself from 1 on."""
    return round(value * steps) if value < 1 else round(value)


def check_schedule(config: TrainConfig, steps: int) -> None:
    """Raises ValueError with the arithmetic when warm-up and decay do not fit into `steps`."""
    warmup = part_steps(config.warmup, steps)
    decay = part_steps(config.decay, steps) if config.schedule == "wsd" else 0
    if warmup + decay > steps:
        parts = f"warmup {warmup}" + (f" + decay {decay} = {warmup + decay}" if decay else "")
        raise ValueError(f"{parts} steps is more than the {steps} steps of the run: shorten it or train for longer")


class TuneConfig(TrainConfig):
    """Instruction tuning: loss on the answers alone, from a model folder."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of matrices (not norms, biases, embeddings).")
    router_bias_rate: float = Field(
        0.0, ge=0, description="DeepSeek-V3's routers: step of the expert bias towards balance. 0: it stays."
    )
    warmup: float = Field(0.03, ge=0, description="Linear warm-up: share of the steps (<1) or steps.")


class PreferenceConfig(TrainConfig):
    """Preference tuning by DPO (Rafailov et al. 2023): pairs of a chosen and a rejected answer, from a model folder."""

    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference model (DPO's β).")
    batch_size: int = Field(16, ge=1, description="Pairs of one optimizer step, over all ranks.")
    microbatch_size: int | None = Field(
        None, ge=1, description="Pairs in one forward and backward pass; None: the whole batch of a rank at once."
    )
    learning_rate: float = Field(5e-6, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of matrices (not norms, biases, embeddings).")
    router_bias_rate: float = Field(
        0.0, ge=0, description="DeepSeek-V3's routers: step of the expert bias towards balance. 0: it stays."
    )
    warmup: float = Field(0.1, ge=0, description="Linear warm-up: share of the steps (<1) or steps.")
    long_conversations: Literal["drop"] = Field("drop", description="Pairs longer than sequence_length are left out.")
    pack: Literal["whole"] = Field("whole", description="A pair is never cut across sequences.")


def dump(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values."""
    return config.model_dump(mode="json")
