"""The memory of words against the library's ids of whole documents: texts of random parts, every known expression."""

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers, trainers

from soma.data import words
from soma.data.tokens import one_ahead
from soma.data.words import KNOWN, DocumentEncoder, cuts_at_spaces
from soma.model.tokenizer import Tokenizer

PARTS = [
    " ", "  ", "\n", "\r\n", "\t", "\n    ", " a", " The", "the", "Word", "x1", "12345", " 7", "'s", "'LL", " 'd",
    "\u017f", "'\u017f",
    "(", "):", "!!!", " - ", "\u2019s", "é", "e\u0301", "\u0301", " \u0301a", "漢字", "ß", "Ωω", "Жук",
    "\u00a0", "\u0085", "\u2028", "\x1c", "\x1f", "\U0001f600",
    "٣", "<|endoftext|>", "<|im_start|>", "\u3000", "\u200b", "_", "=", "def f", "return ",
]  # fmt: skip


def made(pattern: str | None, normalizer: object = None) -> Tokenizer:
    """A small byte-level BPE tokenizer; without a pattern its merges cross spaces."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "")
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_]) if split else bytes_
    if normalizer is not None:
        inner.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts(1, 200), trainer)
    return Tokenizer(inner, {"eos_token": "<|endoftext|>"})


def texts(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(PARTS, k=chance.randint(0, 40))) for _ in range(count)]


def encoded(runtime: Tokenizer, remembers: bool, rounds: int = 2) -> tuple[list[list[int]], list[list[int]]]:
    """(ids by the encoder, the library's ids of whole documents and the end id) of fresh random texts."""
    encoder = DocumentEncoder(runtime, 0, np.dtype("<u2"))
    encoder.remembers = remembers
    found, expected = [], []
    for _ in range(rounds):
        batch = texts(random.SystemRandom().randrange(1 << 30), 300)
        found += [ids.tolist() for ids in encoder.encode(batch)]
        expected += [[*runtime.encode(text, as_text=True), 0] for text in batch]
    return found, expected


@pytest.mark.parametrize("pattern", ["", *sorted(KNOWN)])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_ids_are_those_of_whole_documents(pattern: str, normalizer: object) -> None:
    runtime = made(pattern, normalizer)
    assert cuts_at_spaces(runtime.plain)
    found, expected = encoded(runtime, remembers=True)
    assert found == expected


def test_merges_across_spaces_are_not_cut() -> None:
    runtime = made(None)
    assert not cuts_at_spaces(runtime.plain)
    found, expected = encoded(runtime, remembers=False)
    assert found == expected
    found, expected = encoded(runtime, remembers=True)
    assert found != expected  # negative control: the memory would give other ids here


def test_a_known_expression_is_not_enough() -> None:
    assert not cuts_at_spaces(made("", normalizers.NFKC()).plain)
    runtime = made("")
    runtime.inner.add_tokens([tokenizers.AddedToken("The word", normalized=False)])
    assert not cuts_at_spaces(runtime.plain)
    spaces = made("")
    spaces.inner.add_tokens([tokenizers.AddedToken("   ", normalized=False), "|||X|||"])
    assert cuts_at_spaces(spaces.plain)
    found, expected = encoded(spaces, remembers=True)
    assert found == expected


def test_a_full_memory_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MEMORY", 50)
    runtime = made("")
    found, expected = encoded(runtime, remembers=True, rounds=4)
    assert found == expected


def test_many_threads_leave_it_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made("")
    for variable, value, remembers in (
        ("RAYON_NUM_THREADS", "1", True), ("RAYON_NUM_THREADS", "16", False), ("TOKENIZERS_PARALLELISM", "false", True)
    ):  # fmt: skip
        monkeypatch.setenv(variable, value)
        assert DocumentEncoder(runtime, 0, np.dtype("<u2")).remembers is remembers


def test_shared_gptneox(shared_data) -> None:  # type: ignore[no-untyped-def]
    runtime = Tokenizer.load(Path(shared_data("tokenizers/gptneox/tokenizer.json")))
    assert cuts_at_spaces(runtime.plain)  # NFC, runs of spaces as added tokens
    found, expected = encoded(runtime, remembers=True)
    assert found == expected
    assert not cuts_at_spaces(Tokenizer.load(Path(shared_data("tokenizers/llama2/tokenizer.json"))).plain)


def test_one_ahead_keeps_the_order_and_raises() -> None:
    assert list(one_ahead(lambda item: item * item, range(5))) == [(item, item * item) for item in range(5)]
    assert list(one_ahead(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(lambda item: 1 // item, [1, 0, 1]))
