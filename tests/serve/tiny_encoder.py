"""A small random BERT folder for tests of retrieval."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer as Inner
from tokenizers import models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?()[]{}<>#&%'\"+-*/=_|>"
SENTENCES = """the river danube ends in black sea a cat sits on mat dogs chase cats gradient descent steps down loss key
limit requests per minute guide install run pip first second third chapter one two three"""
WORDS = SENTENCES.split()


def make_encoder(folder: Path, *, seed: int = 1, width: int = 32) -> Path:
    """Random weights by `seed`; words of `WORDS` and single characters are tokens."""
    singles = sorted(set(LETTERS))
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *singles])]
    names += [f"##{letter}" for letter in singles]
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    inner = Inner(models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    return folder
