"""BERT encoders, held to transformers' outputs with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from soma.base.errors import UserError
from soma.model.encoder import is_encoder, load_encoder

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "tanh": {"hidden_act": "gelu_new"}, "relu": {"hidden_act": "relu", "layer_norm_eps": 1e-5},
}  # fmt: skip


def reference(directory: Path, kind: Any = transformers.BertModel, **changes: Any) -> Any:
    """transformers' encoder with weights wide enough that a mistake shows, saved in `directory`."""
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.2 * noise if name.endswith("LayerNorm.weight") else 0.2 * noise)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    oracle = reference(tmp_path, **CASES[name])
    assert is_encoder(tmp_path)
    model = load_encoder(tmp_path)
    tokens_BT = torch.randint(0, 131, (3, 40))
    lengths = torch.tensor([40, 7, 1])
    keep_BT = torch.arange(40) < lengths[:, None]
    with torch.no_grad():
        for keep in (None, keep_BT):
            wanted = oracle(tokens_BT, attention_mask=keep).last_hidden_state
            made = model(tokens_BT, keep)
            for row, length in enumerate([40, 40, 40] if keep is None else lengths.tolist()):
                assert torch.allclose(made[row, :length], wanted[row, :length], atol=1e-4)
        alone = model(tokens_BT[1:2, :7])
        assert torch.allclose(model(tokens_BT, keep_BT)[1, :7], alone[0], atol=1e-4)  # padding changes nothing
        assert not torch.allclose(model(tokens_BT)[1, :7], alone[0], atol=1e-2)  # but what is not masked does


def test_folders_with_heads(tmp_path: Path) -> None:
    """`BertForMaskedLM` puts `bert.` before the names and has tensors that embeddings do not need."""
    oracle = reference(tmp_path, transformers.BertForMaskedLM)
    tokens_BT = torch.randint(0, 131, (1, 9))
    with torch.no_grad():
        assert torch.allclose(load_encoder(tmp_path)(tokens_BT), oracle.bert(tokens_BT).last_hidden_state, atol=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    oracle = reference(tmp_path)
    tokens_BT = torch.randint(0, 131, (2, 9))
    with torch.no_grad():
        made = load_encoder(tmp_path, torch.bfloat16)(tokens_BT)
        assert made.dtype == torch.bfloat16
        assert torch.allclose(made.float(), oracle(tokens_BT).last_hidden_state, atol=0.1)


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    assert not is_encoder(tmp_path)
    reference(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, tensors = json.loads(config.read_text()), load_file(weights)
    for change, word in (
        ({"hidden_act": "swish"}, "hidden_act"), ({"num_attention_heads": 5}, "not a multiple"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"), ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 0}, "hidden_size"), ({"intermediate_size": 90}, "has shape"),
    ):  # fmt: skip
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=word):
            load_encoder(tmp_path)
    config.write_text(json.dumps(good))
    save_file({name: value for name, value in tensors.items() if "layer.1." not in name}, weights)
    with pytest.raises(UserError, match="16 tensors are missing"):
        load_encoder(tmp_path)
    save_file({**tensors, "encoder.extra": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="1 tensors that this encoder has not"):
        load_encoder(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights there"):
        load_encoder(tmp_path)
