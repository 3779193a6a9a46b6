"""A Transformer that trains through FlashAttention gives the loss and gradients of the one with dense masks."""

import pytest
import torch

pytest.importorskip("triton")

from soma.model import transformer
from soma.model.config import ModelConfig
from soma.model.kernels import packed, reference
from soma.model.kernels.launch import INTERPRETED
from soma.model.transformer import Transformer
from soma.train.recompute import recompute_layers

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the trainer itself takes this path")
IDS = torch.tensor([[0] * 9 + [1] * 20 + [2], [5] * 12 + [6] * 11 + [-1] * 7])


def run(model: Transformer, document_ids: torch.Tensor | None) -> list[torch.Tensor]:
    """Features (padding left out) and all gradients of a fixed projection of them."""
    model.zero_grad()
    tokens = torch.arange(60).view(2, 30) % 50
    features, _ = model.features(tokens, document_ids_BT=document_ids)
    if document_ids is not None:
        features = features * (document_ids >= 0)[..., None]
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("document_ids", [IDS], ids=["packed"])
def test_same_features_and_gradients(
    monkeypatch: pytest.MonkeyPatch, document_ids: torch.Tensor | None, window: int | None, checkpointing: bool
) -> None:
    family = "llama" if window is None else "mistral"
    model = Transformer(ModelConfig(
        family=family, vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, sliding_window=window,
    ))  # fmt: skip
    dense = run(model, document_ids)
    calls = []
    monkeypatch.setattr(transformer, "flash_supports", lambda *words: True)
    flash = packed.flash_attention
    monkeypatch.setattr(packed, "flash_attention", lambda *a, **k: calls.append(1) or flash(*a, **k))
    recompute_layers(model, checkpointing)
    ours = run(model, document_ids)
    assert calls
    for a, b in zip(ours, dense, strict=True):
        assert reference.relative_error(a, b) < 1e-5
    if document_ids is not None:  # without the documents the result is another one
        assert not torch.allclose(run(model, None)[0], dense[0], atol=1e-3)


def test_starts_of_documents() -> None:
    starts, longest = packed.pack(torch.zeros(2, 30), IDS)
    assert starts.tolist() == [0, 9, 29, 30, 42, 53, 60, 60, 60]  # six runs, padded to eight
    assert longest == 30
    assert packed.pack(torch.zeros(3, 5), None).starts.tolist() == [0, 5, 10, 15]
