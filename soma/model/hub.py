"""Hugging Face model folders: load and save, sharded or not, one tensor in memory at a time beside the model."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soma.base.artefact import read_json, write_json
from soma.base.errors import UserError
from soma.model.compressed import load_compressed, stored
from soma.model.compressed_config import read_quantization
from soma.model.config import ModelConfig
from soma.model.families import config_from_hf, config_to_hf
from soma.model.folder import local_folder
from soma.model.layout import Entry, canonical_name, disk_layout, is_tolerated
from soma.model.safetensors_io import DTYPES, SafetensorsFile, write_safetensors
from soma.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
DEFAULT_SHARD_BYTES = 4 << 30


def load_config(directory: str | Path, *, quantized: bool = False) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. UserError if config.json is absent, broken or of an unknown family, or,
    unless `quantized`, if it has a quantization_config."""
    raw, path = read_config(directory)
    if quantized:
        raw.pop("quantization_config", None)
    return config_from_hf(raw, path)


def read_config(directory: str | Path) -> tuple[dict[str, Any], Path]:
    """The dict of a folder's config.json, and the file. UserError if there is none or it is broken."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there, so it is not a model folder")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return raw, path


def load_model(
    ref: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *, quantized: bool = True
) -> Transformer:
    """The model in a Hugging Face folder, in eval mode.

    ref: local folder, `hf:org/name[@revision]`, `registry:NAME@VERSION`. dtype None: that of the token embedding on
    disk. Each tensor is read straight into its place (and cast there if dtypes differ), so no second copy exists.
    quantized: take folders whose weights are rounded (`soma.model.compressed`); they cannot be trained.
    Raises UserError naming the file and the tensor that is missing, unexpected, mis-shaped, of a dtype that is no
    float, or cut off.
    """
    directory = local_folder(ref)
    config, (raw, path) = load_config(directory, quantized=quantized), read_config(directory)
    given = raw.get("quantization_config")
    quantization = None if given is None else read_quantization(given, path)
    files, location = open_weights(directory, config)
    try:
        model = Transformer(config, device="meta")
        meta = model.state_dict()
        layout = disk_layout(config, meta)
        if dtype is None and layout[0].name in location:
            dtype = DTYPES[describe(location, layout[0].name)[0]]
        fill_experts: Callable[[Mapping[str, Tensor]], None] | None = None
        if quantization is not None:
            layout, location, fill_experts = load_compressed(
                model, layout, location, quantization, dtype or torch.float32, torch.device(device)
            )
        check_names(config, directory, layout, location)
        assert dtype is not None
        allocate(model, dtype, torch.device(device))
        targets = model.state_dict()
        for entry in layout:
            read_entry(entry, location, targets)
        if fill_experts is not None:
            fill_experts(targets)
    finally:
        for file in files:
            file.close()
    return model.eval()


Location = dict[str, tuple[SafetensorsFile, str]]


def open_weights(directory: Path, config: ModelConfig) -> tuple[list[SafetensorsFile], Location]:
    """All weight files, and for each canonical tensor name the file and the name in it."""
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise UserError(f"{directory / INDEX}: key 'weight_map' is missing")
        weight_map: dict[str, str] = index["weight_map"]
    elif (directory / WEIGHTS).is_file():
        weight_map = {}
    elif list(directory.glob("pytorch_model*.bin")):
        raise UserError(f"{directory}: only pickled weights (pytorch_model.bin) there; convert them to safetensors")
    else:
        raise UserError(f"{directory}: no weights there (neither {WEIGHTS} nor {INDEX})")
    files: list[SafetensorsFile] = []
    location: Location = {}
    try:
        for shard in sorted(set(weight_map.values())) or [WEIGHTS]:
            if not (directory / shard).is_file():
                raise UserError(f"{directory / shard}: this weight shard, named in {INDEX}, is not there")
            files.append(SafetensorsFile(directory / shard))
            for name in files[-1].tensors:
                location[canonical_name(config, name)] = (files[-1], name)
        for name, shard in weight_map.items():
            if canonical_name(config, name) not in location:
                raise UserError(f"{directory / shard}: tensor {name!r}, which {INDEX} places there, is not in it")
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, location


def describe(location: Location, name: str) -> tuple[str, tuple[int, ...]]:
    """Dtype name and shape of a tensor on disk."""
    file, disk_name = location[name]
    return file.tensors[disk_name][:2]


def check_names(config: ModelConfig, directory: Path, layout: list[Entry], location: Location) -> None:
    """Raise UserError for tensors that are missing or that the model does not have."""
    expected = {entry.name for entry in layout}
    if missing := [entry.name for entry in layout if entry.name not in location]:
        raise UserError(f"{directory}: {len(missing)} tensors are missing: {listing(missing)}")
    if extra := [name for name in location if name not in expected and not is_tolerated(config, name)]:
        raise UserError(
            f"{directory}: {len(extra)} tensors that a {config.family} of this config has not: {listing(extra)}"
        )


def listing(names: list[str]) -> str:
    """The first names of a list, for an error message."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def allocate(model: Transformer, dtype: torch.dtype, device: torch.device) -> None:
    """Give the tensors of a meta model memory in `dtype` (buffers keep theirs), not initialized."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    if model.rope is not None:
        model.rope.to(device)


def read_entry(entry: Entry, location: Location, targets: dict[str, Tensor]) -> None:
    """Read one tensor of the layout into the model's tensors."""
    file, disk_name = location[entry.name]
    check_tensor(file, disk_name, entry, targets)
    dtype = file.tensors[disk_name][0]
    parts = parts_of(entry, targets)
    target = parts[0]
    plain = len(parts) == 1 and not entry.transposed and target.device.type == "cpu" and target.is_contiguous()
    if plain and target.dtype == DTYPES[dtype]:
        file.read(disk_name, out=target)
        return
    whole = file.read(disk_name)
    if entry.transposed:
        whole = whole.T
    for part, piece in zip(parts, whole.split([part.size(0) for part in parts]), strict=True):
        part.copy_(piece)


def check_tensor(file: SafetensorsFile, disk_name: str, entry: Entry, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless the file's tensor has the shape of our `tensors` in the entry, and floats."""
    dtype, shape, _, _ = file.tensors[disk_name]
    expected = disk_shape(entry, parts_of(entry, tensors))
    if shape != expected:
        raise UserError(f"{file.path}: tensor {disk_name!r} has shape {list(shape)}, expected {list(expected)}")
    if dtype not in FLOATS:
        raise UserError(f"{file.path}: tensor {disk_name!r} has dtype {dtype}, expected one of {', '.join(FLOATS)}")


def disk_shape(entry: Entry, parts: list[Tensor]) -> tuple[int, ...]:
    """Shape of the entry's tensor on disk."""
    joined = (sum(part.size(0) for part in parts), *parts[0].shape[1:])
    return tuple(reversed(joined)) if entry.transposed else joined


def save_model(
    model: Transformer, directory: Path, tokenizer_dir: Path | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write a model folder that transformers and vLLM load: config, generation config, weights, tokenizer files.

    Weights go to `model.safetensors`, or to shards of at most `max_shard_bytes` (a larger tensor has its own) with an
    index; one tensor at a time is copied. The same weights give the same bytes. Token ids that the config does not
    name are taken from the tokenizer. Layers of 8 and 4 bits are stored as they are, in compressed-tensors' format.
    """
    config, tensors, fetch, quantization = stored(model)
    save_tensors(config, tensors, fetch, directory, tokenizer_dir, max_shard_bytes, quantization)


def save_tensors(
    config: ModelConfig, shapes: Mapping[str, Tensor], fetch: Callable[[str], Tensor], directory: Path,
    tokenizer_dir: Path | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantization: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """`save_model` for tensors that `fetch(name)` brings one by one, in the order of `disk_layout`.

    `shapes` has all names of `Transformer.state_dict()` with the shape and dtype of each (meta tensors will do).
    quantization: the folder's quantization_config, if weights are rounded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file() and tokenizer_dir.resolve() != directory.resolve():
                shutil.copyfile(tokenizer_dir / name, directory / name)
        config = with_token_ids(config, tokenizer_dir)
    raw = config_to_hf(config, str(shapes["embed_tokens.weight"].dtype).removeprefix("torch."))
    if quantization is not None:
        raw["quantization_config"] = quantization
    weight_files = save_weights(config, shapes, fetch, directory, max_shard_bytes)
    for path in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if path.name not in weight_files:
            path.unlink(missing_ok=True)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    write_json(directory / "generation_config.json", {"_from_model_config": True, **generation})
    write_json(directory / "config.json", raw)


def with_token_ids(config: ModelConfig, tokenizer_dir: Path) -> ModelConfig:
    """The config with begin, end and padding ids of the tokenizer where it names none."""
    from soma.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_dir)
    ends = tokenizer.eos_ids
    known = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id,
             "eos_token_id": ends[0] if len(ends) == 1 else (ends or None)}  # fmt: skip
    return config.model_copy(update={key: value for key, value in known.items() if getattr(config, key) is None})


def save_weights(
    config: ModelConfig, tensors: Mapping[str, Tensor], fetch: Callable[[str], Tensor], directory: Path,
    max_shard_bytes: int,
) -> set[str]:  # fmt: skip
    """Write the weights; the names of the files written."""
    layout = disk_layout(config, tensors)
    shards: list[list[Entry]] = [[]]
    used = total = 0
    sizes = {entry.name: entry_bytes(entry, tensors) for entry in layout}
    for entry in layout:
        if shards[-1] and used + sizes[entry.name] > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += sizes[entry.name]
        total += sizes[entry.name]
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        specs = []
        for entry in shard:
            parts = parts_of(entry, tensors)
            specs.append((entry.name, parts[0].dtype, disk_shape(entry, parts)))
        write_safetensors(directory / name, specs, disk_tensors(shard, fetch))
    if len(shards) == 1:
        return {WEIGHTS}
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {INDEX, *names}


def parts_of(entry: Entry, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Our tensors that make up an entry."""
    return [tensors[name] if expert is None else tensors[name][expert] for name, expert in entry.parts]


def entry_bytes(entry: Entry, tensors: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts_of(entry, tensors))


def disk_tensors(entries: list[Entry], fetch: Callable[[str], Tensor]) -> Iterator[Tensor]:
    """Each entry's tensor as the file holds it, on the CPU."""
    for entry in entries:
        wholes = [(fetch(name), expert) for name, expert in entry.parts]
        parts = [(whole if expert is None else whole[expert]).detach().cpu() for whole, expert in wholes]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield whole.T if entry.transposed else whole
