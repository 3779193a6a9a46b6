"""Small data for the training tests, made here: a byte-level tokenizer, text that can be learned, chat pairs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers

from soma.data.tokens import SplitWriter, write_index
from soma.model.config import ModelConfig
from soma.model.tokenizer import Tokenizer
from soma.train import loop
from soma.train.config import TrainConfig
from soma.train.trainer import TrainResult, train
from tests.train.pool import Pool

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these models are too small for more, and threads that spin disturb each other


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for tests on several ranks; they live through the session."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the 256 bytes and three special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Killed(Exception):  # noqa: N818
    """Stands for a kill in the same process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Training ends with `Killed` when so many steps are done."""
    true_step = loop.Trainer.train_step

    def step(trainer: loop.Trainer) -> None:
        if trainer.at.done == steps:
            raise Killed
        true_step(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", step)


def sentences(count: int, seed: int) -> list[str]:
    """Texts of a tiny language, of unequal lengths."""
    random = np.random.default_rng(seed)
    words = ["red", "blue", "fish", "swims", "slowly", "a", "the", "bird", "sings"]
    return [" ".join(random.choice(words, random.integers(3, 30))) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Token shards of plain text."""
    folder, runtime = tmp_path_factory.mktemp("tokens"), Tokenizer.load(tokenizer)
    splits = {}
    for split, count, seed in (("train", 300, 0), ("validation", 30, 1)):
        with SplitWriter(folder, split, runtime.vocab_size, masked=False) as writer:
            for text in sentences(count, seed):
                writer.add([*runtime.encode(text), runtime.eos_ids[0]], text_bytes=len(text))
        splits[split] = writer.entry()
    write_index(folder, runtime.vocab_size, runtime.hash, runtime.eos_ids[0], masked=False, splits=splits)
    return folder


def question(number: int) -> tuple[str, str]:
    """A question and its answer, of unequal lengths."""
    return f"say {number}", ("yes " * (number % 7 + 1)).strip()


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Masked shards of conversations."""
    folder, runtime = tmp_path_factory.mktemp("chats"), Tokenizer.load(tokenizer)
    splits = {}
    for split, numbers in (("train", range(120)), ("validation", range(120, 140))):
        with SplitWriter(folder, split, runtime.vocab_size, masked=True) as writer:
            for number in numbers:
                asked, answer = question(number)
                ids, mask = runtime.encode_chat_masked(
                    [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                )
                writer.add(ids, mask)
        splits[split] = writer.entry()
    write_index(folder, runtime.vocab_size, runtime.hash, runtime.eos_ids[0], masked=True, splits=splits)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Preference pairs: "good" is chosen, "bad" rejected."""
    folder, runtime = tmp_path_factory.mktemp("pairs"), Tokenizer.load(tokenizer)
    splits: dict[str, Any] = {}
    for split, numbers in (("train", range(60)), ("validation", range(60, 70))):
        for side, answer in (("chosen", "good"), ("rejected", "bad")):
            with SplitWriter(folder, f"{split}.{side}", runtime.vocab_size, masked=True) as writer:
                for number in numbers:
                    messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]
                    writer.add(*runtime.encode_chat_masked(messages))
            splits[f"{split}.{side}"] = writer.entry()
    write_index(folder, runtime.vocab_size, runtime.hash, runtime.eos_ids[0], masked=True, splits=splits)
    return folder


@pytest.fixture(scope="session")
def shape(tokenizer: Path) -> ModelConfig:
    """A Llama that trains in a second."""
    return ModelConfig(
        family="llama", vocab_size=Tokenizer.load(tokenizer).vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip


SMALL: dict[str, Any] = {
    "steps": 12, "sequence_length": 32, "batch_size": 4, "precision": "fp32", "compile": False, "device": "cpu",
    "warmup": 2, "log_every": 1, "evaluate_batches": 2, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture
def small() -> dict[str, Any]:
    """Settings of a run of a second or two."""
    return dict(SMALL)


@pytest.fixture
def run(tmp_path: Path, tokens: Path, tokenizer: Path, shape: ModelConfig) -> Callable[..., TrainResult]:
    """`run("a", TrainConfig(…), …)`: train into tmp_path/a, with tmp_path/a-work."""

    def call(name: str, config: TrainConfig, **changes: Any) -> TrainResult:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        arguments = {"tokens": tokens, "tokenizer": tokenizer, "model": shape, **changes}
        return train(config, out, arguments.pop("work", tmp_path / f"{name}-work"), **arguments)

    return call
