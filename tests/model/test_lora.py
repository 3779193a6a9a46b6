"""LoRA layers and PEFT folders against peft over transformers: logits both ways, training, merging, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from family_cases import random_tokens, reference
from safetensors.torch import load_file, save_file

from soma.base.errors import UserError
from soma.model.cache import KVCache
from soma.model.dropout import stamped
from soma.model.hub import load_model
from soma.model.lora import (
    LoRALinear,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    read_adapter,
    remove_lora,
    save_lora,
    targets,
    unmerge_lora,
)
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import quantize
from soma.model.transformer import Transformer

BOUND = 1e-4  # largest difference of a float32 logit, logits of standard deviation 1.2

# family case → settings of an adapter
CASES: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "llama-tied-bias": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "qwen2": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 5},
              "alpha_pattern": {"self_attn.o_proj": 4}},
    "qwen3": {"target_modules": r".*\.[02]\.(mlp|self_attn)\.(up|o)_proj"},
    "mistral-window": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"],
                       "layers_to_transform": [0, 2]},
    "gpt2": {"target_modules": "all-linear"},
    "gpt2-untied-inner": {"target_modules": ["c_attn", "c_fc", "lm_head"]},
    # peft over transformers 5 turns all MLP names of these into adapters on routed experts, which we refuse
    "mixtral": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "qwen3-moe-sparse": {"target_modules": ["k_proj", "o_proj"]},
    "deepseek-v2": {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "deepseek-v3": {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]},
}  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    return {"r": 6, "lora_alpha": 12, **CASES[name]}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Updates that do something: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Setting `save_embedding_layers`")


def with_peft(theirs: Any, name: str) -> Any:
    return peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings(name))).eval()


@pytest.fixture(params=list(CASES))
def case(request: Any, tmp_path: Path) -> tuple[str, Path, Any]:
    return request.param, tmp_path, reference(request.param, tmp_path / "base")


@torch.inference_mode()
def test_an_adapter_of_peft_gives_the_same_logits(case: Any) -> None:
    name, folder, theirs = case
    tokens_BT = random_tokens(2, 19)
    plain = theirs(tokens_BT).logits
    adapted = with_peft(theirs, name)
    fill(adapted, 1)
    adapted.save_pretrained(folder / "adapter")
    right = adapted(tokens_BT).logits
    assert (right - plain).abs().max() > 100 * BOUND  # negative control: the adapter does something
    ours = load_model(folder / "base")
    load_lora(ours, folder / "adapter")
    assert (ours(tokens_BT) - right).abs().max() <= BOUND
    cache = KVCache(ours.config, 2, 19)  # MLA takes another way for single tokens
    parts = [ours(chunk, cache=cache) for chunk in tokens_BT.split([9, 1, 9], dim=1)]
    assert (torch.cat(parts, dim=1) - right).abs().max() <= BOUND
    merge_lora(ours)
    assert (ours(tokens_BT) - right).abs().max() <= BOUND
    remove_lora(ours)
    assert not lora_layers(ours)
    assert (ours.fuse()(tokens_BT) - right).abs().max() <= BOUND


@torch.inference_mode()
def test_an_adapter_of_ours_loads_in_peft_and_here(case: Any) -> None:
    name, folder, theirs = case
    tokens_BT = random_tokens(2, 19, seed=2)
    ours = load_model(folder / "base")
    plain = ours(tokens_BT)
    add_lora(ours, LoRAConfig(**settings(name)))
    assert torch.equal(ours(tokens_BT), plain)  # it begins at nothing
    fill(ours, 3)
    save_lora(ours, LoRAConfig(**settings(name)), folder / "adapter")
    right = ours(tokens_BT)
    assert (right - plain).abs().max() > 100 * BOUND
    made = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    written, loaded = load_file(folder / "adapter/adapter_model.safetensors"), peft.get_peft_model_state_dict(made)
    assert {key for key in loaded if "lora_" in key} == set(written)
    assert (made(tokens_BT).logits - right).abs().max() <= BOUND
    again = load_model(folder / "base")
    config = load_lora(again, folder / "adapter")
    assert torch.equal(again(tokens_BT), right)
    save_lora(again, config, folder / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / file).read_bytes() == (folder / "again" / file).read_bytes()


def test_training_makes_the_gradients_that_peft_makes(tmp_path: Path) -> None:
    theirs = with_peft(reference("gpt2", tmp_path / "base"), "gpt2")
    fill(theirs, 4)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base").train()
    load_lora(ours, tmp_path / "adapter")
    tokens_BT = random_tokens(2, 12)
    for model in (ours, theirs):
        logits = model(tokens_BT) if model is ours else model(tokens_BT).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in ours.named_parameters() if "lora_" in name}
    layers, right = lora_layers(ours), dict(theirs.named_parameters())
    for name, target in targets(ours.config).items():
        if name != "lm_head":
            a, b = (right[f"base_model.model.{name}.lora_{half}.default.weight"].grad for half in "AB")
            torch.testing.assert_close(layers[target.parts[0]].lora_A.grad, a, atol=1e-5, rtol=1e-4)
            b_NR = torch.cat([layers[part].lora_B.grad for part in target.parts])  # type: ignore[misc]
            torch.testing.assert_close(b_NR, b, atol=1e-5, rtol=1e-4)


def make(tmp_path: Path) -> Transformer:
    reference("llama", tmp_path / "base")
    return load_model(tmp_path / "base")


def test_merging_gives_back_the_same_bits(tmp_path: Path) -> None:
    model = make(tmp_path).to(torch.bfloat16)
    add_lora(model, LoRAConfig(r=4))
    fill(model, 5)
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens_BT = random_tokens(1, 9)
    with torch.no_grad():
        apart = model(tokens_BT).float()
        merge_lora(model)
        merge_lora(model)
        together = model(tokens_BT).float()
    assert (apart - together).pow(2).mean().sqrt() < 0.04 * apart.std()
    assert not torch.equal(model.state_dict()["layers.0.mlp.up_proj.base.weight"], before[
        "layers.0.mlp.up_proj.base.weight"])  # fmt: skip
    unmerge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_over_quantized_layers(tmp_path: Path) -> None:
    """QLoRA's forward pass: the update beside a rounded base; only it is trained, and it cannot be merged."""
    model, plain = quantize(make(tmp_path), 4), quantize(load_model(tmp_path / "base"), 4)
    add_lora(model, LoRAConfig(r=4, lora_dropout=0.5, target_modules=("q_proj", "down_proj")))
    fill(model, 6)
    tokens_BT = random_tokens(1, 9)
    model.eval()
    with torch.no_grad():
        for layer in lora_layers(model).values():
            x = torch.randn(3, layer.in_features)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-4)
        assert (model(tokens_BT) - plain(tokens_BT)).abs().max() > 0.01
    model.train()
    with stamped(tokens_BT):
        model(tokens_BT).logsumexp(-1).mean().backward()
    graded = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {"lora_A", "lora_B"}
    with stamped(tokens_BT), torch.no_grad():
        dropped = model(tokens_BT)
        assert torch.equal(model(tokens_BT), dropped)
        assert not torch.equal(model.eval()(tokens_BT), dropped)
    with pytest.raises(UserError, match="merged into quantized"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"peft_type": "IA3"}, "peft_type 'IA3'"), ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "trained biases"),
     ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"), ({"lora_bias": True}, "lora_bias"),
     ({"init_lora_weights": "pissa"}, "changes the base"), ({"target_parameters": ["experts"]}, "routed experts"),
     ({"r": 0}, "r: "), ({"rank_pattern": {"q(": 3}}, "no regular expression"), ({"r": 5}, "rank 5 on this model")],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model = make(tmp_path)
    add_lora(model, LoRAConfig(r=4))
    save_lora(model, LoRAConfig(r=4), tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    read_adapter(tmp_path, model.config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError, match=words) as caught:
        read_adapter(tmp_path, model.config)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("rename", "words"),
    [(("layers.0.mlp.up_proj", "layers.0.mlp.experts.0.w1"), "routed experts"),
     (("layers.0.mlp.up_proj", "layers.7.mlp.up_proj"), "no such linear layer"),
     (("model.layers.0.mlp.up_proj", "lm_head"), "output layer is its embedding"),
     (("up_proj.lora_A", "up_proj.lora_C"), "only lora_A and lora_B"),
     (("up_proj.lora_A.weight", "up_proj.lora_magnitude_vector"), "only lora_A and lora_B"),
     (("1.mlp.up_proj.lora_A", "1.mlp.x.lora_A"), "alone"), (("base_model.", ""), "is not supported")],
)  # fmt: skip
def test_tensors_that_are_refused(tmp_path: Path, rename: tuple[str, str], words: str) -> None:
    reference("llama-tied-bias", tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, LoRAConfig(r=4))
    save_lora(model, LoRAConfig(r=4), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name.replace(*rename): value for name, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=words):
        read_adapter(tmp_path, model.config)


def test_folders_that_are_none(tmp_path: Path) -> None:
    model = make(tmp_path)
    with pytest.raises(UserError, match="not an adapter's folder"):
        read_adapter(tmp_path / "base", model.config)
    add_lora(model, LoRAConfig(r=4))
    save_lora(model, LoRAConfig(r=4), tmp_path / "adapter")
    shutil.move(tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        read_adapter(tmp_path / "adapter", model.config)
    with pytest.raises(UserError, match="selects no linear layer"):
        add_lora(load_model(tmp_path / "base"), LoRAConfig(target_modules=("c_attn",)))


def test_scale_worked_examples() -> None:
    assert LoRAConfig(r=8, lora_alpha=16).scale("q") == 2
    assert LoRAConfig(r=8, lora_alpha=16, use_rslora=True).scale("q") == pytest.approx(5.657, abs=1e-3)
    assert isinstance(LoRALinear(torch.nn.Linear(2, 2), *(torch.nn.Parameter(torch.ones(1, 2)),) * 2, 1.0).bias,
                      torch.Tensor)  # fmt: skip
