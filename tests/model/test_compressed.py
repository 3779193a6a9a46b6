"""Rounded weights on disk, against the compressed-tensors package and transformers: read, written, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from family_cases import random_tokens, reference
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from soma.base.errors import UserError
from soma.model.compressed import ScaledLinear, pack_int32, stored_group, to_dense, unpack_int32
from soma.model.compressed_config import Quantization, Scheme, read_quantization
from soma.model.hub import load_config, load_model, save_model
from soma.model.quantized import QuantizedLinear, quantize

# name → (format, weights' arguments, dtype of the scales, the layer that it becomes)
SCHEMES: dict[str, tuple[str, dict[str, Any], torch.dtype, type]] = {
    "int4 g32 fp16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, torch.float16,
                      QuantizedLinear),
    "int4 g64 bf16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}, torch.bfloat16,
                      QuantizedLinear),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, torch.bfloat16, QuantizedLinear),
    "int8 g32": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}, torch.bfloat16,
                 QuantizedLinear),
    "int8 channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16, QuantizedLinear),
    "int8 tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, torch.bfloat16, QuantizedLinear),
    "int4 g16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, torch.bfloat16,
                 ScaledLinear),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, torch.float32,
                   ScaledLinear),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, torch.bfloat16,
                    ScaledLinear),
}  # fmt: skip
ACTIVATIONS = {"int-quantized": {"num_bits": 8, "strategy": "token", "dynamic": True},
               "float-quantized": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}  # fmt: skip


def compress(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Rewrite a model's folder as the package stores it; the weights that it decompresses to, in float32."""
    format_, arguments, dtype, _ = SCHEMES[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=format_)
    if format_ in ACTIVATIONS:
        scheme.input_activations = QuantizationArgs(**ACTIVATIONS[format_])
    compressor, tensors, right = BaseCompressor.get_value_from_registry(format_), {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj") or weight.size(1) % (arguments.get("group_size") or 1):  # the package's rule
            tensors[key] = weight
            continue
        group = {"group": arguments.get("group_size"), "channel": weight.size(1)}.get(arguments["strategy"])
        blocks = weight.reshape(1, -1) if group is None else weight.view(len(weight), -1, group)
        top = 448.0 if arguments.get("type") == "float" else 2.0 ** (arguments["num_bits"] - 1) - 0.5
        scale = (blocks.abs().amax(-1) / top).to(dtype)
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {f"{layer}.{kind}": value for kind, value in stored.items()}
        exact = stored | {"weight_scale": scale.float()}
        right[layer.removeprefix("model.")] = compressor.decompress(exact, scheme)["weight"].float()
    save_file(tensors, folder / "model.safetensors")
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=format_, quantization_status="compressed", ignore=["lm_head"]
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": json.loads(config.model_dump_json())}))
    return right


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_package(tmp_path: Path, name: str) -> None:
    """To the last bit, in float32; and the model computes with them."""
    reference("llama", tmp_path)
    dense = load_model(tmp_path)
    right = compress(tmp_path, name)
    model = load_model(tmp_path)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SCHEMES[name][3])}
    assert set(layers) == set(right)
    for path, weight_NK in right.items():
        assert torch.equal(layers[path].dequantize(), weight_NK), path  # type: ignore[operator]
        dense.get_submodule(path).weight = torch.nn.Parameter(weight_NK)
    with torch.no_grad():
        tokens_BT = random_tokens(2, 15)
        torch.testing.assert_close(model(tokens_BT), dense(tokens_BT), atol=1e-5, rtol=1e-5)
        assert to_dense(model) == (len(right) if SCHEMES[name][3] is ScaledLinear else 0)
        torch.testing.assert_close(model(tokens_BT), dense(tokens_BT), atol=1e-5, rtol=1e-5)
        for layer in layers.values():
            assert torch.equal(layer.to(torch.bfloat16).dequantize(), layer.to(torch.float32).dequantize())  # type: ignore[operator]


def test_scales_that_are_no_half_precision_numbers(tmp_path: Path) -> None:
    """float32 scales: each weight within 2^-11 of itself; tiny ones keep their precision in the other layer."""
    reference("llama", tmp_path)
    SCHEMES["float32 scales"] = (*SCHEMES["int8 channel"][:2], torch.float32, QuantizedLinear)
    try:
        right = compress(tmp_path, "float32 scales")
    finally:
        del SCHEMES["float32 scales"]
    model = load_model(tmp_path)
    weight_NK, exact_NK = model.get_submodule("layers.0.mlp.up_proj").dequantize(), right["layers.0.mlp.up_proj"]  # type: ignore[operator]
    assert not torch.equal(weight_NK, exact_NK)
    assert ((weight_NK - exact_NK).abs() <= exact_NK.abs() * 2**-11).all()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 1e-6
    save_file(tensors, tmp_path / "model.safetensors")
    tiny = load_model(tmp_path).get_submodule("layers.0.mlp.up_proj")
    assert isinstance(tiny, ScaledLinear)
    torch.testing.assert_close(tiny.dequantize(), exact_NK * 1e-6, rtol=1e-6, atol=0)


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([4, 8]), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(columns: int, rows: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=generator).to(torch.int8)
    packed = pack_int32(values, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_int32(packed, bits, columns), values)


def test_unpack_worked_example() -> None:
    assert unpack_int32(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8).tolist() == [[*range(-8, 0)]]


@pytest.mark.parametrize(
    ("family", "bits", "group", "head_bits"),
    [("llama", 4, 32, None), ("llama", 8, 64, None), ("qwen2-tied-window", 4, 32, 8), ("qwen3-moe", 4, 32, None),
     ("llama-tied-bias", 8, 32, None)],
)  # fmt: skip
def test_what_we_store_loads_again_and_in_transformers(
    tmp_path: Path, family: str, bits: int, group: int, head_bits: int | None
) -> None:
    """The same weights to the bit, the same bytes when stored again, and transformers' logits from them."""
    reference(family, tmp_path / "base")
    model = quantize(load_model(tmp_path / "base"), bits, group, head_bits)
    save_model(model, tmp_path / "small")
    again = load_model(tmp_path / "small")
    rounded = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert rounded
    for path, layer in rounded.items():
        other = again.get_submodule(path)
        assert isinstance(other, QuantizedLinear), path
        assert torch.equal(other.dequantize(), layer.dequantize()), path
    tokens_BT = random_tokens(2, 15)
    with torch.no_grad():
        right = model(tokens_BT)
        assert torch.equal(again(tokens_BT), right)
    save_model(again, tmp_path / "twice")
    for path in (tmp_path / "small").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name
    if not model.config.num_experts:  # transformers 5 stacks experts, which the package cannot skip by name
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens_BT).logits, right, atol=1e-3, rtol=1e-3)


def test_rounded_experts_are_read(tmp_path: Path) -> None:
    """Into the stacked matrices, as what they stand for."""
    reference("mixtral", tmp_path)
    tensors, dense = load_file(tmp_path / "model.safetensors"), load_model(tmp_path)
    key = "model.layers.1.block_sparse_moe.experts.2.w1"
    weight_NK = tensors.pop(f"{key}.weight")
    scale_N1 = weight_NK.abs().amax(-1, keepdim=True) / 127
    values_NK = (weight_NK / scale_N1).round().to(torch.int8)
    save_file(tensors | {f"{key}.weight": values_NK, f"{key}.weight_scale": scale_N1}, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    raw["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
        "group_0": {"targets": [r"re:.*experts\.2\.w1"], "weights": weights}}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = load_model(tmp_path)
    gate = model.get_parameter("layers.1.mlp.experts.gate_proj")
    assert torch.equal(gate[2], values_NK * scale_N1)
    assert torch.equal(gate[0], dense.get_parameter("layers.1.mlp.experts.gate_proj")[0])


GROUP_0 = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
GOOD = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP_0}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"quant_method": "gptq"}, "quant_method 'gptq'"), ({"format": "marlin-24"}, "format 'marlin-24'"),
     ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"), ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache"),
     ({"quantization_status": "frozen"}, "'frozen'"), ({"config_groups": {}}, "config_groups"),
     ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16"),
     ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"), ({"transform_config": {"a": 1}}, "transform")],
)  # fmt: skip
def test_configs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    read_quantization(GOOD, "here")
    with pytest.raises(UserError, match=words) as caught:
        read_quantization(GOOD | changes, "here")
    assert str(caught.value).startswith("here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"symmetric": False}, "zero points"), ({"num_bits": 3}, "int3 by group of 32"), ({"type": "float"}, "float4"),
     ({"actorder": "group"}, "g_idx"), ({"strategy": "block"}, "by block"), ({"group_size": 0}, "group_size 0")],
)  # fmt: skip
def test_schemes_that_are_refused(changes: dict[str, Any], words: str) -> None:
    group = GROUP_0 | {"weights": GROUP_0["weights"] | changes}  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        read_quantization(GOOD | {"config_groups": {"group_0": group}}, "here")


def test_which_scheme_a_layer_has() -> None:
    small = Scheme("pack-quantized", 4, 32, ("Linear",))
    large = Scheme("int-quantized", 8, 0, ("re:.*down_proj$", "a.b"))
    schemes = Quantization((small, large), ("lm_head", r"re:.*\.gate$"))
    assert schemes.scheme_of("a.q_proj") is small
    assert schemes.scheme_of("a.down_proj") is large
    assert schemes.scheme_of("a.b") is large
    assert schemes.scheme_of("lm_head") is None
    assert schemes.scheme_of("a.gate") is None


def test_folders_that_are_refused(tmp_path: Path) -> None:
    reference("llama", tmp_path / "llama")
    compress(tmp_path / "llama", "int4 g32 fp16")
    with pytest.raises(UserError, match="quantization_config"):
        load_model(tmp_path / "llama", quantized=False)  # to be trained
    with pytest.raises(UserError, match="quantization_config"):
        load_config(tmp_path / "llama")
    good = load_file(tmp_path / "llama/model.safetensors")
    key = "model.layers.0.self_attn.q_proj"
    for change, words in (
        ({f"{key}.weight_packed": None}, "weight_packed.* is missing"),
        ({f"{key}.weight_packed": good[f"{key}.weight_packed"].long()}, "does not fit its quantization scheme"),
        ({f"{key}.weight_scale": good[f"{key}.weight_scale"][:, :1].clone()}, "weight_scale' has shape"),
        ({f"{key}.weight_shape": torch.tensor([1, 2])}, r"holds \[1, 2\]"),
        ({f"{key}.weight_g_idx": torch.zeros(3)}, "weight_g_idx"),
    ):
        changed = {name: value for name, value in (good | change).items() if value is not None}
        save_file(changed, tmp_path / "llama/model.safetensors")
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "llama")
    reference("gpt2", tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2 cannot be stored"):
        save_model(quantize(load_model(tmp_path / "gpt2"), 4), tmp_path / "out")
    with pytest.raises(UserError, match="70 columns are no multiple of 32"):
        stored_group(QuantizedLinear.from_weight(torch.ones(2, 70), 4))
    layer = ScaledLinear(torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, 1), 64)
    model = load_model(tmp_path / "gpt2")
    model.get_submodule("layers.0.self_attn").o_proj = layer
    with pytest.raises(UserError, match=r"o_proj' cannot be stored"):
        save_model(model, tmp_path / "out")
    assert F.linear(torch.ones(1, 64), layer.weight).abs().sum() == 0
