"""A Llama-shaped model over the paged cache in Triton kernels, decode steps as CUDA graphs.

Shape letters: T new tokens, R rows whose logits are wanted, D model width, H query heads, K key/value heads, E head
width, F width inside the MLP, V vocabulary.
"""

from torch import Tensor, nn

from soma.engine.backends.graphs import DecodeGraphs
from soma.engine.batch import Batch
from soma.engine.paged import FP8, PagedCache
from soma.model.adapted import AdaptedLinear, adapters
from soma.model.attention import Attention
from soma.model.kernels.fused import add_rms_norm, rms_norm, rope_write, swiglu
from soma.model.kernels.gemv import gemv
from soma.model.kernels.launch import INTERPRETED, unsupported
from soma.model.kernels.paged import paged_attention
from soma.model.layers import MLP
from soma.model.transformer import Transformer


class TritonModel:
    """One model and its paged cache on a GPU: per layer four matrix products and five kernels of our own.

    The residual sum is part of the norm that follows it, RoPE of the write into the cache. With `graphs` (most
    sequences, most tokens of each) a step in which every sequence has one new token replays a CUDA graph. A step of
    one token runs in matrix-vector kernels (`kernels.gemv`) if no layer is quantized or adapted in it.
    """

    @staticmethod
    def supports(model: Transformer) -> str | None:
        """Why these kernels cannot run this model; None if they can."""
        config = model.config
        if model.device.type != "cuda" and not INTERPRETED:
            return f"the model is on {model.device.type}"
        if config.is_mla or config.num_experts:
            return "latent attention or experts"
        if config.norm != "rmsnorm" or config.activation != "swiglu" or config.position_embedding != "rope":
            return "layers differ from a Llama's"
        return unsupported(config.head_dim, model.dtype)

    def __init__(self, model: Transformer, cache: PagedCache, graphs: tuple[int, int] | None = None) -> None:
        assert self.supports(model) is None, self.supports(model)
        assert cache.dtype in (model.dtype, FP8)
        self.model, self.cache, self.eps = model, cache, model.config.norm_eps
        self.layers: list[tuple[Attention, MLP, Tensor, Tensor]] = []
        norms = [layer.get_parameter("input_layernorm.weight") for layer in model.layers]
        norms.append(model.norm.get_parameter("weight"))
        self.first_norm = norms[0]
        for layer, next_norm in zip(model.layers, norms[1:], strict=True):
            attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
            assert isinstance(attention, Attention)
            assert isinstance(mlp, MLP)
            post_norm = layer.get_parameter("post_attention_layernorm.weight")
            self.layers.append((attention, mlp, post_norm, next_norm))
        head = model.embed_tokens if model.lm_head is None else base_of(model.lm_head)
        self.head_VD = head.get_parameter("weight") if isinstance(head, nn.Embedding | nn.Linear) else None
        self.gemv = self.head_VD is not None and all(
            attention.fused is not None and mlp.fused is not None
            and all(isinstance(base_of(layer), nn.Linear) for layer in (attention.o_proj, mlp.down_proj))
            for attention, mlp, _, _ in self.layers
        )  # fmt: skip
        self.graphs = None
        if graphs is not None:
            self.graphs = DecodeGraphs(self.features, cache, model.embed_tokens.weight, *graphs)
            self.step(self.graphs.inputs.rows(1))  # compiles what lies outside the graph

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        if self.graphs is not None and self.graphs.fits(batch):
            h_RD = self.graphs.features(batch)
        else:
            with adapters(batch.adapters):
                h_RD = self.features(batch)[batch.logit_rows_R]
        if len(h_RD) == 1 and self.gemv and not batch.row_adapters:
            assert self.head_VD is not None
            return gemv(h_RD, self.head_VD)
        with adapters(batch.row_adapters):
            return self.model.logits(h_RD)

    def features(self, batch: Batch) -> Tensor:
        """Hidden states (T, D) after the final norm. Reads nothing on the host, so it can be captured."""
        x_TD = self.model.embed_tokens(batch.tokens_T)
        assert self.model.rope is not None
        rope = self.model.rope(batch.positions_T, x_TD.dtype)
        if len(x_TD) == 1 and self.gemv and not batch.adapters:
            return self.features_of_one(x_TD, rope, batch)
        h_TD = rms_norm(x_TD, self.first_norm, self.eps)
        for index, (attention, mlp, post_norm, next_norm) in enumerate(self.layers):
            q, k, v = attention.project(h_TD, projections_of(attention))
            h_TD = attention.o_proj(self.attend(index, attention, q, k, v, rope, batch))
            h_TD, x_TD = add_rms_norm(h_TD, x_TD, post_norm, self.eps)
            gate_TF, up_TF = mlp.project(h_TD, [mlp.gate_proj, mlp.up_proj])
            h_TD, x_TD = add_rms_norm(mlp.down_proj(swiglu(gate_TF, up_TF)), x_TD, next_norm, self.eps)
        return h_TD

    def features_of_one(self, x_1D: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """As `features`, for one token: activations and sums are parts of the matrix-vector products."""
        h_1D = rms_norm(x_1D, self.first_norm, self.eps)
        for index, (attention, mlp, post_norm, next_norm) in enumerate(self.layers):
            assert attention.fused is not None
            assert mlp.fused is not None
            qkv = gemv(h_1D, attention.fused, attention.fused_bias)
            q, k, v = qkv.split(attention.fused_sizes, dim=-1)
            out = self.attend(index, attention, q, k, v, rope, batch)
            x_1D = gemv(out, attention.o_proj.weight, attention.o_proj.bias, residual_1N=x_1D)
            h_1D = rms_norm(x_1D, post_norm, self.eps)
            inner = gemv(h_1D, mlp.fused, mlp.fused_bias, gated=True)
            x_1D = gemv(inner, mlp.down_proj.weight, mlp.down_proj.bias, residual_1N=x_1D)
            h_1D = rms_norm(x_1D, next_norm, self.eps)
        return h_1D

    def attend(
        self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor],
        batch: Batch,
    ) -> Tensor:  # fmt: skip
        """Attention of the new tokens (T, H·E) from their projections, whose keys and values go into the cache."""
        q_THE, k_TKE, v_TKE = (x.unflatten(1, (-1, attention.head_dim)) for x in (q, k, v))
        if attention.qk_norm:
            q_THE, k_TKE = attention.q_norm(q_THE).type_as(q), attention.k_norm(k_TKE).type_as(k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q_THE = rope_write(q_THE, k_TKE, v_TKE, *rope, keys, values, batch.slots_T)
        out_THE = paged_attention(
            q_THE, keys, values, batch.query_starts_S1, batch.lengths_S, batch.tables_SB, attention.window
        )
        return out_THE.flatten(1)


def base_of(layer: nn.Module) -> nn.Module:
    """The layer without its adapters."""
    return layer.base if isinstance(layer, AdaptedLinear) else layer


def projections_of(attention: Attention) -> list[nn.Linear]:
    """The layers that read what attention reads."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]
