"""From a model reference to a running engine."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from soma.base import progress
from soma.base.errors import UserError
from soma.base.machine import native_bf16
from soma.engine.engine import Engine
from soma.model.compressed import to_dense
from soma.model.folder import local_folder
from soma.model.hub import load_config, load_model
from soma.model.shard import Shard, load_shard
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_engine(
    model_ref: str | Path, *, precision: str = "auto", device: str = "auto", **options: Any
) -> tuple[Engine, Tokenizer, str]:
    """The engine of a model, its tokenizer, and the name that it is served under.

    precision: fp32, bf16, fp16, or auto: that of the weights on disk, but fp32 for half precision on a CPU without
    native bf16. device: cpu, cuda, cuda:1 …, or auto: a GPU where there is one. options: those of `Engine`.
    Raises UserError for what is not there or does not fit together.
    """
    directory = local_folder(model_ref)
    model, tokenizer = load_weights(directory, precision=precision, device=device)
    return Engine(model, tokenizer, **options), tokenizer, model_name(model_ref, directory)


def load_weights(directory: Path, *, precision: str = "auto", device: str = "auto") -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a folder; arguments and errors as for `load_engine`."""
    model = load_model_for(directory, precision=precision, device=device)
    return model, load_tokenizer(directory)


def load_model_for(directory: Path, *, precision: str, device: str, shard: Shard | None = None) -> Transformer:
    """The model of a folder, or a shard of it; arguments and errors as for `load_engine`."""
    place, dtype = choose_device(device), choose_dtype(precision)
    model = load_model(directory, dtype, place) if shard is None else load_shard(directory, shard, dtype, place)
    if place.type == "cpu" and to_dense(model):
        progress.current().note(f"{directory.name}: weights that C cannot read rounded are computed in {model.dtype}")
    is_slow = place.type == "cpu" and model.dtype != torch.float32 and not native_bf16()
    if precision == "auto" and is_slow:
        progress.current().note(f"{directory.name}: this CPU has no native bf16; the weights are computed in fp32")
        model = model.to(torch.float32)
    return model


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError if it has more tokens than the model."""
    tokenizer, known = Tokenizer.load(directory), load_config(directory, quantized=True).vocab_size
    if tokenizer.vocab_size > known:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}; they do not belong "
            "together"
        )
    return tokenizer


def choose_dtype(precision: str) -> torch.dtype | None:
    """The dtype of a name, None for auto; UserError for other names."""
    if precision != "auto" and precision not in DTYPES:
        raise UserError(f"precision {precision!r}: expected auto or one of {', '.join(DTYPES)}")
    return DTYPES.get(precision)


def choose_device(device: str) -> torch.device:
    """The device of a name; UserError if torch does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):
        place = torch.device(device)
        if place.type == "cpu" or (place.type == "cuda" and (place.index or 0) < torch.cuda.device_count()):
            return place
    raise UserError(f"device {device!r}: not here; expected auto, cpu, or cuda where torch sees a GPU")


def model_name(model_ref: str | Path, directory: Path) -> str:
    """What clients call the model: ORGANISATION/NAME or NAME@VERSION of a reference, else the folder's name."""
    text = str(model_ref)
    for prefix in ("hf:", "registry:"):
        if text.startswith(prefix):
            return text.removeprefix(prefix)
    name = directory.resolve().name
    return directory.resolve().parent.name if name == "model" else name
