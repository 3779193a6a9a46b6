"""The decode step in C (`decode.c`): built at first use with the system's compiler, kept in the cache folder.

Where it cannot be used (no compiler, a GPU, a family whose layers differ) the `Transformer` itself decodes.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from soma.base import progress
from soma.base.artefact import hash_lines
from soma.base.cache import cache_root
from soma.base.machine import compiler, cpu_model
from soma.model.attention import Attention
from soma.model.cache import KVCache
from soma.model.layers import MLP
from soma.model.transformer import Transformer

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in this order: the machine's own instructions and OpenMP, then with less.
EXTRAS = (
    ("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ("-march=native", "-fopenmp-simd"), (),
)  # fmt: skip
BUILD_SECONDS = 60
# Weights below this are read by one thread. A second one gains little there (5M parameters in bf16: 0.45 against
# 0.57 ms) and costs much where the cores are busy: each layer waits six times for the slower thread.
SMALL_BYTES = 32 << 20

Pointer = ctypes.c_void_p
LAYER_TENSORS = (
    "input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "post_norm", "gate_up", "gate_up_bias",
    "down", "down_bias",
)  # fmt: skip
MODEL_SIZES = ("layers", "width", "heads", "kv_heads", "head", "inner", "vocabulary")
MODEL_TENSORS = ("embedding", "norm", "lm_head", "cosines", "sines")


class Layer(ctypes.Structure):
    """`Layer` of decode.c."""

    _fields_ = [*((name, Pointer) for name in LAYER_TENSORS), ("window", ctypes.c_int64)]


class Model(ctypes.Structure):
    """`Model` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in MODEL_SIZES), ("epsilon", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)), *((name, Pointer) for name in MODEL_TENSORS),
    ]  # fmt: skip


def unsupported(model: Transformer) -> str | None:
    """Why decode.c cannot run this model; None if it can."""
    config = model.config
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {model.dtype}"
    if config.is_mla or config.num_experts:
        return "latent attention or experts"
    if config.norm != "rmsnorm" or config.activation != "swiglu" or config.position_embedding != "rope":
        return "layers differ from a Llama's"
    if (config.rope_scaling or {}).get("rope_type", (config.rope_scaling or {}).get("type")) == "dynamic":
        return "rotary frequencies depend on the length"
    return None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """decode.c for weights of `dtype`, built unless it is in the cache folder; None, with a note, if that fails."""
    found = compiler("c")
    if found is None or not found.works:
        progress.current().note("no C compiler: decoding runs on torch alone, which is slower for small models")
        return None
    bf16 = f"-DWEIGHT_BF16={int(dtype == torch.bfloat16)}"
    key = hash_lines([SOURCE.read_text(), bf16, *FLAGS, str(EXTRAS), found.path, cpu_model()])[:20]
    target = cache_root() / "native" / f"decode-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        said = _build(found.path, bf16, target)
        if said:
            progress.current().note(f"decode.c does not build ({said}): decoding runs on torch alone")
            return None
    try:
        built = ctypes.CDLL(str(target))
    except OSError as error:
        progress.current().note(f"decode.c does not load ({error}): decoding runs on torch alone")
        return None
    built.soma_scratch.restype = ctypes.c_int64
    built.soma_scratch.argtypes = [ctypes.POINTER(Model), ctypes.c_int64]
    built.soma_decode.restype = None
    built.soma_decode.argtypes = [
        ctypes.POINTER(Model), Pointer, Pointer, *([ctypes.c_int64] * 3), Pointer, Pointer, ctypes.c_int,
    ]  # fmt: skip
    return built


def _build(path: str, define: str, target: Path) -> str:
    """Compile decode.c; the compiler's last words if nothing worked, else nothing."""
    said = ""
    for extra in EXTRAS:
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            command = [path, *FLAGS, *extra, define, str(SOURCE), "-o", name, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(name, target)
                return ""
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0][:200]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        finally:
            Path(name).unlink(missing_ok=True)
    return said


class NativeDecoder:
    """Decode steps of one fused model (`Transformer.fuse`) in C, for caches of up to `max_length` tokens.

    Reads the model's own weights, without a copy. Between weights and cache it computes in float32, so for bf16 its
    logits are nearer to those of float32 than the `Transformer`'s.
    """

    def __init__(self, model: Transformer, built: ctypes.CDLL, max_length: int) -> None:
        assert unsupported(model) is None
        assert model.rope is not None
        config, weights = model.config, model.dtype
        state = model.state_dict()
        self.built, self.vocab_size = built, config.vocab_size
        self.kept: list[object] = []  # what C holds pointers to
        cosines, sines = model.rope(torch.arange(max_length), torch.float32)
        layers = (Layer * config.num_hidden_layers)()
        for index, layer in enumerate(model.layers):
            attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
            own = f"layers.{index}."
            assert isinstance(attention, Attention)
            assert isinstance(mlp, MLP)
            tensors = {
                "input_norm": state[own + "input_layernorm.weight"],
                "qkv": attention.fused, "qkv_bias": attention.fused_bias,
                "q_norm": attention.q_norm.weight if config.qk_norm else None,
                "k_norm": attention.k_norm.weight if config.qk_norm else None,
                "out": attention.o_proj.weight, "out_bias": attention.o_proj.bias,
                "post_norm": state[own + "post_attention_layernorm.weight"], "gate_up": mlp.fused,
                "gate_up_bias": mlp.fused_bias, "down": mlp.down_proj.weight, "down_bias": mlp.down_proj.bias,
            }  # fmt: skip
            for name, tensor in tensors.items():
                setattr(layers[index], name, self._pointer(tensor, weights))
            layers[index].window = attention.window or 0
        embedding = model.embed_tokens.weight
        head = embedding if model.lm_head is None else model.lm_head.weight
        self.model = Model(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, config.norm_eps, layers,
            self._pointer(embedding, weights), self._pointer(state["norm.weight"], weights),
            self._pointer(head, weights), self._pointer(cosines, torch.float32), self._pointer(sines, torch.float32),
        )  # fmt: skip
        self.kept.append(layers)
        self.max_length = max_length
        self.scratch = torch.empty(built.soma_scratch(self.model, max_length))
        is_small = sum(parameter.nbytes for parameter in model.parameters()) < SMALL_BYTES
        self.threads = 1 if is_small else torch.get_num_threads()
        self.addresses: weakref.WeakKeyDictionary[KVCache, tuple[ctypes.Array, ctypes.Array]] = (
            weakref.WeakKeyDictionary()
        )

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        assert tensor.dtype == dtype
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Append one token to the cache; float32 scores (V) of the one that follows it."""
        cache.check(1, 1)
        assert cache.capacity <= self.max_length
        assert 0 <= token < self.vocab_size
        if cache not in self.addresses:
            assert all(tensor.is_contiguous() for tensor in [*cache.keys, *cache.values])
            kind = Pointer * len(cache.keys)
            keys, values = kind(*(t.data_ptr() for t in cache.keys)), kind(*(t.data_ptr() for t in cache.values))
            self.addresses[cache] = keys, values
        keys, values = self.addresses[cache]
        logits_V = torch.empty(self.vocab_size)
        self.built.soma_decode(
            self.model, keys, values, cache.capacity, token, cache.length, self.scratch.data_ptr(),
            logits_V.data_ptr(), self.threads,
        )  # fmt: skip
        cache.length += 1
        return logits_V
