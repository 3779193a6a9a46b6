"""One rank's part of a model: tensor parallel (Megatron-LM, arXiv:1909.08053) times pipeline stages.

A shard is a `Transformer` of a smaller config: its share of the heads, of the MLP's inner width and of the layers. What
`self_attn` and `mlp` put out are partial sums, which whoever runs the shard adds up over the tensor ranks; the
embedding and lm_head hold a range of the vocabulary. Experts are split within (each rank has a part of every expert's
inner width), so that ranks are equally busy whatever the router says.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.folder import local_folder
from soma.model.hub import allocate, check_names, check_tensor, describe, load_config, open_weights
from soma.model.layout import Entry, disk_layout
from soma.model.safetensors_io import DTYPES
from soma.model.transformer import Transformer


@dataclass(frozen=True)
class Shard:
    """Place `tensor` of `tensors` ranks that split each layer, in `stage` of `stages` of layers."""

    tensor: int = 0
    tensors: int = 1
    stage: int = 0
    stages: int = 1

    @classmethod
    def of_rank(cls, rank: int, tensors: int, stages: int) -> "Shard":
        """Ranks of one stage follow each other."""
        return cls(rank % tensors, tensors, rank // tensors, stages)

    @property
    def rank(self) -> int:
        return self.stage * self.tensors + self.tensor

    @property
    def world_size(self) -> int:
        return self.tensors * self.stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def layers(self, config: ModelConfig) -> range:
        """Its layers. What does not divide goes to the first stages: the last has the output layer already."""
        each, more = divmod(config.num_hidden_layers, self.stages)
        first = self.stage * each + min(self.stage, more)
        return range(first, first + each + (self.stage < more))

    def vocabulary(self, config: ModelConfig) -> range:
        """Its token ids: equal parts, the last ones shorter."""
        each = -(-config.vocab_size // self.tensors)
        start = min(self.tensor * each, config.vocab_size)
        return range(start, min(start + each, config.vocab_size))


def check_split(config: ModelConfig, tensors: int, stages: int) -> None:
    """Raises UserError with the numbers if a model cannot be split so."""
    if tensors < 1 or stages < 1:
        raise UserError(f"tensor_parallel {tensors}, pipeline_parallel {stages}: both are 1 or more")
    if stages > config.num_hidden_layers:
        raise UserError(
            f"pipeline_parallel {stages}: the model has only {config.num_hidden_layers} layers, one a stage is needed"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {"num_attention_heads": heads}
    if not config.num_experts or len(moe_layers(config)) < config.num_hidden_layers:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_experts:
        sizes["moe_intermediate_size"] = config.moe_intermediate_size
    for name, size in sizes.items():
        if size % tensors:
            fitting = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if all(s % n == 0 for s in sizes.values()))
            raise UserError(
                f"tensor_parallel {tensors}: {name} {size} / {tensors} = {size / tensors:.2f} for each rank, which is "
                f"no whole number; this model can be split over {fitting}"
            )
    if not config.is_mla and kv_heads % tensors and tensors % kv_heads:
        raise UserError(
            f"tensor_parallel {tensors}: num_key_value_heads {kv_heads} neither divides by it ({kv_heads} / {tensors} "
            f"= {kv_heads / tensors:.2f}) nor divides it ({tensors} / {kv_heads} = {tensors / kv_heads:.2f})"
        )


def moe_layers(config: ModelConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The config of a shard. Key/value heads fewer than ranks are held by several of them."""
    layers, tensors = shard.layers(config), shard.tensors
    changes = {
        "vocab_size": len(shard.vocabulary(config)),
        "num_hidden_layers": len(layers),
        "num_attention_heads": config.num_attention_heads // tensors,
        "num_key_value_heads": max(1, config.num_key_value_heads // tensors),
        "intermediate_size": config.intermediate_size // tensors,
        "moe_intermediate_size": config.moe_intermediate_size // tensors,
        "layer_types": None if config.layer_types is None else tuple(config.layer_types[layer] for layer in layers),
        "first_k_dense_replace": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": tuple(n for n, layer in enumerate(layers) if not config.is_moe_layer(layer)),
        # Only the last stage has an lm_head, a copy of the embedding where that is tied and elsewhere.
        "tie_word_embeddings": not shard.is_last or (config.tie_word_embeddings and shard.is_first),
    }
    return config.model_copy(update=changes)


def build_shard(config: ModelConfig, shard: Shard) -> Transformer:
    """A shard on the meta device. Stages after the first have an empty embedding."""
    check_split(config, shard.tensors, shard.stages)
    model = Transformer(shard_config(config, shard), device="meta")
    if not shard.is_first:
        model.embed_tokens = nn.Embedding(0, config.hidden_size, device="meta")
        if config.position_embedding == "learned":
            model.embed_positions = nn.Embedding(0, config.hidden_size, device="meta")
    return model


def load_shard(
    ref: str | Path, shard: Shard, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A shard of the model in a Hugging Face folder, in eval mode; of the files only its parts are read.

    Arguments and errors as for `load_model`; also UserError if the model cannot be split so.
    """
    directory = local_folder(ref)
    config = load_config(directory)
    model = build_shard(config, shard)
    whole = Transformer(config, device="meta").state_dict()
    files, location = open_weights(directory, config)
    try:
        layout = disk_layout(config, whole)
        check_names(config, directory, layout, location)
        if dtype is None:
            dtype = DTYPES[describe(location, layout[0].name)[0]]
        allocate(model, dtype, torch.device(device))
        targets = {whole_name(name, config, shard): tensor for name, tensor in model.state_dict().items()}
        for entry in layout:
            file, disk_name = location[entry.name]
            check_tensor(file, disk_name, entry, whole)
            if any(name in targets for name, _ in entry.parts):
                copy_parts(entry, file.mapped(disk_name), whole, targets, config, shard)
    finally:
        for file in files:
            file.close()
    return model.eval()


def whole_name(name: str, config: ModelConfig, shard: Shard) -> str:
    """What the whole model calls a tensor of a shard."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "embed_tokens.weight"
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{shard.layers(config)[int(layer)]}.{rest}"


def copy_parts(
    entry: Entry, on_disk: Tensor, whole: dict[str, Tensor], targets: dict[str, Tensor], config: ModelConfig,
    shard: Shard,
) -> None:  # fmt: skip
    """Copy a shard's parts of one tensor on disk into their places."""
    joined = on_disk.T if entry.transposed else on_disk
    rows = [(whole[name] if expert is None else whole[name][expert]).size(0) for name, expert in entry.parts]
    for (name, expert), part in zip(entry.parts, joined.split(rows), strict=True):
        target = targets.get(name)
        if target is None or target.numel() == 0:
            continue
        if expert is not None:
            target = target[expert]
        if is_added_once(name) and shard.tensor > 0:
            target.zero_()
            continue
        dim, start = cut(name, target, config, shard)
        target.copy_(part.narrow(dim, start, target.size(dim)))


def is_added_once(name: str) -> bool:
    """Whether a tensor is a bias on a sum over the ranks: one of them adds it."""
    return name.endswith(("o_proj.bias", "down_proj.bias"))


def cut(name: str, target: Tensor, config: ModelConfig, shard: Shard) -> tuple[int, int]:
    """Dimension along which a tensor is split, and where a shard's part (as long as `target`) begins."""
    module = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    if module in ("embed_tokens", "lm_head"):
        return 0, shard.vocabulary(config).start
    if module in ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"):
        return 0, shard.tensor * target.size(0)
    if module in ("k_proj", "v_proj"):
        return 0, shard.tensor * config.num_key_value_heads // shard.tensors * config.head_dim
    if module in ("o_proj", "down_proj") and not is_added_once(name):
        return 1, shard.tensor * target.size(1)
    return 0, 0
