"""A Llama-shaped model over the paged cache in C (`csrc/forward.c`): one call for any batch.

Where it cannot be used (no compiler, a GPU, a family whose layers differ) the `Transformer` itself runs.

Shape letters: T new tokens, R rows whose logits are wanted, D model width, V vocabulary, E head width.
"""

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.engine.batch import Batch
from soma.engine.build import library
from soma.model.adapted import LowRank, Segment
from soma.model.attention import Attention
from soma.model.compressed import ScaledLinear
from soma.model.layers import MLP
from soma.model.lora import lora_layers
from soma.model.quantized import QuantizedLinear
from soma.model.transformer import Transformer

# Weights below this are read by one thread. A second one gains little there (5M parameters in bf16: 0.45 against
# 0.57 ms) and costs much where the cores are busy: each layer waits several times for the slower thread.
SMALL_BYTES = 32 << 20
ALIGNMENT = 64

Pointer = ctypes.c_void_p
Size = ctypes.c_int64
LINEARS = ("q", "k", "v", "out", "gate", "up", "down")
CACHED = ("keys", "values", "key_scales", "value_scales")
NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
SIZES = (
    "layers", "width", "heads", "kv_heads", "head", "inner", "vocabulary", "block_size", "blocks", "positions",
)  # fmt: skip
WRONG = ("", "token", "position", "slot", "logit row", "query start", "length", "block of a table", "adapter")
# The linear layers of a layer as an adapter calls them, in the order of LINEARS.
PLACES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = [
        *((name, Pointer) for name in ("values", "scales", "bias")),
        *((name, Size) for name in ("rows", "columns", "bits")),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """`Layer` of forward.c."""

    _fields_ = [
        *((name, Linear) for name in LINEARS), *((name, Pointer) for name in (*NORMS, *CACHED)),
        ("window", Size),
    ]  # fmt: skip


class Model(ctypes.Structure):
    """`Model` of forward.c."""

    _fields_ = [
        *((name, Size) for name in SIZES), ("epsilon", ctypes.c_float), ("layer", ctypes.POINTER(Layer)),
        ("embedding", Pointer), ("norm", Pointer), ("lm_head", Linear), ("cosines", Pointer), ("sines", Pointer),
    ]  # fmt: skip


class Tokens(ctypes.Structure):
    """`Batch` of forward.c."""

    _fields_ = [
        *((name, Size) for name in ("tokens", "sequences", "rows", "table_width")),
        *((name, Pointer) for name in ("token", "position", "slot", "row", "start", "length", "table")),
        *((name, Pointer) for name in ("adapter", "row_adapter", "updates")),
        *((name, Size) for name in ("adapters", "most_rank")),
    ]  # fmt: skip


class Update(ctypes.Structure):
    """`Update` of lora.h."""

    _fields_ = [("a", Pointer), ("b", Pointer), ("rank", Size)]


class Updates:
    """Adapters as C reads them: a table (slots, layers · 7 + 1) of what each does to each linear layer.

    adapters: slot → layer name → update. Slots in between are empty. before: the table until now, whose tensors are
    used again.
    """

    def __init__(
        self, adapters: Mapping[int, Mapping[str, LowRank]], num_layers: int, before: "Updates | None" = None
    ) -> None:
        names = [f"layers.{layer}.{place}" for layer in range(num_layers) for place in PLACES] + ["lm_head"]
        self.slots, self.most_rank = max(adapters, default=-1) + 1, 0
        self.table = (Update * (self.slots * len(names)))()
        self.tensors: dict[int, tuple[LowRank, Tensor, Tensor]] = {}
        for slot, layers in adapters.items():
            assert set(layers) <= set(names)
            for place, name in enumerate(names):
                if name in layers:
                    update = layers[name]
                    laid_out = before.tensors.get(id(update)) if before else None
                    _, a_RK, blocks = self.tensors[id(update)] = laid_out or (update, *self._lay_out(update))
                    into = self.table[slot * len(names) + place]
                    into.a, into.b, into.rank = a_RK.data_ptr(), blocks.data_ptr(), len(a_RK)
                    self.most_rank = max(self.most_rank, len(a_RK))

    @staticmethod
    def _lay_out(update: LowRank) -> tuple[Tensor, Tensor]:
        """A, and scale · B in blocks of 16 rows."""
        b_NR = update.b_NR.float() * update.scale
        padded = F.pad(b_NR, (0, 0, 0, -len(b_NR) % 16))
        return update.a_RK.float().contiguous(), padded.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def slots_of(segments: Sequence[Segment], count: int) -> np.ndarray:
    """The adapter of each of `count` rows, int32, -1 for none."""
    slots = np.full(count, -1, dtype=np.int32)
    for slot, first, end in segments:
        slots[first:end] = slot
    return slots


def declare(built: ctypes.CDLL) -> None:
    """What the functions of forward.c and threads.h take and give."""
    built.soma_scratch.restype, built.soma_step.restype = Size, ctypes.c_int
    built.soma_scratch.argtypes = [ctypes.POINTER(Model), Size, Size, Size, ctypes.c_int]
    built.soma_step.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Tokens), *[Pointer] * 4]
    built.soma_assemble.restype, built.soma_assemble.argtypes = Pointer, [ctypes.c_int]
    built.soma_disband.restype, built.soma_disband.argtypes = None, [Pointer]


class Team:
    """Threads in C that share the steps of one model: the calling one, and helpers that sleep in between."""

    def __init__(self, built: ctypes.CDLL, threads: int) -> None:
        self.threads = threads
        self.pointer = built.soma_assemble(threads)
        assert self.pointer, "no memory for a team of threads"
        end = weakref.finalize(self, disband, built, self.pointer, os.getpid())
        end.atexit = False  # a step may be running then, and the helpers end with the process


def disband(built: ctypes.CDLL, pointer: int, process: int) -> None:
    """End a team's threads; a fork of the process that made them has none."""
    if os.getpid() == process:
        built.soma_disband(pointer)


class NativeModel:
    """One model and its paged cache, in C. For use under `torch.inference_mode()`; one step at a time.

    Reads the model's own weights and cache, without a copy. Activations are float32 between matrix products; what a
    product reads is rounded to bf16 (bf16 weights, on processors that multiply bf16) or to 8 bits with a scale for
    each 32 numbers of a token (quantized weights). A token's result does not depend on the others in its batch, but
    for bf16 models on processors with tiles (AMX): steps of many tokens (from 12 on with bf16 weights, from 96 on with
    quantized ones) round otherwise, by what bf16 operands cost.
    """

    @staticmethod
    def supports(model: Transformer) -> str | None:
        """Why C cannot run this model; None if it can."""
        config = model.config
        if model.device.type != "cpu":
            return f"the model is on {model.device.type}"
        if model.dtype not in (torch.float32, torch.bfloat16):
            return f"weights are {model.dtype}"
        if config.is_mla or config.num_experts:
            return "latent attention or experts"
        if config.norm != "rmsnorm" or config.activation != "swiglu" or config.position_embedding != "rope":
            return "layers differ from a Llama's"
        if lora_layers(model):
            return "adapters that are not merged"
        if any(isinstance(module, ScaledLinear) for module in model.modules()):
            return "weights in a rounded format that C does not read"
        if (config.rope_scaling or {}).get("rope_type", (config.rope_scaling or {}).get("type")) == "dynamic":
            return "rotary frequencies depend on the length"
        if library(model.dtype) is None:
            return "no working C compiler"
        return None

    def __init__(
        self, model: Transformer, keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int,
        key_scales: Sequence[Tensor] = (), value_scales: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        """keys, values: for each layer (blocks, key/value heads, block_size, E), of the model's dtype, contiguous; or
        int8 with float32 scales (blocks, key/value heads, block_size)."""
        assert block_size & (block_size - 1) == 0, "block_size is a power of two"
        built = library(model.dtype)
        assert built is not None
        assert self.supports(model) is None
        config, self.dtype = model.config, model.dtype
        self.vocab_size, self.width = config.vocab_size, config.hidden_size
        self.transformer = model
        self.kept: list[object] = []  # what C holds pointers to
        layers = (Layer * config.num_hidden_layers)()
        for index, layer in enumerate(model.layers):
            self._fill(layers[index], layer, keys[index], values[index], block_size)
            if key_scales:
                layers[index].key_scales = self._pointer(key_scales[index], torch.float32)
                layers[index].value_scales = self._pointer(value_scales[index], torch.float32)
        self.kept.append(layers)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        self.model = Model(
            config.num_hidden_layers, self.width, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, self.vocab_size, block_size, keys[0].size(0), 0,
            config.norm_eps, layers, self._pointer(model.embed_tokens.weight),
            self._pointer(model.norm.get_parameter("weight")), self._linear(head), None, None,
        )  # fmt: skip
        declare(built)
        self.built = built
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.updates = Updates({}, config.num_hidden_layers)
        weights = [*model.parameters(), *model.buffers()]
        self.threads = 1 if sum(tensor.nbytes for tensor in weights) < SMALL_BYTES else torch.get_num_threads()

    @property
    def threads(self) -> int:
        """Threads that share a step."""
        return self.team.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self.team = Team(self.built, count)

    def _fill(self, into: Layer, layer: nn.Module, keys: Tensor, values: Tensor, block_size: int) -> None:
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        assert isinstance(attention, Attention)
        assert isinstance(mlp, MLP)
        modules = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
            mlp.down_proj,
        )  # fmt: skip
        for name, module in zip(LINEARS, modules, strict=True):
            setattr(into, name, self._linear(module))
        into.input_norm = self._pointer(layer.get_parameter("input_layernorm.weight"))
        into.post_norm = self._pointer(layer.get_parameter("post_attention_layernorm.weight"))
        if attention.qk_norm:
            into.q_norm, into.k_norm = self._pointer(attention.q_norm.weight), self._pointer(attention.k_norm.weight)
        for name, tensor in (("keys", keys), ("values", values)):
            assert tensor.is_contiguous()
            assert tensor.shape[1:] == (attention.num_kv_heads, block_size, attention.head_dim)
            setattr(into, name, self._pointer(tensor, torch.int8 if tensor.dtype == torch.int8 else None))
        into.window = attention.window or 0

    def _linear(self, module: nn.Module) -> Linear:
        if isinstance(module, QuantizedLinear):
            return Linear(
                self._pointer(module.packed, torch.uint8), self._pointer(module.scales, torch.float16),
                self._pointer(module.bias), module.out_features, module.in_features, module.bits,
            )  # fmt: skip
        weight_ND, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        return Linear(self._pointer(weight_ND), None, self._pointer(bias), *weight_ND.shape, 0)

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        if tensor is None:
            return None
        assert tensor.dtype == (dtype or self.dtype)
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; float32 logits (R, V) of the rows that it asks for."""
        return self.forward(batch)[0]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `step`; logits (R, V) and the hidden states (R, D) after the final norm, both float32."""
        if batch.longest > self.model.positions:
            self._rotate_up_to(batch.longest)
        tables_SB, T, R = batch.tables_SB, batch.num_tokens, batch.logit_rows_R.numel()
        longs = (batch.tokens_T, batch.positions_T, batch.slots_T, batch.logit_rows_R)
        ints = (batch.query_starts_S1, batch.lengths_S, tables_SB)
        assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in longs)
        assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in ints)
        tokens = Tokens(
            T, batch.num_sequences, R, tables_SB.size(1), *(tensor.data_ptr() for tensor in (*longs, *ints))
        )  # fmt: skip
        if batch.adapters:
            updates = self.updates  # may be replaced meanwhile
            chosen = slots_of(batch.adapters, T), slots_of(batch.row_adapters, R)
            tokens.adapter, tokens.row_adapter = (slots.ctypes.data for slots in chosen)
            tokens.updates = ctypes.cast(updates.table, Pointer)
            tokens.adapters, tokens.most_rank = updates.slots, updates.most_rank
        size = self.built.soma_scratch(self.model, T, R, tokens.most_rank, self.threads)
        if self.scratch.numel() < size + ALIGNMENT:
            self.scratch = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        memory = -(-self.scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        logits_RV, hidden_RD = torch.empty(R, self.vocab_size), torch.empty(R, self.width)
        wrong = self.built.soma_step(
            self.model, tokens, memory, hidden_RD.data_ptr(), logits_RV.data_ptr(), self.team.pointer
        )
        assert not wrong, f"a {WRONG[wrong]} of the batch is out of range"
        return logits_RV, hidden_RD

    def set_adapters(self, adapters: Mapping[int, Mapping[str, LowRank]]) -> None:
        """The adapters that segments of a batch may name: slot → layer name → update. From another thread too."""
        self.updates = Updates(adapters, len(self.transformer.layers), self.updates)

    def _rotate_up_to(self, length: int) -> None:
        """Make the rotary table for at least `length` positions."""
        assert self.transformer.rope is not None
        positions = max(256, 1 << (length - 1).bit_length())
        tables = self.transformer.rope(torch.arange(positions), torch.float32)
        self.tables = [table.contiguous() for table in tables]
        self.model.cosines, self.model.sines = (table.data_ptr() for table in self.tables)
        self.model.positions = positions
