"""Training low-rank updates: what is learned, what stays, what others make of the folders, rounded bases, resuming."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soma.base.artefact import content_hash, file_hash, read_json
from soma.base.errors import UserError
from soma.model.hub import load_model, save_model
from soma.model.lora import add_lora, load_lora, lora_layers
from soma.model.lora_config import LoRAConfig
from soma.model.quantized import QuantizedLinear
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig, TuneConfig
from soma.train.loop import Trainer
from soma.train.objective import Preference
from soma.train.stamps import stamp
from soma.train.trainer import TrainResult, train
from tests.train.parity import make_pairs
from tests.train.pool import Pool

Run = Callable[..., TrainResult]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def base(tmp_path: Path, shape: Any, tokenizer: Path) -> Path:
    even = shape.model_copy(update={"vocab_size": shape.vocab_size + 1})  # two ranks can divide it
    save_model(Transformer(even, dtype=torch.float32), tmp_path / "base", tokenizer_dir=tokenizer)
    return tmp_path / "base"


def settings(small: dict, **changes: Any) -> dict[str, Any]:
    return (
        small
        | {"steps": 30, "sequence_length": 64, "learning_rate": 2e-2, "optimizer": "adamw", "lora": LORA}
        | changes
    )


def logits(model: torch.nn.Module, vocabulary: int) -> torch.Tensor:
    ids = torch.arange(vocabulary)[None, :24]
    with torch.no_grad():
        return model.eval()(ids)


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_an_adapter_and_a_merged_model(run: Run, small: dict, chats: Path, base: Path, weights: str) -> None:
    before = content_hash(base)
    first = run("none", TuneConfig(**settings(small, steps=1, learning_rate=1e-9, warmup=0)), tokens=chats, model=base)
    lora = LORA | {"base_weights": weights}
    tuned = run("tuned", TuneConfig(**settings(small, lora=lora)), tokens=chats, model=base)
    assert tuned.loss < first.loss - 0.3
    assert content_hash(base) == before
    adapter = tuned.model.parent / "adapter"
    saved = read_json(adapter / "adapter_config.json")
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert "base_weights" not in saved
    beside = load_model(base)
    load_lora(beside, adapter)
    merged = load_model(tuned.model)
    vocabulary = merged.config.vocab_size
    torch.testing.assert_close(logits(beside, vocabulary), logits(merged, vocabulary), atol=1e-4, rtol=1e-4)
    plain = dict(load_model(base).named_parameters())
    changed = {name for name, weight in merged.named_parameters() if not torch.equal(weight, plain[name])}
    assert changed
    assert all(name.split(".")[-2] in LORA["target_modules"] for name in changed)


def test_peft_reads_what_was_trained(run: Run, small: dict, chats: Path, base: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tuned = run("tuned", TuneConfig(**settings(small)), tokens=chats, model=base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tuned.model.parent / "adapter").eval()
    ours = load_model(tuned.model)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids), atol=1e-4, rtol=1e-4)


def test_resuming_gives_the_same_bytes(
    run: Run, small: dict, chats: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lora = LORA | {"lora_dropout": 0.3}
    config = TuneConfig(**settings(small, steps=8, checkpoint_every=4, lora=lora))
    whole = run("whole", config, tokens=chats, model=base)
    step = Trainer.train_step

    def dies(self: Trainer) -> None:
        if self.at.done == 6:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run("broken", config, tokens=chats, model=base)
    monkeypatch.setattr(Trainer, "train_step", step)
    again = run("broken", config, tokens=chats, model=base)
    assert content_hash(again.model.parent / "adapter") == content_hash(whole.model.parent / "adapter")
    assert content_hash(again.model) == content_hash(whole.model)


def test_what_does_not_go_together(run: Run, small: dict, tokens: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="lora and optimizer muon exclude each other"):
        TrainConfig(lora=LORA, optimizer="muon")
    with pytest.raises(ValueError, match="rank"):
        TrainConfig(lora={"rank": 3})
    with pytest.raises(UserError, match="selects no linear layer"):
        run("none", TrainConfig(**settings(small, lora={"target_modules": ["nothing"]})), model=base)


def test_preferences_too(run: Run, small: dict, pairs: Path, base: Path) -> None:
    config = PreferenceConfig(**settings(small, steps=10, learning_rate=1e-3, beta=0.5))
    tuned = run("dpo", config, tokens=pairs, model=base)
    assert tuned.loss < 0.6931
    assert (tuned.model.parent / "adapter" / "adapter_model.safetensors").exists()


def held_bytes(known: list[Transformer]) -> int:
    """Bytes of the parameters of all models that are there beside the known ones, each memory once."""
    found = [model for model in gc.get_objects() if type(model) is Transformer]
    parameters = [p for model in found if not any(model is one for one in known) for p in model.parameters()]
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters if not p.is_meta}
    return sum(memory.values())


@pytest.mark.parametrize(("lora", "copies"), [(None, 2), (LORA, 1)])
def test_preferences_hold_frozen_weights_once(
    run: Run, small: dict, pairs: Path, base: Path, monkeypatch: pytest.MonkeyPatch, lora: Any, copies: int
) -> None:
    """The reference model is what lies below the updates."""
    step, seen = Trainer.train_step, []

    def looks(self: Trainer) -> None:
        seen.append((held_bytes(known), sum(p.nbytes for p in self.model.parameters())))
        step(self)

    gc.collect()
    known = [model for model in gc.get_objects() if type(model) is Transformer]
    monkeypatch.setattr(Trainer, "train_step", looks)
    run("dpo", PreferenceConfig(**settings(small, steps=2, warmup=0, lora=lora)), tokens=pairs, model=base)
    assert seen == [(copies * seen[0][1], seen[0][1])] * 2


def test_the_reference_is_what_lies_below_the_updates(shape: Any) -> None:
    """The same loss and gradients, to the bit, as with the plain model as a copy; dropout leaves it alone."""
    config = PreferenceConfig(steps=1, batch_size=16, sequence_length=32)
    model = Transformer(shape, dtype=torch.float32).train()
    plain = copy.deepcopy(model)
    add_lora(model, LoRAConfig(r=4, lora_dropout=0.5))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    part = (stamp(make_pairs(1), 0, 0, 0), slice(0, 4))
    found = []
    for reference in (plain, None):
        objective = Preference(model, reference, config, Compute(torch.device("cpu"), "fp32", False))
        total = objective.backward(part, torch.ones(()), torch.ones(()))
        found.append([total, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert model.training
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert abs(found[0][0] / 4 - 0.6931) > 0.01  # the updates make a difference


def train_rank(rank: int, world_size: int, job: dict[str, Any]) -> None:
    config = TuneConfig(**job["config"])
    train(config, job["out"], job["work"], tokens=job["tokens"], tokenizer=job["tokenizer"], model=job["model"])


@pytest.mark.parametrize(
    ("layout", "weights"), [({"tp": 2, "sp": True}, "full"), ({"fsdp": 2}, "int4"), ({"pp": 2}, "full")]
)
def test_on_two_ranks(
    run: Run, pool: Pool, small: dict, chats: Path, base: Path, tokenizer: Path, tmp_path: Path,
    layout: dict[str, Any], weights: str,
) -> None:  # fmt: skip
    """The adapter and the merged model of one process come out of any layout."""
    changes = {"steps": 6, "learning_rate": 1e-3, "lora": LORA | {"base_weights": weights}}
    one = run("one", TuneConfig(**settings(small, **changes)), tokens=chats, model=base).model.parent
    out = tmp_path / "two"
    out.mkdir()
    job = {"config": settings(small, **changes, layout=layout), "out": out, "work": tmp_path / "work",
           "tokens": chats, "tokenizer": tokenizer, "model": base}  # fmt: skip
    pool.run(train_rank, 2, job)
    assert file_hash(out / "adapter" / "adapter_config.json") == file_hash(one / "adapter" / "adapter_config.json")
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(out / name), load_file(one / name)
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            torch.testing.assert_close(ours[tensor], value, atol=2e-5, rtol=1e-3)
    trained = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for value in trained.values())


def test_rounded_weights_need_a_model_to_start_from(run: Run, small: dict) -> None:
    with pytest.raises(UserError, match=r"lora.base_weights int4: a model from scratch has no weights worth rounding"):
        run("none", TrainConfig(**settings(small, lora=LORA | {"base_weights": "int4"})))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_piece_of_a_rounded_layer(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    whole = QuantizedLinear.from_weight(weight, bits).dequantize()
    rows, columns = (QuantizedLinear.from_weight(weight, bits) for _ in range(2))
    rows.keep(0, 10, 20)
    columns.keep(1, 32, 64)
    assert torch.equal(rows.dequantize(), whole[10:30])
    assert torch.equal(columns.dequantize(), whole[:, 32:])
    with pytest.raises(UserError, match="96 inputs of a layer rounded in groups of 32 cannot be cut into pieces of 48"):
        QuantizedLinear.from_weight(weight, bits).keep(1, 0, 48)
