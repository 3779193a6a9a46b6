"""The one Transformer: the same module trains, prefills and decodes.

Shape letters: B batch, T new tokens, D model width, V vocabulary. Parameter names are those of a Hugging Face Llama
without the leading `model.`; `families.py` and `layout.py` know every family's names on disk.
"""

import hashlib
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.attention import Across, Attention, LatentAttention, flash_supports, make_mask
from soma.model.cache import FlatCache, KVCache
from soma.model.config import ModelConfig
from soma.model.layers import MLP, compute_dtype, make_norm
from soma.model.moe import MoE
from soma.model.rope import Rope

if TYPE_CHECKING:
    from soma.model.kernels.packed import Packed

Masks = dict[int | None, "Tensor | Packed | Across | None"]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.window = config.window(layer)
        self.is_moe = config.is_moe_layer(layer)
        self.input_layernorm = make_norm(config)
        self.self_attn = LatentAttention(config, layer) if config.is_mla else Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MoE(config) if self.is_moe else MLP(config, config.intermediate_size)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, masks: Masks, keep_BT: Tensor | None,
        cache: KVCache | FlatCache | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The residual stream after this layer, and the router's loss of an MoE layer in training."""
        x_BTD = self.attend(x_BTD, rope, masks, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if self.is_moe:
            out_BTD, aux_loss = self.mlp(h_BTD, keep_BT)
            return x_BTD + out_BTD, aux_loss
        return x_BTD + self.mlp(h_BTD), None

    def attend(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, masks: Masks, cache: KVCache | FlatCache | None
    ) -> Tensor:
        """The residual stream after attention."""
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, masks[self.window], cache)


class Transformer(nn.Module):
    """Decoder-only language model after `config`.

    Built on `device` in `dtype` with weights of `init_weights(0)`; on the meta device nothing is allocated.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            if config.position_embedding == "learned":
                self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
            self.norm = make_norm(config)
            self.lm_head = (
                None if config.tie_word_embeddings
                else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )  # fmt: skip
            self.rope = Rope(config) if config.position_embedding == "rope" else None
        self.windows = {config.window(index) for index in range(config.num_hidden_layers)}
        if dtype is not None:
            self.to(dtype)
        device = torch.device(device if device is not None else torch.get_default_device())
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embed_tokens.weight.dtype

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set all weights: normal with std `initializer_range`, projections into the residual stream divided by
        sqrt(2·layers) (GPT-2), norms 1, biases 0.

        Each tensor's numbers are drawn on the CPU from a generator seeded by (seed, name): they depend neither on the
        device nor on the dtype's rounding order, nor on which other tensors a process holds.
        """
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not name.startswith("rope."):
                tensor.copy_(first_weight(self.config, name, tensor.shape, seed))

    def fuse(self) -> "Transformer":
        """Join linear layers that read the same input, for inference: see `layers.Fused`. No gradients after it."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                module.fuse()
        return self

    def features(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_ids_BT: Tensor | None = None,
        cache: KVCache | FlatCache | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Hidden states after the final norm, (B, T, D), and the auxiliary loss.

        tokens_BT, positions_BT, document_ids_BT: integers. Positions default to 0…T-1 (after the cached tokens).
        Tokens attend causally within their document (-1 is padding); without document_ids all are one document. With
        a cache the T tokens are appended to it and attend to everything before them. With a `FlatCache` B is 1 and
        positions must be given.
        The auxiliary loss is a float32 0-d tensor: the mean over MoE layers of the load-balancing loss, already times
        `router_aux_loss_coef`, in training mode; 0 for dense models and in eval mode. Add it to the loss as it is.
        Raises UserError where tokens exceed the cache or a learned position table.
        """
        B, T = tokens_BT.shape
        offset = 0
        assert cache is None or document_ids_BT is None, "packed documents and a cache exclude each other"
        if isinstance(cache, KVCache):
            cache.check(B, T)
            offset = cache.length
        x_BTD = self.embed(tokens_BT, positions_BT, offset)
        rope, masks, keep_BT = self.context(x_BTD, tokens_BT, positions_BT, document_ids_BT, cache, offset)
        losses = []
        for layer in self.layers:
            x_BTD, aux_loss = layer(x_BTD, rope, masks, keep_BT, cache)
            if aux_loss is not None:
                losses.append(aux_loss)
        if isinstance(cache, KVCache):
            cache.length = offset + T
        aux = torch.stack(losses).mean() if losses else torch.zeros((), device=x_BTD.device)
        return self.norm(x_BTD), aux

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, offset: int = 0) -> Tensor:
        """What enters the first layer, (B, T, D); positions default to `offset` and up."""
        x_BTD = self.embed_tokens(tokens_BT)
        if self.rope is not None:
            return x_BTD
        if positions_BT is None:
            T = tokens_BT.size(1)
            self.check_length(offset + T)
            positions_BT = torch.arange(offset, offset + T, device=x_BTD.device)
        return x_BTD + self.embed_positions(positions_BT)

    def context(
        self, x_BTD: Tensor, tokens_BT: Tensor, positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None, cache: KVCache | FlatCache | None = None, offset: int = 0,
    ) -> tuple[tuple[Tensor, Tensor] | None, Masks, Tensor | None]:  # fmt: skip
        """What every layer reads besides x: rotary cosines and sines, masks by window, and which tokens are real."""
        T = tokens_BT.size(1)
        rope = None
        if self.rope is not None:
            positions = torch.arange(offset, offset + T, device=x_BTD.device) if positions_BT is None else positions_BT
            cos, sin = self.rope(positions, compute_dtype(x_BTD))
            rope = (cos, sin) if positions_BT is None else (cos[:, None], sin[:, None])  # heads broadcast
        masks: Masks = dict.fromkeys(self.windows)
        # Plain causal attention stays with SDPA, which is 1.2 to 1.3 times as fast as our kernel on an H100.
        packed = cache is None and document_ids_BT is not None
        if packed and flash_supports(self.config, x_BTD.device, compute_dtype(x_BTD)):
            from soma.model.kernels.packed import pack

            masks = dict.fromkeys(self.windows, pack(tokens_BT, document_ids_BT))
        elif cache is None or isinstance(cache, KVCache):  # a flat cache masks by itself
            masks = {window: make_mask(T, offset, window, document_ids_BT, x_BTD.device) for window in self.windows}
        return rope, masks, None if document_ids_BT is None else document_ids_BT >= 0

    def check_length(self, length: int) -> None:
        """Raise UserError if a model with learned positions has fewer than `length` of them."""
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"{length} tokens are more than this model's {self.config.max_position_embeddings} learned positions "
                "(max_position_embeddings): shorten the text"
            )

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the vocabulary, (…, V), for hidden states (…, D)."""
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_ids_BT: Tensor | None = None,
        cache: KVCache | FlatCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, T, V); arguments as for `features`."""
        return self.logits(self.features(tokens_BT, positions_BT, document_ids_BT, cache)[0])


def first_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """A parameter or buffer as `Transformer.init_weights` sets it, float32 on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    if "norm" in name.split(".")[-2]:
        return torch.ones(shape, device="cpu")
    is_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
    std = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if is_residual else 1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, device="cpu") * std
