"""A small real corpus, tokenizer and model, made once for the tests of this room."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from soma.base import doctor

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCE = "the cat sat on a mat while it rained; naïve 猫 def add(a, b):\n    return a + b\n"


def texts(count: int = 12) -> list[str]:
    """Documents of different lengths, one of them a single character."""
    words = SENTENCE.split(" ")
    return ["x"] + [" ".join(words[(7 * i + j * j) % len(words)] for j in range(3 + 17 * i)) for i in range(1, count)]


@pytest.fixture(scope="session", autouse=True)
def _one_diagnosis() -> Iterator[None]:
    """Every report says what this machine lacks: it is asked once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "diagnose", cache(doctor.diagnose))
        yield


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """The texts of the corpus."""
    return texts()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts(), trainer)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": CHAT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="session")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights large enough that its guesses differ."""
    from soma.model.config import ModelConfig
    from soma.model.hub import save_model
    from soma.model.transformer import Transformer

    config = ModelConfig(
        family="llama", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(Transformer(config), folder, tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with a validation split of two kinds."""
    import hashlib

    from soma.data.corpus import write_parquet

    folder = tmp_path_factory.mktemp("corpus")
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts()):
        rows.append(
            {
                "id": hashlib.sha256(text.encode()).hexdigest()[:32], "text": text, "source": f"file{number}.txt",
                "kind": "py" if number % 3 else "md", "n_bytes": len(text.encode()),
            }
        )  # fmt: skip
    rows.sort(key=lambda row: row["id"])
    write_parquet(folder / "validation-00000.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    (folder / "report.json").write_text(json.dumps({"corpus_hash": "c0ffee", "python": "3.11.9"}))
    return folder
