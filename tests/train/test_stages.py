"""Instruction tuning and preference tuning."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.data.tokens import SplitWriter, write_index
from soma.model.config import ModelConfig
from soma.model.hub import load_model, save_model
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig, TuneConfig
from soma.train.loss import dpo_loss, target_logprobs
from soma.train.objective import Preference, make_loader
from soma.train.parallel.apply import Parallel
from soma.train.samples import continue_texts
from soma.train.trainer import TrainResult
from soma.train.world import ALONE, World

Run = Callable[..., TrainResult]


def test_only_answers_are_learned(run: Run, small: dict, chats: Path, tokenizer: Path) -> None:
    runtime = Tokenizer.load(tokenizer)
    batch = next(make_loader(TuneConfig(**small | {"sequence_length": 64}), World(), chats, "train"))
    for row in range(len(batch.targets)):
        learned = batch.targets[row][batch.targets[row] != loss.IGNORE].tolist()
        text = runtime.decode(learned, skip_special=False)
        assert text.replace("<|im_end|>", "").replace("yes", "").strip() == ""
        assert "yes" in text
        assert "<|im_end|>" in text


def test_tuning_starts_from_a_model_folder(run: Run, small: dict, tokens: Path, chats: Path) -> None:
    base = run("base", TrainConfig(**small))
    tuned = run(
        "tuned", TuneConfig(**small | {"steps": 80, "sequence_length": 64, "sample_prompts": ["say 1"]}),
        tokens=chats, model=base.model,
    )  # fmt: skip
    assert tuned.loss < 1.5
    assert content_hash(tuned.model) != content_hash(base.model)
    untouched = run("still", TuneConfig(**small | {"steps": 1, "learning_rate": 1e-12, "warmup": 0}), tokens=chats,
                    model=base.model)  # fmt: skip
    for (name, a), (_, b) in zip(
        load_model(base.model).named_parameters(), load_model(untouched.model).named_parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-9), name


def test_saved_precision_is_that_of_the_start(run: Run, small: dict, shape: ModelConfig, tmp_path: Path,
                                              tokenizer: Path) -> None:  # fmt: skip
    save_model(Transformer(shape, dtype=torch.bfloat16), tmp_path / "start", tokenizer_dir=tokenizer)
    short = small | {"steps": 2, "warmup": 0}
    assert load_model(run("a", TrainConfig(**short), model=tmp_path / "start").model).dtype == torch.bfloat16
    as_fp32 = run("b", TrainConfig(**short, save_precision="fp32"), model=tmp_path / "start")
    assert load_model(as_fp32.model).dtype == torch.float32


def test_dpo_worked_number() -> None:
    one = lambda value: torch.tensor([value])  # noqa: E731
    losses, margins = dpo_loss(one(-10.0), one(-20.0), one(-12.0), one(-15.0), 0.1)
    assert margins.item() == pytest.approx(0.7)
    assert losses.item() == pytest.approx(0.40319, abs=1e-5)


def test_target_logprobs_is_the_plain_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    targets[0, :2] = loss.IGNORE
    expected = [
        sum(logits[row, t].log_softmax(-1)[targets[row, t]].item() for t in range(5) if targets[row, t] >= 0)
        for row in range(2)
    ]
    found = target_logprobs(logits.flatten(0, 1), targets.flatten()).view(2, 5).sum(1)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_dpo_gradient_is_the_plain_one(shape: ModelConfig, pairs: Path, small: dict) -> None:
    """Against eq. 7 written out with full log-softmaxes."""
    config = PreferenceConfig(**small | {"sequence_length": 64, "warmup": 0})
    model, reference = Transformer(shape, dtype=torch.float32).train(), Transformer(shape, dtype=torch.float32)
    model.init_weights(1)
    reference.init_weights(2)
    objective = Preference(model, reference, config, Compute(torch.device("cpu"), "fp32", False))
    batch = next(make_loader(config, World(), pairs, "train"))
    for part in objective.parts(batch, 2):
        objective.backward(part, torch.tensor(1 / 4), torch.tensor(0.0))
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def logp(network: Transformer, half: object) -> torch.Tensor:
        tensors = [torch.from_numpy(getattr(half, name)) for name in ("tokens", "positions", "document_ids", "targets")]
        log_probs = network(*tensors[:3]).log_softmax(-1)
        kept = tensors[3] != loss.IGNORE
        return (log_probs.gather(2, tensors[3].clamp(min=0)[..., None])[..., 0] * kept).sum(1)

    chosen = logp(model, batch.chosen) - logp(reference, batch.chosen).detach()
    rejected = logp(model, batch.rejected) - logp(reference, batch.rejected).detach()
    (-torch.log(torch.sigmoid(config.beta * (chosen - rejected))).mean()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, found[name], atol=1e-6), name


def test_preference_tuning_prefers(run: Run, small: dict, pairs: Path, tokenizer: Path) -> None:
    base = run("base", TrainConfig(**small))
    config = PreferenceConfig(
        **small | {"steps": 50, "sequence_length": 64, "learning_rate": 1e-3, "evaluate_every": 10}
    )
    result = run("dpo", config, tokens=pairs, model=base.model)
    records = [json.loads(line) for line in (result.model.parent / "logs" / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if record["event"] == "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)  # model and reference are one
    assert result.loss < 0.3
    assert result.validation_loss is not None
    assert result.validation_loss < 0.4


def test_wrong_kind_of_tokens(run: Run, small: dict, pairs: Path) -> None:
    with pytest.raises(UserError, match="this stage needs preference pairs"):
        run("a", PreferenceConfig(**small))
    with pytest.raises(UserError, match="this stage needs text or conversations"):
        run("b", TrainConfig(**small), tokens=pairs)


def test_samples(run: Run, small: dict, tokenizer: Path) -> None:
    model = load_model(run("a", TrainConfig(**small)).model)
    runtime = Tokenizer.load(tokenizer)
    before = torch.get_rng_state()
    alone = Parallel(model, ALONE)
    greedy = [continue_texts(alone, runtime, ["the "], 6, 0.0, seed, model.device)[0] for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    warm = [continue_texts(alone, runtime, ["the ", "the "], 12, 2.0, seed, model.device) for seed in (0, 1, 0)]
    assert warm[0] == warm[2] != warm[1]
    assert warm[0][0] == warm[0][1]
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        ids = runtime.encode("the ")
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy[0] == runtime.decode(ids[4:])


def test_a_tuned_model_ends_at_the_end_of_its_turn(run: Run, small: dict, tokens: Path, chats: Path, tokenizer: Path,
                                                   pairs: Path) -> None:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    end_of_text, im_end = (Tokenizer.load(tokenizer).inner.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    short = small | {"steps": 2, "warmup": 0, "sequence_length": 64}
    base = run("base", TrainConfig(**short))
    assert transformers.GenerationConfig.from_pretrained(base.model).eos_token_id == end_of_text
    tuned = run("tuned", TuneConfig(**short), tokens=chats, model=base.model)
    preferred = run("preferred", PreferenceConfig(**short), tokens=pairs, model=base.model)
    again = run("again", TuneConfig(**short), tokens=chats, model=tuned.model)
    for result in (tuned, preferred, again):
        assert transformers.GenerationConfig.from_pretrained(result.model).eos_token_id == [end_of_text, im_end]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(result.model)
        assert loaded.generation_config.eos_token_id == [end_of_text, im_end]
        assert Tokenizer.load(result.model).eos_ids == (end_of_text, im_end)


def test_long_conversations(run: Run, small: dict, tokenizer: Path, tmp_path: Path) -> None:
    """Two turns of which the second does not fit, and one whose only answer does not fit."""
    runtime, folder = Tokenizer.load(tokenizer), tmp_path / "long"
    folder.mkdir()
    ask = {"role": "user", "content": "a"}
    short, long = ({"role": "assistant", "content": text} for text in ("yes", "n" * 90))
    splits = {}
    for split in ("train", "validation"):
        with SplitWriter(folder, split, runtime.vocab_size, masked=True) as writer:
            for talk in ([ask, short], [ask, short, ask, long], [ask, long]):
                writer.add(*runtime.encode_chat_masked(talk))
        splits[split] = writer.entry()
    write_index(folder, runtime.vocab_size, runtime.hash, runtime.eos_ids[0], masked=True, splits=splits)
    settings = small | {"steps": 1, "warmup": 0, "sequence_length": 64}
    for setting, left_out, truncated in (("drop", 2, 0), ("truncate", 1, 1)):
        config = TuneConfig(**settings, long_conversations=setting)
        facts = json.loads((run(setting, config, tokens=folder).model.parent / "train.json").read_text())
        assert (facts["documents_left_out"], facts["documents_truncated"]) == (left_out, truncated)
        batch = next(make_loader(config, World(), folder, "train", epochs=1))
        learned = runtime.decode(batch.targets[batch.targets != loss.IGNORE].tolist(), skip_special=False)
        assert learned == "yes<|im_end|>" * (1 + truncated)
