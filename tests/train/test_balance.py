"""The router bias of DeepSeek-V3: experts become balanced, and a resumed run is the same run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soma.base.artefact import content_hash
from soma.model.config import ModelConfig
from soma.model.hub import load_model, save_model
from soma.model.moe import Router
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer
from soma.train.balance import RouterBalance, bias_step
from soma.train.config import TrainConfig, TuneConfig
from soma.train.trainer import TrainResult
from soma.train.world import World

Run = Callable[..., TrainResult]
EXPERTS = 8


@pytest.fixture(scope="module")
def lopsided(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3 whose biases send nearly every token to experts 0 and 1."""
    config = ModelConfig(
        family="deepseek_v3", vocab_size=Tokenizer.load(tokenizer).vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, moe_intermediate_size=16, num_experts=EXPERTS,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=256,
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    model = Transformer(config, dtype=torch.float32)
    routers(model)[0].e_score_correction_bias[:2] += 0.1
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    save_model(model, folder, tokenizer_dir=tokenizer)
    return folder


def routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def imbalance(folder: Path, tokens: torch.Tensor) -> float:
    """The largest load over the mean, of the text of the training tests: 1 is balanced, 4 is two experts for all."""
    model = load_model(folder).train()
    balance = RouterBalance(model, 1.0, World())
    model(tokens)
    load_E = balance.routers[0].load
    assert load_E is not None
    assert int(load_E.sum()) == 2 * tokens.numel()
    return float(load_E.max() / load_E.double().mean())


@pytest.fixture(scope="module")
def text_ids(tokenizer: Path) -> torch.Tensor:
    ids = Tokenizer.load(tokenizer).encode("the red fish swims slowly. a blue bird sings the red bird. " * 4)
    return torch.tensor([ids[:200]])


def test_worked_number() -> None:
    assert bias_step(torch.tensor([6, 2, 4, 4]), 1e-3).tolist() == pytest.approx([-1e-3, 1e-3, 0, 0])


def test_experts_become_balanced(run: Run, small: dict, lopsided: Path, text_ids: torch.Tensor) -> None:
    settings = small | {"steps": 80, "learning_rate": 1e-4, "sequence_length": 64}
    before = imbalance(lopsided, text_ids)
    still = imbalance(run("still", TrainConfig(**settings, router_bias_rate=0), model=lopsided).model, text_ids)
    after = imbalance(run("moved", TrainConfig(**settings, router_bias_rate=2e-3), model=lopsided).model, text_ids)
    assert before > 3.5
    assert still > 3.5  # the control: nothing else balances them
    assert after < 2.0


def test_the_bias_moves_by_its_rate(run: Run, small: dict, lopsided: Path) -> None:
    result = run("one", TrainConfig(**small | {"steps": 1, "warmup": 0}), model=lopsided)
    moved = routers(load_model(result.model))[0].e_score_correction_bias
    moved = moved - routers(load_model(lopsided))[0].e_score_correction_bias
    assert moved[:2].tolist() == pytest.approx([-1e-3, -1e-3], abs=1e-8)
    assert (moved[2:].abs() < 1.0001e-3).all()


def test_tuning_leaves_it(run: Run, small: dict, lopsided: Path, chats: Path) -> None:
    result = run("tuned", TuneConfig(**small | {"steps": 2, "sequence_length": 64}), tokens=chats, model=lopsided)
    assert torch.equal(
        routers(load_model(result.model))[0].e_score_correction_bias,
        routers(load_model(lopsided))[0].e_score_correction_bias,
    )


def test_microbatches_count_as_one_batch(run: Run, small: dict, lopsided: Path) -> None:
    biases = [
        routers(load_model(run(name, TrainConfig(**small, **changes), model=lopsided).model))[0].e_score_correction_bias
        for name, changes in (("a", {}), ("b", {"microbatch_size": 1}), ("c", {"activation_checkpointing": True}))
    ]
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])


def test_padding_does_not_count(lopsided: Path, text_ids: torch.Tensor) -> None:
    model = load_model(lopsided).train()
    balance = RouterBalance(model, 1.0, World())
    documents = torch.zeros_like(text_ids)
    documents[:, 50:] = -1
    model(text_ids, document_ids_BT=documents)
    assert int(balance.routers[0].load.sum()) == 2 * 50  # type: ignore[union-attr]


def test_resumed_run_is_the_same(run: Run, small: dict, lopsided: Path, tmp_path: Path) -> None:
    settings = small | {"checkpoint_every": 5}
    whole = run("a", TrainConfig(**settings), model=lopsided)
    newest = tmp_path / "a-work" / "checkpoints" / "step-00000010"
    assert json.loads((newest / "manifest.json").read_text())
    (tmp_path / "a-work" / "metrics.jsonl").touch()
    again = run("b", TrainConfig(**settings), model=lopsided, work=tmp_path / "a-work")  # goes on at step 10
    assert content_hash(again.model) == content_hash(whole.model)
