"""Bidirectional encoders of the BERT family (arXiv:1810.04805), MiniLM and XLM-RoBERTa (arXiv:1911.02116) among them:
texts in, vectors out; with a head, classes out (`soma.model.classifier`).

Shape letters: B batch, T tokens, D model width, H heads, E head width. Module names are Hugging Face's `BertModel`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.model.safetensors_io import DTYPES, SafetensorsFile

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
# Heads and old buffers.
UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")


class EncoderConfig(BaseModel):
    """Shape of an encoder, field names as in its config.json."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_type: Literal["bert", "roberta", "xlm-roberta"] = Field("bert", description="family")
    vocab_size: int = Field(30522, gt=0, description="rows of the token embedding")
    hidden_size: int = Field(768, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(3072, gt=0, description="inner width of the MLP")
    num_hidden_layers: int = Field(12, gt=0, description="layers")
    num_attention_heads: int = Field(12, gt=0, description="heads")
    max_position_embeddings: int = Field(512, gt=0, description="rows of the position embedding")
    pad_token_id: int | None = Field(None, ge=0, description="id of padding, behind which RoBERTa's positions begin")
    type_vocab_size: int = Field(2, gt=0, description="segments; a single text is segment 0")
    layer_norm_eps: float = Field(1e-12, gt=0, description="epsilon of the normalization")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = Field("gelu", description="activation")
    position_embedding_type: Literal["absolute"] = Field("absolute", description="learned absolute positions")
    is_decoder: Literal[False] = Field(False, description="a BERT used as a decoder is another model")

    @property
    def first_position(self) -> int:
        """Row of a text's first token in the position embedding: RoBERTa counts from its padding's id on."""
        return 0 if self.model_type == "bert" else 1 + (1 if self.pad_token_id is None else self.pad_token_id)

    @property
    def max_length(self) -> int:
        """The longest text in tokens."""
        return self.max_position_embeddings - self.first_position


class SelfAttention(nn.Module):
    """Every token sees every token of its text."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """norm(x + dense(y)): the norm comes after the sum."""

    def __init__(self, config: EncoderConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, y: Tensor, x_BTD: Tensor) -> Tensor:
        return self.LayerNorm(x_BTD + self.dense(y))


class EncoderLayer(nn.Module):
    """Attention, then the MLP, each followed by `Output`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(config, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = Output(config, config.intermediate_size)
        self.activation = config.hidden_act

    def forward(self, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        x_BTD = self.attention["output"](self.attention["self"](x_BTD, mask), x_BTD)
        h = self.intermediate["dense"](x_BTD)
        if self.activation == "relu":
            h = F.relu(h)
        else:
            h = F.gelu(h, approximate="none" if self.activation == "gelu" else "tanh")
        return self.output(h, x_BTD)


class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalized."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

        self.first = config.first_position

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        positions_TD = self.position_embeddings.weight[self.first : self.first + tokens_BT.size(1)]
        kinds = self.token_type_embeddings.weight[0] if segments_BT is None else self.token_type_embeddings(segments_BT)
        return self.LayerNorm(self.word_embeddings(tokens_BT) + positions_TD + kinds)


class Encoder(nn.Module):
    """BERT without its heads."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embeddings.word_embeddings.weight.dtype

    def forward(
        self, tokens_BT: Tensor, keep_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Hidden states (B, T, D) of texts. keep_BT (bool) is False on padding; None: none. segments_BT (int64): to
        which of two texts a token belongs; None: all to the first."""
        mask = None if keep_BT is None else keep_BT[:, None, None, :]
        x_BTD = self.embeddings(tokens_BT, segments_BT)
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x_BTD = layer(x_BTD, mask)
        return x_BTD


def is_encoder(directory: Path) -> bool:
    """Whether a model folder holds an encoder of a family that this file has. False where there is no config.json."""
    path = directory / "config.json"
    raw = read_json(path) if path.is_file() else None
    return isinstance(raw, dict) and raw.get("model_type") in MODEL_TYPES


def encoder_config(directory: Path) -> EncoderConfig:
    """The config of an encoder's folder. UserError naming the key that is wrong or not supported."""
    path = directory / "config.json"
    raw: Any = read_json(path)
    try:
        config = EncoderConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: key {key!r}: {first['msg']}, got {first['input']!r}") from None
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return config


def load_encoder(directory: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Encoder:
    """The encoder in a Hugging Face folder, in eval mode. dtype None: that of the weights on disk.

    Raises UserError for a folder without config or weights, and for tensors that are missing, mis-shaped or unknown.
    """
    with torch.device("meta"):
        model = Encoder(encoder_config(directory))
    fill(model, directory, lambda name: name.removeprefix("bert.").removeprefix("roberta."), dtype, device)
    return model.eval()


def fill(
    model: nn.Module, directory: Path, own_name: Callable[[str], str], dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Load a folder's tensors into a model on the meta device. own_name: a tensor's name in the model, from that on
    disk. Raises UserError as `load_encoder`."""
    path = directory / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{directory}: no weights there (model.safetensors)")
    file = SafetensorsFile(path)
    try:
        names = {own_name(name): name for name in file.tensors}
        targets = model.state_dict()
        if missing := [name for name in targets if name not in names]:
            raise UserError(f"{path}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        if extra := [name for name in names if name not in targets and not is_unused(name)]:
            raise UserError(f"{path}: {len(extra)} tensors that this encoder has not: {', '.join(extra[:5])}")
        values = {}
        for name, target in targets.items():
            kind, shape = file.tensors[names[name]][:2]
            if shape != tuple(target.shape):
                raise UserError(f"{path}: tensor {name!r} has shape {list(shape)}, expected {list(target.shape)}")
            values[name] = file.read(names[name]).to(device=device, dtype=dtype or DTYPES[kind])
        model.load_state_dict(values, assign=True)
    finally:
        file.close()


def is_unused(name: str) -> bool:
    return name.removeprefix("encoder.").startswith(UNUSED)
