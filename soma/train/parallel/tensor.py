"""Tensor parallelism in Megatron's way (arXiv:1909.08053), with sequence parallelism for the norms (arXiv:2205.05198).

The first matrices of a block are cut by columns (outputs: whole heads, or inner units), its last one by rows, so a
block needs one sum after it and, backwards, one before it. In between each rank computes a part of that sum from
weights of its own; what it uses undivided there (norms of heads, a router, the latents of MLA, repeated key heads) has
a gradient that is partial over the ranks. With `sp` the residual stream is cut along the sequence, and the two sums
become gather and reduce-scatter.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from soma.base.errors import UserError
from soma.model.attention import Attention, LatentAttention
from soma.model.layers import MLP
from soma.model.lora import LoRALinear, shared_inputs
from soma.model.moe import MoE
from soma.model.quantized import QuantizedLinear
from soma.model.transformer import Layer, Transformer
from soma.train.parallel.local import cut, enter, leave, scale_gradient, shard_offset

WHOLE: list[Placement] = [Replicate()]
COLUMNS: list[Placement] = [Shard(0)]  # of a (outputs, inputs) matrix: by outputs
ROWS: list[Placement] = [Shard(1)]  # by inputs


def apply_tensor(model: Transformer, mesh: DeviceMesh, sequence: bool, experts: DeviceMesh | None) -> None:
    """Cut a model, or a pipeline rank's part of one, over a one-dimensional mesh. `sequence`: sequence parallelism too.

    `experts`: the mesh of (ep ×) tp ranks that MoE layers' experts are cut over.
    """
    group = mesh.get_group()
    shared = shared_inputs(model)
    if model.embed_tokens is not None:
        cut_embedding(model.embed_tokens, mesh, sequence)
    if getattr(model, "embed_positions", None) is not None:
        keep_whole(model.embed_positions, mesh, partial=sequence)
        if sequence:
            model.embed_positions.register_forward_hook(own_positions(group))
    if model.lm_head is not None:
        cut_columns(model.lm_head, mesh)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        keep_whole(layer.input_layernorm, mesh, partial=sequence)
        keep_whole(layer.post_attention_layernorm, mesh, partial=sequence)
        if isinstance(layer.self_attn, LatentAttention):
            cut_latent_attention(layer.self_attn, mesh)
        else:
            cut_attention(layer.self_attn, mesh)
        wrap_block(layer.self_attn, group, sequence)
        if isinstance(layer.mlp, MoE):
            assert experts is not None
            cut_experts(layer.mlp, mesh, experts)
        else:
            cut_mlp(layer.mlp, mesh)
        wrap_block(layer.mlp, group, sequence)
    for first, *others in shared:
        for other in others:
            other._parameters["lora_A"] = first._parameters["lora_A"]
    if model.norm is None:
        return
    keep_whole(model.norm, mesh, partial=sequence)
    # The head that follows is a block too: each rank scores its part of the vocabulary.
    model.norm.register_forward_hook(lambda module, args, x_BTD: enter(x_BTD, group, sequence))


def wrap_block(block: nn.Module, group: dist.ProcessGroup, sequence: bool) -> None:
    """Communication before and after a block whose ranks each compute a part of its output."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter(args[0], group, sequence), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return leave(output, group, sequence)
        out_BTD, aux = output  # of an MoE: every rank has the whole auxiliary loss, and gradients are summed
        return leave(out_BTD, group, sequence), None if aux is None else scale_gradient(aux, 1 / group.size())

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def keep_whole(module: nn.Module, mesh: DeviceMesh, partial: bool) -> None:
    """Every rank has all of the module's own weights; `partial` as in `cut`."""
    if isinstance(module, LoRALinear):
        keep_whole(module.base, mesh, partial)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            cut(module, name, mesh, WHOLE, partial)


def cut_columns(linear: nn.Module, mesh: DeviceMesh) -> None:
    """A rank computes some of the outputs. Of a low-rank update it has those rows of B, and A whole: its gradient is a
    sum over the ranks' outputs."""
    base = cut_weight(linear, mesh, 0)
    if base.bias is not None:
        cut(base, "bias", mesh, COLUMNS)
    if isinstance(linear, LoRALinear):
        cut(linear, "lora_A", mesh, WHOLE, partial=True)
        cut(linear, "lora_B", mesh, COLUMNS)


def cut_rows(linear: nn.Module, mesh: DeviceMesh) -> None:
    """A rank computes a part of every output's sum, from some of the inputs; the first rank adds the bias. Of a
    low-rank update it has those columns of A, and B whole, into which each rank feeds its part of the sum."""
    base = cut_weight(linear, mesh, 1)
    if base.bias is not None:
        first = mesh.get_local_rank() == 0
        cut(base, "bias", mesh, WHOLE, partial=True, view=None if first else nothing)
    if isinstance(linear, LoRALinear):
        linear.first_input, _ = shard_offset(linear.in_features, mesh.size(), mesh.get_local_rank())
        cut(linear, "lora_A", mesh, ROWS)
        cut(linear, "lora_B", mesh, WHOLE, partial=True)


def cut_weight(linear: nn.Module, mesh: DeviceMesh, dimension: int) -> nn.Module:
    """Cut the matrix of a linear layer, of the frozen one below an update, rounded or not; the layer that has it."""
    base = linear.base if isinstance(linear, LoRALinear) else linear
    if isinstance(base, QuantizedLinear):  # its numbers are packed in blocks, so each rank packs its own
        length = (base.out_features, base.in_features)[dimension]
        base.keep(dimension, *shard_offset(length, mesh.size(), mesh.get_local_rank()))
    else:
        cut(base, "weight", mesh, [Shard(dimension)])
    return base


def nothing(piece: Tensor) -> Tensor:
    """Zeros that still give the piece a gradient, so that all ranks have one to sum."""
    return piece * 0


def cut_mlp(mlp: MLP, mesh: DeviceMesh) -> None:
    """Inner units are divided."""
    if mlp.activation == "swiglu":
        cut_columns(mlp.gate_proj, mesh)
    cut_columns(mlp.up_proj, mesh)
    cut_rows(mlp.down_proj, mesh)


def cut_attention(attention: Attention, mesh: DeviceMesh) -> None:
    """Heads are divided. Key heads that the ranks do not divide are whole on each of them, which uses those of its
    query heads: as often as a query head needs it, where these share their key heads unevenly."""
    ranks = mesh.size()
    by_rank = [used_keys(attention.num_heads, attention.num_kv_heads, ranks, rank) for rank in range(ranks)]
    cut_columns(attention.q_proj, mesh)
    cut_rows(attention.o_proj, mesh)
    keys, width = attention.num_kv_heads, attention.head_dim
    attention.num_heads //= ranks
    if keys % ranks == 0:
        cut_columns(attention.k_proj, mesh)
        cut_columns(attention.v_proj, mesh)
        attention.num_kv_heads //= ranks
    else:
        for linear in (attention.k_proj, attention.v_proj):
            use_heads(linear, mesh, by_rank, width)
        attention.num_kv_heads = len(by_rank[mesh.get_local_rank()])
    if attention.qk_norm:
        keep_whole(attention.q_norm, mesh, partial=True)
        keep_whole(attention.k_norm, mesh, partial=True)


def used_keys(heads: int, keys: int, ranks: int, rank: int) -> list[int]:
    """The key heads of a rank's query heads, each once where as many of these share each, else one for each of these.

    Worked example: 12 query heads share 3 key heads on 4 ranks: [0], [0, 1, 1], [1, 1, 2], [2].
    """
    count, shared = heads // ranks, heads // keys
    own = [head // shared for head in range(rank * count, (rank + 1) * count)]
    used = sorted(set(own))
    return used if len({own.count(key) for key in used}) == 1 else own


def is_run(heads: list[int]) -> bool:
    """Whether heads are neighbours, each once."""
    return heads == list(range(heads[0], heads[0] + len(heads)))


def use_heads(linear: nn.Module, mesh: DeviceMesh, by_rank: list[list[int]], width: int) -> None:
    """Every rank has the whole layer and computes the outputs of some heads of `width`, perhaps the same as others do.

    Raises UserError, on all ranks, where a layer is rounded and a rank wants a head twice: its rows are packed.
    """
    heads = by_rank[mesh.get_local_rank()]
    start, count = heads[0] * width, len(heads) * width

    def view(piece: Tensor) -> Tensor:
        if is_run(heads):
            return piece.narrow(0, start, count)
        return torch.cat([piece.narrow(0, head * width, width) for head in heads])

    base = linear.base if isinstance(linear, LoRALinear) else linear
    if isinstance(base, QuantizedLinear):
        if not all(map(is_run, by_rank)):
            raise UserError(
                f"layout: tp {mesh.size()} divides query heads so that they share {base.out_features // width} key "
                "heads unevenly, which rounded weights (lora.base_weights) cannot: take base_weights full or another tp"
            )
        base.keep(0, start, count)
    for name, parameter in base._parameters.items():
        if parameter is not None:
            cut(base, name, mesh, WHOLE, partial=True, view=view)
    if isinstance(linear, LoRALinear):
        cut(linear, "lora_A", mesh, WHOLE, partial=True)
        cut(linear, "lora_B", mesh, WHOLE, partial=True, view=view)


def cut_latent_attention(attention: LatentAttention, mesh: DeviceMesh) -> None:
    """Heads are divided; the latents, which all heads share, are computed by every rank."""
    if attention.has_query_latent:
        for module in (attention.q_a_proj, attention.q_a_layernorm):
            keep_whole(module, mesh, partial=True)
        cut_columns(attention.q_b_proj, mesh)
    else:
        cut_columns(attention.q_proj, mesh)
    for module in (attention.kv_a_proj_with_mqa, attention.kv_a_layernorm):
        keep_whole(module, mesh, partial=True)
    cut_columns(attention.kv_b_proj, mesh)
    cut_rows(attention.o_proj, mesh)
    attention.num_heads //= mesh.size()


def cut_experts(moe: MoE, mesh: DeviceMesh, experts: DeviceMesh) -> None:
    """Every expert's inner units are divided over tp, and the experts over ep where the mesh has it."""
    before = [Shard(0)] if experts.ndim == 2 else []
    for name, dimension in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
        cut(moe.experts, name, experts, [*before, Shard(dimension)])
    keep_whole(moe.gate, mesh, partial=True)
    if moe.has_shared:
        cut_mlp(moe.shared_experts, mesh)


def cut_embedding(embedding: nn.Embedding, mesh: DeviceMesh, sequence: bool) -> None:
    """Words are divided: a rank looks up its own and gives zeros for the others."""
    group = mesh.get_group()
    first, count = shard_offset(embedding.num_embeddings, mesh.size(), mesh.get_local_rank())
    cut(embedding, "weight", mesh, COLUMNS)
    foreign: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        own = args[0] - first
        is_foreign = (own < 0) | (own >= count)
        foreign.append(is_foreign)
        return (own.masked_fill(is_foreign, 0),)

    def after(module: nn.Module, args: tuple[Any, ...], x_BTD: Tensor) -> Tensor:
        return leave(x_BTD.masked_fill(foreign.pop()[..., None], 0.0), group, sequence)

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)


def own_positions(group: dist.ProcessGroup) -> Any:
    """Cut the learned positions along the sequence, as the residual stream is."""

    def after(module: nn.Module, args: tuple[Any, ...], x_TD: Tensor) -> Tensor:
        return x_TD.chunk(group.size(), dim=-2)[group.rank()]

    return after
