"""Loading and saving folders: what is refused and how it is said, what is tolerated, memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from family_cases import CASES, random_tokens, reference

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.families import config_from_hf, config_to_hf
from soma.model.hub import load_config, load_model, save_model
from soma.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(Transformer(SMALL), tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **values}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(Q), f"missing: {Q}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "config has not: extra"),
        (lambda tensors: tensors.update({Q: torch.ones(32, 31)}), rf"{Q}' has shape \[32, 31\], expected \[32, 32\]"),
        (lambda tensors: tensors.update({Q: torch.ones(32, 32, dtype=torch.int8)}), f"{Q}' has dtype I8"),
        (lambda tensors: tensors.update({Q: torch.ones(32, 32).to(torch.float8_e4m3fn)}), f"{Q}' has dtype F8_E4M3"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Any, says: str) -> None:
    change_weights(folder, change)
    with pytest.raises(UserError, match=says):
        load_model(folder)


def test_truncated_and_foreign_files_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: truncated: tensor 'lm_head.weight'"):
        load_model(folder)
    for broken in (b"", whole[:5], whole[:100], b"\x10" + bytes(7) + b"not json at all!!", b"\xff" * 300):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"model.safetensors: (truncated or )?not a safetensors file"):
            load_model(folder)
    path.unlink()
    with pytest.raises(UserError, match="no weights there"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only pickled weights"):
        load_model(folder)


def test_broken_shards_are_named(folder: Path) -> None:
    save_model(Transformer(SMALL), folder, max_shard_bytes=10_000)
    assert not (folder / "model.safetensors").exists(), "weights of an earlier save are removed"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in Transformer(SMALL).parameters())
    shard = index["weight_map"][Q]
    (folder / shard).rename(folder / "away")
    with pytest.raises(UserError, match=f"{shard}: this weight shard"):
        load_model(folder)
    (folder / "away").rename(folder / shard)
    index["weight_map"]["model.norm.weight"] = shard
    index["weight_map"]["model.norms.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensor 'model.norms.weight', which .* places there"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8', which is not supported"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a number for 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_unsupported_configs_are_refused_by_name(folder: Path, values: dict[str, Any], says: str) -> None:
    change_config(folder, **values)
    with pytest.raises(UserError, match=f"config.json: .*{says}|{says}"):
        load_model(folder)


def test_absent_or_broken_config_and_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json there"):
        load_model(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="a JSON object"):
        load_config(folder)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "add_cross_attention", True),
        ("gpt2", "activation_function", "relu"), ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "topk_method", "noaux_tc"), ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "moe_layer_freq", 2), ("mixtral", "router_jitter_noise", 0.1),
        ("mistral", "hidden_act", "gelu"),
    ],
)  # fmt: skip
def test_unsupported_options_of_a_family(tmp_path: Path, family: str, key: str, value: Any) -> None:
    name = next(name for name, (model_type, _) in CASES.items() if model_type == family)
    raw = {**CASES[name][1], "model_type": family}
    config_from_hf(raw, "config.json")
    with pytest.raises(UserError, match=f"config.json: {key} = {value!r} is not supported"):
        config_from_hf({**raw, key: value}, "config.json")


def test_both_spellings_of_rope_are_read() -> None:
    base = {"model_type": "llama", **CASES["llama"][1]}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    old = {**base, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {**base, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    assert config_from_hf(old, "") == config_from_hf(new, "")
    assert config_from_hf(base, "").rope_theta == 10000.0
    assert config_from_hf({"model_type": "mixtral", **CASES["mixtral"][1]}, "").rope_theta == 1e6


def test_absent_and_null_keys_mean_what_transformers_takes() -> None:
    import transformers

    mistral = {"model_type": "mistral", **{k: v for k, v in CASES["mistral"][1].items() if k != "sliding_window"}}
    assert config_from_hf(mistral, "").sliding_window == transformers.MistralConfig().sliding_window == 4096
    assert config_from_hf({**mistral, "sliding_window": None}, "").sliding_window is None
    v3 = {"model_type": "deepseek_v3", **CASES["deepseek-v3"][1]}
    assert config_from_hf({**v3, "q_lora_rank": None}, "").q_lora_rank is None


@pytest.mark.parametrize("name", list(CASES))
def test_config_survives_the_way_to_disk_and_back(name: str) -> None:
    model_type, arguments = CASES[name]
    config = config_from_hf({"model_type": model_type, **arguments}, "")
    assert config_from_hf(config_to_hf(config), "") == config


def test_what_a_family_cannot_say_is_refused_on_saving(tmp_path: Path) -> None:
    for change in ({"norm": "layernorm"}, {"activation": "gelu"}, {"qk_norm": True}, {"sliding_window": 8}):
        config = SMALL.model_copy(update=change)
        with pytest.raises(UserError, match=f"cannot say: {next(iter(change))}="):
            save_model(Transformer(config), tmp_path)
    assert not list(tmp_path.iterdir())


def test_gpt2_with_and_without_prefix_and_old_buffers(tmp_path: Path) -> None:
    theirs = reference("gpt2", tmp_path)
    tokens_BT = random_tokens(1, 9)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits

    def as_old_checkpoint(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    change_weights(tmp_path, as_old_checkpoint)
    with torch.no_grad():
        assert (load_model(tmp_path)(tokens_BT) - expected).abs().max() <= 1e-4


def test_rotary_buffers_and_prediction_layers_are_tolerated(tmp_path: Path, folder: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(folder, lambda tensors: tensors.update(buffer))
    load_model(folder)
    reference("deepseek-v3", tmp_path / "v3")
    change_weights(tmp_path / "v3", lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(4)}))
    load_model(tmp_path / "v3")
    change_weights(tmp_path / "v3", lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(4)}))
    with pytest.raises(UserError, match=r"model.layers.2.eh_proj.weight"):
        load_model(tmp_path / "v3")


def test_dtypes_are_converted_and_kept(folder: Path) -> None:
    assert load_model(folder).dtype == torch.float32
    half = load_model(folder, dtype=torch.bfloat16)
    save_model(half, folder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_model(folder)
    assert again.dtype == torch.bfloat16
    assert again.rope is not None
    assert again.rope.inv_freq.dtype == torch.float32
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_model_may_be_saved_over_the_folder_it_came_from(folder: Path) -> None:
    model = load_model(folder)
    before = (folder / "model.safetensors").read_bytes()
    save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_tokenizer_files_and_token_ids_come_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokens = tmp_path / "tokenizer"
    tokens.mkdir()
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.add_special_tokens(["<end>"])
    inner.save(str(tokens / "tokenizer.json"))
    (tokens / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    save_model(Transformer(SMALL), tmp_path / "model", tokenizer_dir=tokens)
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == 2
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (tokens / "tokenizer.json").read_bytes()


MEMORY = """
import re, sys
from soma.model.hub import load_model
import torch
def kibibytes(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
load_model(sys.argv[3])  # torch loads 78 MB of its own code when the first model is made
before = kibibytes("VmRSS")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((kibibytes("VmHWM") - before) * 1024 / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_one_copy(tmp_path: Path, dtype: str) -> None:
    config = SMALL.model_copy(update={"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048,
                                      "num_hidden_layers": 8, "head_dim": 128})  # fmt: skip
    save_model(Transformer(SMALL), tmp_path / "small")
    save_model(Transformer(config), tmp_path / "large")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), dtype, str(tmp_path / "small")]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.35, "peak growth over the model's size"
    shutil.rmtree(tmp_path)
