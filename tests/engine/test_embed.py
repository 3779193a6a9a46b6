"""Pooling and batching of embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from soma.base.errors import UserError
from soma.engine import embed
from soma.engine.embed import Embedder, batches, read_pooling
from soma.engine.errors import QueueFullError, RequestError
from soma.model.hub import load_model

PROMPTS = [[5, 6, 7], [9], list(range(4, 90)), [8, 7]]


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_vectors_are_those_of_each_text_alone(tiny_folder: Path, pooling: str) -> None:
    model = load_model(tiny_folder)
    embedder = Embedder(model, tiny_folder)
    assert embedder.pooling == "last"
    embedder.pooling = pooling
    made = embedder.embed(PROMPTS)
    for vector, ids in zip(made, PROMPTS, strict=True):
        with torch.no_grad():
            x_TD = model.features(torch.tensor([ids]))[0][0]
        wanted = {"last": x_TD[-1], "mean": x_TD.mean(0), "first": x_TD[0]}[pooling]
        assert np.allclose(vector, (wanted / wanted.norm()).numpy(), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    embedder.close()


def test_batches() -> None:
    assert batches([3000, 10, 2000]) == [[1, 2], [0]]
    assert batches([9000]) == [[0]]
    made = batches([7] * 2000)
    assert sorted(place for batch in made for place in batch) == list(range(2000))
    assert max(map(len, made)) * 7 <= embed.BATCH_TOKENS


def test_a_folder_says_how_to_pool(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, "mean") == "mean"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"word_embedding_dimension": 4, "pooling_mode_cls_token": True,
                                "pooling_mode_mean_tokens": False}))  # fmt: skip
    assert read_pooling(tmp_path, "mean") == "first"
    for wrong in ({}, {"pooling_mode_max_tokens": True},
                  {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}):  # fmt: skip
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="pooling"):
            read_pooling(tmp_path, "mean")


def test_limits(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(load_model(tiny_folder), tiny_folder, max_length=10)
    for bad in ([], [5] * 11, [-1], [5000]):
        with pytest.raises(RequestError) as caught:
            embedder.submit([[5], bad])
        assert caught.value.param == "input"
    monkeypatch.setattr(embed, "MAX_WAITING", 0)
    with pytest.raises(QueueFullError):
        embedder.submit([[5]])
    embedder.close()
