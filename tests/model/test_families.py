"""Every family against transformers: logits, greedy tokens, caches, packing, round trips on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, random_tokens, reference

from soma.model.cache import KVCache
from soma.model.hub import load_model, save_model
from soma.train.recompute import recompute_layers

FP32_BOUND = 1e-4  # largest difference of a logit, logits of standard deviation 1.2
BF16_BOUND = 0.04  # root mean square error of bfloat16 logits, in standard deviations of the float32 logits
BF16_BOUND_MOE = 0.12  # the same where rounding may send a token to another expert


@pytest.fixture(scope="module", params=list(CASES))
def case(request: Any, tmp_path_factory: Any) -> tuple[str, Path, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, reference(request.param, directory)


@torch.inference_mode()
def test_logits_equal_transformers(case: Any) -> None:
    _, directory, theirs = case
    tokens_BT = random_tokens(2, 33)
    ours = load_model(directory)
    expected = theirs(tokens_BT).logits
    assert (ours(tokens_BT) - expected).abs().max() <= FP32_BOUND
    # Negative control: the comparison notices a model whose positions are off by one in one place.
    positions_BT = torch.arange(33).expand(2, -1).clone()
    positions_BT[:, 16:] += 1
    assert (ours(tokens_BT, positions_BT) - expected).abs().max() > 100 * FP32_BOUND


@torch.inference_mode()
def test_bfloat16_logits_within_bound(case: Any) -> None:
    name, directory, theirs = case
    tokens_BT = random_tokens(2, 33)
    expected = theirs(tokens_BT).logits
    ours = load_model(directory, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    error = (ours(tokens_BT).float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error <= (BF16_BOUND_MOE if ours.config.num_experts else BF16_BOUND), name


@torch.inference_mode()
def test_greedy_tokens_equal_transformers(case: Any) -> None:
    _, directory, theirs = case
    prompt_BT = random_tokens(1, 9, seed=1)
    expected = theirs.generate(prompt_BT, max_new_tokens=16, do_sample=False)[0, 9:].tolist()
    ours = load_model(directory)
    for model in (ours, load_model(directory).fuse()):
        cache = KVCache(model.config, 1, 25)
        logits_BTV = model(prompt_BT, cache=cache)
        tokens = []
        for _ in range(16):
            token = int(logits_BTV[0, -1].argmax())
            tokens.append(token)
            logits_BTV = model(torch.tensor([[token]]), cache=cache)
        assert tokens == expected


@torch.inference_mode()
def test_chunked_prefill_and_decode_equal_the_full_forward(case: Any) -> None:
    name, directory, _ = case
    model = load_model(directory)
    length = 16 if name == "llama-dynamic" else 24  # past its context, dynamic scaling depends on the length by design
    tokens_BT = random_tokens(2, length, seed=2)
    full_BTV = model(tokens_BT)
    cache = KVCache(model.config, 2, length)
    parts = [model(chunk, cache=cache) for chunk in tokens_BT.split([7, 5, 1, 1, length - 14], dim=1)]
    assert cache.length == length
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, atol=5e-5, rtol=0)
    cache.truncate(10)
    torch.testing.assert_close(model(tokens_BT[:, 10:12], cache=cache), full_BTV[:, 10:12], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_packed_documents_equal_each_alone(case: Any) -> None:
    name, directory, _ = case
    model = load_model(directory)
    lengths = [5, 11, 8]
    tokens_BT = random_tokens(1, 27, seed=3)
    document_ids_BT = torch.tensor([[0] * 5 + [1] * 11 + [2] * 8 + [-1] * 3])
    positions_BT = torch.cat([torch.arange(length) for length in [*lengths, 3]])[None]
    packed_BTV = model(tokens_BT, positions_BT, document_ids_BT)
    start = 0
    for length in lengths:
        alone_BTV = model(tokens_BT[:, start : start + length])
        torch.testing.assert_close(packed_BTV[:, start : start + length], alone_BTV, atol=5e-5, rtol=0)
        start += length
    # Negative control: without document ids the second document sees the first.
    open_BTV = model(tokens_BT, positions_BT)
    assert (open_BTV[:, 5:16] - packed_BTV[:, 5:16]).abs().max() > 1e-2, name


@torch.inference_mode()
def test_saved_folder_loads_in_transformers_and_here(case: Any, tmp_path: Path) -> None:
    import transformers

    _, directory, theirs = case
    tokens_BT = random_tokens(2, 33)
    ours = load_model(directory)
    save_model(ours, tmp_path / "whole")
    save_model(ours, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32).eval()
    assert (back(tokens_BT).logits - theirs(tokens_BT).logits).abs().max() <= 1e-5
    again = load_model(tmp_path / "shards")
    assert again.config == load_model(tmp_path / "whole").config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    save_model(again, tmp_path / "again")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_training_with_checkpointing_gives_the_same_gradients(case: Any) -> None:
    _, directory, _ = case
    model = load_model(directory).train()
    tokens_BT = random_tokens(2, 12)
    gradients = []
    for checkpointing in (False, True):
        recompute_layers(model, checkpointing)
        model.zero_grad()
        x_BTD, aux = model.features(tokens_BT)
        (model.logits(x_BTD).float().logsumexp(-1).mean() + aux).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name
