"""Tokenizers as others write them: the ids of their reference implementations on every shared file, and on small ones
that the tests make.

`SHARED` lists all 31 shared files and what each is held to; a file that is absent is skipped by name.
"""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from soma.base.errors import UserError
from soma.model import tokenizer_files
from soma.model.tokenizer import Tokenizer

VECTORS = "llamacpp_vectors/ggml-vocab-{}.gguf.inp"
NO_VOCABULARY = "its vocabulary is not among the shared files: nothing here can be held to it"
# file → (reference, further argument). "vectors": llama.cpp's expected ids; the .out file goes with its .inp.
SHARED: dict[str, tuple[str, str]] = {
    "gpt2/encoder.json": ("vectors", "gpt-2"), "gpt2/vocab.bpe": ("with", "gpt2/encoder.json"),
    "gpt2/gpt2.tiktoken": ("tiktoken", "gpt-2"), "whisper/multilingual.tiktoken": ("tiktoken", ""),
    "llama2/tokenizer.model": ("sentencepiece", "llama-spm"), "llama2/tokenizer.json": ("vectors", "llama-spm"),
    "mistral/tokenizer.model.v1": ("sentencepiece", ""),
    "mistral/mistral_instruct_tokenizer_240323.model.v3": ("sentencepiece", ""),
    "bert/google_uncased_en_vocab.txt": ("bert", "bert-bge"), "bert/google_cased_en_vocab.txt": ("bert", ""),
    "gptneox/tokenizer.json": ("transformers", ""), "sentencepiece/test_model.model": ("sentencepiece", ""),
    "sentencepiece/test_ja_model.model": ("sentencepiece", ""),
    "sentencepiece/botchan.txt": ("text", ""), "minbpe/taylorswift.txt": ("text", ""),
    VECTORS.format("bert-bge"): ("with", "bert/google_uncased_en_vocab.txt"),
    VECTORS.format("gpt-2"): ("with", "gpt2/encoder.json"),
    VECTORS.format("llama-spm"): ("with", "llama2/tokenizer.model"),
    VECTORS.format("phi-3"): ("vectors", "phi-3"), VECTORS.format("falcon"): ("none", ""),
    VECTORS.format("llama-bpe"): ("none", ""), VECTORS.format("qwen2"): ("none", ""),
    VECTORS.format("starcoder"): ("none", ""),
}  # fmt: skip
Shared = Callable[[str], Path]


def test_every_shared_file_is_in_the_list(shared_data: Shared) -> None:
    root = shared_data("tokenizers")
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".md"}
    listed = set(SHARED) | {name.replace(".inp", ".out") for name in SHARED if name.endswith(".inp")}
    assert listed == there
    assert len(there) == 31


def vectors(shared_data: Shared, name: str) -> list[tuple[str, list[int]]]:
    path = shared_data(f"tokenizers/{VECTORS.format(name)}")
    texts = path.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    rows = [[int(id) for id in row.split()] for row in path.with_suffix(".out").read_text().split("\n")]
    return list(zip(texts, rows, strict=True))


def texts(shared_data: Shared, scripts_too: bool = True) -> list[str]:
    """The vectors' texts, lines of the two shared books, and made ones of runs and of many scripts."""
    dice = random.Random(0)
    scripts = [range(32, 127), range(160, 0x500), range(0x4E00, 0x9000), [10, 32], range(0x1F600, 0x1F640)]
    made = ["".join(chr(dice.choice(dice.choice(scripts))) for _ in range(40)) for _ in range(60 * scripts_too)]
    runs = ["".join(dice.choice("aab ") for _ in range(30)) for _ in range(60)]
    books = [
        shared_data(f"tokenizers/{name}").read_text()
        for name in ("sentencepiece/botchan.txt", "minbpe/taylorswift.txt")
    ]
    return [*(text for text, _ in vectors(shared_data, "gpt-2")), *made, *runs,
            *(line for book in books for line in book[:8_000].split("\n"))]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shared_file(name: str, shared_data: Shared) -> None:
    reference, argument = SHARED[name]
    path = shared_data(f"tokenizers/{name}")
    if reference == "none":
        pytest.skip(f"{name}: {NO_VOCABULARY}")
    if reference == "with":
        assert SHARED[argument][0] not in ("with", "none"), f"{name} is checked with {argument}"
        return
    if reference == "text":
        assert any(text in path.read_text() for text in texts(shared_data) if len(text) > 40), "one of the texts"
        return
    if name.endswith("phi-3.gguf.inp"):
        path = shared_data("tokenizers/llama2/tokenizer.model")  # Phi-3 has Llama 2's vocabulary
    ours = Tokenizer.load(path.parent if name == "gpt2/encoder.json" else path)
    if argument:
        for text, ids in vectors(shared_data, argument):
            assert ours.encode(text) == ids, text
    if reference == "tiktoken":
        ranks = load_tiktoken_bpe(str(path))
        theirs = tiktoken.Encoding("x", pat_str=tokenizer_files.GPT2, mergeable_ranks=ranks, special_tokens={})
        for text in texts(shared_data):
            assert ours.encode(text) == theirs.encode_ordinary(text), text
            assert ours.decode(ours.encode(text)) == text
    elif reference == "sentencepiece":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for text in texts(shared_data):
            found, wanted = ours.encode(text), pieces.encode(text)
            if found != wanted:  # equal scores, told apart by rounding: double here, single precision there
                assert name == "sentencepiece/test_ja_model.model", text
                scores = [sum(pieces.get_score(id) for id in ids) for ids in (found, wanted)]
                assert sorted(found) == sorted(wanted)
                assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    elif reference in ("bert", "transformers"):
        # Google's BERT knows fewer combining marks than Unicode has today: no made mixture of scripts for it.
        for text, ids in their_ids(reference, path, texts(shared_data, reference != "bert")):
            assert ours.encode(text) == ids, text


def their_ids(reference: str, path: Path, every: list[str]) -> list[tuple[str, list[int]]]:
    if reference == "bert":
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

        bert = BertTokenizerLegacy(str(path), do_lower_case="uncased" in path.name)
        return [(text, bert.encode(text, add_special_tokens=False)) for text in every]
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
    return [(text, fast.encode(text, add_special_tokens=False)) for text in every]


# --- The same on files that the tests make ---


def small_ranks() -> dict[bytes, int]:
    """A vocabulary with a token that can be cut in several ways ("aaa", "abab")."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"aa", b"ab", b"aaa", b"ba", b"abab", b" a", b"aba", "é".encode(), "日".encode(), b"  ", b"ing"]
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def test_tiktoken_file(tmp_path: Path) -> None:
    path = write_tiktoken(tmp_path / "cl100k_base.tiktoken", small_ranks())
    ours = Tokenizer.load(path)
    theirs = tiktoken.Encoding(
        "x", pat_str=tokenizer_files.CL100K, mergeable_ranks=small_ranks(), special_tokens={"<|endoftext|>": 100257}
    )
    dice = random.Random(1)
    for _ in range(300):
        text = "".join(dice.choice("aaabb  é日1\ning'sS") for _ in range(25))
        assert ours.encode(text) == theirs.encode_ordinary(text), text
    assert ours.encode("a<|endoftext|>") == theirs.encode("a<|endoftext|>", allowed_special="all") == [97, 100257]
    assert (ours.eos_ids, ours.vocab_size) == ((100257,), 100258)


def test_tiktoken_names_and_patterns(tmp_path: Path) -> None:
    path = write_tiktoken(tmp_path / "mine.tiktoken", small_ranks())
    with pytest.raises(UserError, match="no split pattern and its name is not one of gpt2"):
        Tokenizer.load(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pattern": r"\s|\S+"}))
    theirs = tiktoken.Encoding("x", pat_str=r"\s|\S+", mergeable_ranks=small_ranks(), special_tokens={})
    assert Tokenizer.load(tmp_path).encode("aaab abab ing") == theirs.encode_ordinary("aaab abab ing")
    path.write_text("YQ== 0\nno base64 here\n")
    with pytest.raises(UserError, match=r"mine.tiktoken:2: expected the base64"):
        Tokenizer.load(path)


def test_wordpiece_vocabulary(tmp_path: Path) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "quick",
        "##ly",
        "un",
        "##able",
        "##s",
        ".",
        "a",
        "##b",
        "日",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    ours, theirs = Tokenizer.load(tmp_path), BertTokenizerLegacy(str(path), do_lower_case=True)
    for text in ["The Quickly unables.", "ab abb zzz 日本 a\u0301b", "", " \t\n", "a" * 120]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.inner.encode(text).ids == theirs.encode(text)
    path.write_text("\n".join([*words, "The"]))
    assert Tokenizer.load(path).encode("The the") == [len(words), 5], "a capital letter: a cased vocabulary"
    path.write_text("the\n")
    with pytest.raises(UserError, match=r"no \[UNK\]"):
        Tokenizer.load(path)


def test_two_files_of_gpt2(tmp_path: Path) -> None:
    characters = tokenizer_files.byte_characters()
    ids = {character: byte for byte, character in enumerate(characters)} | {"ab": 256, "Ġab": 257, "<|endoftext|>": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("ab ab é<|endoftext|>") == [256, 257, 32, 195, 169, 258]
    assert ours.decode([256, 257, 32, 195, 169]) == "ab ab é"
    assert ours.eos_ids == (258,)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match=r"merges.txt:1: expected two pieces"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("x y\n")
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.load(tmp_path)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer there"):
        Tokenizer.load(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="no tokenizer's file"):
        Tokenizer.load(tmp_path / "notes.md")
    for name in ("a_vocab.txt", "b_vocab.txt"):
        (tmp_path / name).write_text("[UNK]\n")
    with pytest.raises(UserError, match="several tokenizers"):
        Tokenizer.load(tmp_path)
