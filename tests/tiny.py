"""A tiny Llama folder with a byte-level tokenizer, for tests that need a whole model: `from tiny import make_model`."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from soma.model.config import ModelConfig
from soma.model.hub import save_model
from soma.model.transformer import Transformer

TEXT = "the quick brown fox jumps over the lazy dog. hello world! this is a test of text, naïve and 日本."
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def make_tokenizer(folder: Path, *, chat: bool = True) -> int:
    """Write a byte-level BPE tokenizer of about 400 tokens; its vocabulary size."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([TEXT] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|end|>"}
    if chat:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return int(inner.get_vocab_size())


def make_config(vocab_size: int, **changes: Any) -> ModelConfig:
    """A Llama of two layers whose random weights are large enough that its greedy choices are clear."""
    shape: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 4096, "initializer_range": 0.2,
    }  # fmt: skip
    return ModelConfig(vocab_size=vocab_size, **{**shape, **changes})


def make_model(folder: Path, *, chat: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a model folder and give its path."""
    vocab_size = make_tokenizer(folder / "tokenizer", chat=chat)
    model = Transformer(make_config(vocab_size, **changes), dtype=dtype)
    save_model(model, folder / "tiny", folder / "tokenizer")
    return folder / "tiny"
