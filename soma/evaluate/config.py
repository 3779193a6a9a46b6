"""Settings of an evaluation. Loads no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A block of the recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SampleConfig(Strict):
    """Texts that the model is asked to go on with, so that a person sees what it writes."""

    prompts: list[str] = Field([], description="Texts to continue.")
    chat_prompts: list[str] = Field([], description="User messages to answer, where the model chats.")
    held_out: int = Field(3, ge=0, description="How many held-out documents to continue, beside the prompts above.")
    prompt_tokens: int = Field(48, ge=1, description="Tokens of a held-out document that are shown to the model.")
    max_tokens: int = Field(96, ge=1, description="Longest continuation in tokens.")
    temperature: float = Field(0.7, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Keep the likeliest tokens that hold this much probability.")


class EvaluateConfig(Strict):
    """How a model is measured on held-out text."""

    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in the sliding window. Left out: what the model was made for, at most 2048."
    )
    stride: int | None = Field(
        None, ge=1, description="Tokens scored per window; the others are context. Left out: half of sequence_length."
    )
    batch_size: int = Field(32, ge=1, description="Windows in one forward pass.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="Arithmetic of the forward pass; auto is bf16 where native. Log-softmax is always fp32."
    )
    max_bytes: int | None = Field(
        None, ge=1, description="Measure only the first documents (by id) up to this many UTF-8 bytes. Left out: all."
    )
    baselines: list[Literal["gzip", "xz"]] = Field(
        ["gzip", "xz"], description="Compressors measured on the same bytes, each at -9."
    )
    resamples: int = Field(1000, ge=0, description="Bootstrap resamples over documents for the 95 % interval.")
    record_logprobs: bool = Field(
        True, description="Keep every token id and logprob in tokens.parquet; otherwise each document's hash and total."
    )
    samples: SampleConfig = Field(SampleConfig(), description="Continuations to show.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap and of the samples.")

    @model_validator(mode="after")
    def stride_fits(self) -> "EvaluateConfig":
        """A stride longer than the window would leave tokens out."""
        if self.sequence_length is not None and self.stride is not None and self.stride > self.sequence_length:
            raise ValueError(
                f"stride ({self.stride}) is longer than sequence_length ({self.sequence_length}): "
                "tokens would be left out"
            )
        return self
