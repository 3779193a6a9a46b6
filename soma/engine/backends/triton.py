"""A Llama-shaped model over the paged cache in Triton kernels, decode steps as CUDA graphs.

Shape letters: T new tokens, R rows whose logits are wanted, D model width, H query heads, K key/value heads, E head
width, F width inside the MLP, V vocabulary.
"""

from torch import Tensor, nn

from soma.engine.backends.graphs import DecodeGraphs
from soma.engine.batch import Batch
from soma.engine.paged import PagedCache
from soma.model.adapted import adapters
from soma.model.attention import Attention
from soma.model.kernels.fused import add_rms_norm, rms_norm, rope_write, swiglu
from soma.model.kernels.launch import INTERPRETED, unsupported
from soma.model.kernels.paged import paged_attention
from soma.model.layers import MLP
from soma.model.transformer import Transformer


class TritonModel:
    """One model and its paged cache on a GPU: per layer four matrix products and five kernels of our own.

    The residual sum is part of the norm that follows it, RoPE of the write into the cache. With `graphs` (most
    sequences, most tokens of each) a step in which every sequence has one new token replays a CUDA graph.
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
        assert all(keys.dtype == model.dtype for keys in cache.keys)
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
        self.graphs = None
        if graphs is not None:
            self.graphs = DecodeGraphs(self.features, cache, model.config.hidden_size, *graphs)

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        if self.graphs is not None and self.graphs.fits(batch):
            return self.model.logits(self.graphs.features(batch))
        with adapters(batch.adapters):
            h_TD = self.features(batch)
        with adapters(batch.row_adapters):
            return self.model.logits(h_TD[batch.logit_rows_R])

    def features(self, batch: Batch) -> Tensor:
        """Hidden states (T, D) after the final norm. Reads nothing on the host, so it can be captured."""
        x_TD = self.model.embed_tokens(batch.tokens_T)
        assert self.model.rope is not None
        rope = self.model.rope(batch.positions_T, x_TD.dtype)
        h_TD = rms_norm(x_TD, self.first_norm, self.eps)
        for index, (attention, mlp, post_norm, next_norm) in enumerate(self.layers):
            h_TD = self.attend(index, attention, h_TD, rope, batch)
            h_TD, x_TD = add_rms_norm(h_TD, x_TD, post_norm, self.eps)
            gate_TF, up_TF = mlp.project(h_TD, [mlp.gate_proj, mlp.up_proj])
            h_TD, x_TD = add_rms_norm(mlp.down_proj(swiglu(gate_TF, up_TF)), x_TD, next_norm, self.eps)
        return h_TD

    def attend(
        self, layer: int, attention: Attention, h_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch
    ) -> Tensor:
        """What a layer's attention adds to the residual stream, (T, D)."""
        projections: list[nn.Linear] = [attention.q_proj, attention.k_proj, attention.v_proj]
        q, k, v = (x.unflatten(1, (-1, attention.head_dim)) for x in attention.project(h_TD, projections))
        if attention.qk_norm:
            q, k = attention.q_norm(q).type_as(q), attention.k_norm(k).type_as(k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q_THE = rope_write(q, k, v, *rope, keys, values, batch.slots_T)
        out_THE = paged_attention(
            q_THE, keys, values, batch.query_starts_S1, batch.lengths_S, batch.tables_SB, attention.window
        )
        return attention.o_proj(out_THE.flatten(1))
