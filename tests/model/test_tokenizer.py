"""The tokenizer runtime against transformers, tokenizers and sentencepiece."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner

from soma.base.errors import UserError
from soma.model import sentencepiece_model
from soma.model.tokenizer import Tokenizer

TEXTS = [
    "", " ", "Hello world", "  two  spaces ", "tabs\tand\nnewlines\n\n", "naïve café — “quotes”", "日本語 と 漢字",
    "👨‍👩‍👧‍👦 🦙 ½",
    "def f(x):\n    return x ** 2  # square", "a" * 50, "\u0000\u200d\ufeff", "<|end|> in text",
]  # fmt: skip
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 20, "return self.value\n" * 20] * 4


def byte_level(directory: Path, **settings: Any) -> Path:
    """A small byte-level BPE tokenizer folder."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"],
    )  # fmt: skip
    inner.train_from_iterator(CORPUS, trainer)
    directory.mkdir(exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def piece_file(request: Any, tmp_path_factory: Any) -> Path:
    """A SentencePiece model; BPE with bytes as in Llama, unigram with its normalization."""
    directory = tmp_path_factory.mktemp(request.param)
    options = {"bpe": {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
               "unigram": {"user_defined_symbols": ["[X]"]}}[request.param]  # fmt: skip
    sentences = [text for text in CORPUS if text.strip() and "\0" not in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_type=request.param,
        model_prefix=str(directory / "tokenizer"), vocab_size=380 if request.param == "bpe" else 90,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return directory / "tokenizer.model"


def random_ids(vocab_size: int, rounds: int) -> list[list[int]]:
    dice = random.Random(0)
    return [[dice.randrange(vocab_size if dice.random() < 0.5 else 260) for _ in range(25)] for _ in range(rounds)]


def check_streams(tokenizer: Tokenizer, sequences: list[list[int]]) -> None:
    """Increments join to the whole text and none but the last ends in half a character."""
    for ids in sequences:
        for skip_special in (True, False):
            stream = tokenizer.stream_decoder(skip_special)
            parts = [stream.push(id) for id in ids]
            assert "".join(parts) + stream.flush() == tokenizer.decode(ids, skip_special), ids
            assert not any(part.endswith("\ufffd") for part in parts)


def test_ids_and_text_equal_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.pad_id) == (len(theirs), 0, (1,), None)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=False) == text
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_streams_of_text_and_of_any_ids(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    check_streams(tokenizer, [tokenizer.encode(text) for text in TEXTS] + random_ids(tokenizer.vocab_size, 100))
    turtle = tokenizer.encode("🐢")
    assert len(turtle) > 2
    stream = tokenizer.stream_decoder()
    assert [stream.push(id) for id in turtle] == [""] * (len(turtle) - 1) + ["🐢"]


def test_sentencepiece_ids_equal_the_library(piece_file: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(piece_file))
    ours = Tokenizer.load(piece_file.parent)
    for text in TEXTS:
        if "\u0000" in text:
            continue
        assert ours.encode(text) == theirs.encode(text), text
        known = [id for id in theirs.encode(text) if id != theirs.unk_id()]
        assert ours.decode(known) == theirs.decode(known)
    check_streams(ours, [ours.encode(text) for text in TEXTS] + random_ids(ours.vocab_size, 100))
    assert ours.encode("</s>") == [theirs.piece_to_id("</s>")], "control symbols are taken as such"
    assert theirs.piece_to_id("</s>") not in ours.encode("a</s>b", as_text=True)


@pytest.mark.parametrize(
    "name",
    ["llama2/tokenizer.model", "mistral/tokenizer.model.v1", "mistral/mistral_instruct_tokenizer_240323.model.v3"],
)
def test_real_sentencepiece_models(name: str, shared_data: Callable[[str], Path]) -> None:
    path = shared_data(f"tokenizers/{name}")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer(sentencepiece_model.load(path))
    lines = shared_data("wikitext2/wiki.test.raw").read_text(encoding="utf-8").split("\n")[:300]
    for text in [*lines, *[text for text in TEXTS if text]]:
        assert ours.encode(text) == theirs.encode(text), text
    check_streams(ours, [ours.encode(text) for text in TEXTS] + random_ids(ours.vocab_size, 50))


def test_llama_reference_vectors(shared_data: Callable[[str], Path]) -> None:
    """Texts and ids that llama.cpp keeps for Llama's tokenizer."""
    vectors = shared_data("tokenizers/llamacpp_vectors/ggml-vocab-llama-spm.gguf.inp")
    texts = vectors.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    rows = vectors.with_suffix(".out").read_text().split("\n")
    tokenizer = Tokenizer(sentencepiece_model.load(shared_data("tokenizers/llama2/tokenizer.model")))
    assert len(texts) == len(rows) > 40
    for text, row in zip(texts, rows, strict=True):
        assert tokenizer.encode(text) == [int(id) for id in row.split()], text


def test_gpt2_reference_vectors(shared_data: Callable[[str], Path]) -> None:
    vocabulary = json.loads(shared_data("tokenizers/gpt2/encoder.json").read_text(encoding="utf-8"))
    lines = shared_data("tokenizers/gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    inner = Inner(models.BPE(vocabulary, [tuple(line.split()) for line in lines if line]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Tokenizer(inner)
    text = shared_data("wikitext2/wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    vectors = shared_data("tokenizers/llamacpp_vectors/ggml-vocab-gpt-2.gguf.inp")
    texts = vectors.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    for each, row in zip(texts, vectors.with_suffix(".out").read_text().split("\n"), strict=True):
        assert tokenizer.encode(each) == [int(id) for id in row.split()], each
    check_streams(tokenizer, [ids[:300]])


def test_end_ids_come_from_the_generation_config_too(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert Tokenizer.load(tmp_path).eos_ids == (1, 3)


def test_special_tokens_as_objects_and_tokens_declared_in_the_config(tmp_path: Path) -> None:
    declared = {"400": {"content": "<|tool|>", "special": True}}
    byte_level(tmp_path, eos_token={"content": "<|end|>", "__type": "AddedToken"}, added_tokens_decoder=declared)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.encode("<|tool|>") == [tokenizer.vocab_size - 1]


def test_hash_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = Tokenizer.load(folder).hash
    assert Tokenizer.load(byte_level(tmp_path / "same")).hash == first
    assert Tokenizer.load(byte_level(tmp_path / "template", chat_template="{{ messages }}")).hash != first
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([AddedToken("more")])
    inner.save(str(tmp_path / "same/tokenizer.json"))
    assert Tokenizer.load(tmp_path / "same").hash != first


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer there"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="no pieces"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a valid tokenizer"):
        Tokenizer.load(tmp_path)
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: a JSON object"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        Tokenizer.load(tmp_path / "nowhere")
