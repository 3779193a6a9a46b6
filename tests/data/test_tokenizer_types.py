"""Every type of tokenizer: the ids of a plain reference, every text back where that is promised, transformers as the
reader, and tokenizers that are loaded."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Inner

from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.data.config import TokenizerConfig
from soma.data.shards import write_shards
from soma.data.tokenizer import NOT_THE_SAME, SPECIALS, UNKNOWN, cut_long_runs, load_tokenizer, train_tokenizer
from soma.data.tokenizer import build as build_inner
from soma.model.tokenizer import Tokenizer
from soma.stages.data import tokenizer_stage
from soma.stages.stage import Build

TEXTS = [
    "the cat sat on the mat, the cat's hat",
    "the dog sat. The  end\nof\tit all",
    "naïve café the cat",
    "日本語の本 the",
] * 6
STRANGE = ["", " ", "  two\n\nlines\t", "Ünknown 🦙 텍스트 \x00", "<|endoftext|> and <|im_start|>", "a▁b"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    columns: dict[str, list[Any]] = {"id": [f"{number:032x}" for number in range(len(TEXTS))], "text": TEXTS}
    write_shards(out, "train", columns, [len(text) for text in TEXTS])
    return out


def train(corpus: Path, out: Path, **config: Any) -> Tokenizer:
    out.mkdir()
    reason = train_tokenizer(TokenizerConfig(**config), corpus, out)
    assert reason == NOT_THE_SAME.get(config["type"])
    return Tokenizer.load(out)


def ids_of(inner: Inner, tokens: list[str]) -> list[int]:
    unknown = inner.token_to_id(UNKNOWN)
    return [unknown if (id := inner.token_to_id(token)) is None else id for token in tokens]


CASES: dict[str, dict[str, Any]] = {
    "bpe": {"type": "bpe", "vocab_size": 300}, "unigram": {"type": "unigram", "vocab_size": 310},
    "byte": {"type": "byte"}, "char": {"type": "char", "vocab_size": 100, "min_frequency": 1},
    "wordpiece": {"type": "wordpiece", "vocab_size": 90, "lowercase": True},
    "word": {"type": "word", "vocab_size": 60, "min_frequency": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_type_is_read_by_transformers_and_gives_texts_back(kind: str, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = train(corpus, tmp_path / "t", **CASES[kind])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert [ours.token_text(id) for id in range(4)] == SPECIALS
    assert (ours.token_text(4) == UNKNOWN) == (kind in ("word", "char", "wordpiece"))
    for text in [*TEXTS[:4], *STRANGE]:
        ids = ours.encode(text, as_text=True)
        if kind != "unigram" or "<|" not in text:  # there theirs takes a special token's name for its piece
            assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], text
        if kind in ("bpe", "unigram", "byte"):
            assert ours.decode(ids) == (text.replace("▁", " ") if kind == "unigram" else text)
    if kind == "char":
        assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]
    ids, mask = ours.encode_chat_masked(messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=False)
    assert sum(mask) >= 2
    if kind in NOT_THE_SAME:
        return
    train(corpus, tmp_path / "again", **CASES[kind])
    assert content_hash(tmp_path / "again") == content_hash(tmp_path / "t")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_long_runs_are_trained_on_in_pieces(kind: str) -> None:
    """Nothing is lost, texts without long runs are left alone, and 3 MB of one letter do not take hours."""
    runs = [
        "two words " * 1000,
        "b" * 2000,
        f"begin {'a' * 5000} {'c' * 2001} end",
        "x" + " " * 4001 + "y",
        "日" * 6000,
        "",
    ]
    found = [list(cut_long_runs(iter([text]))) for text in runs]
    assert ["".join(pieces) for pieces in found] == runs
    assert [len(pieces) for pieces in found] == [1, 1, 4, 3, 3, 1]
    assert max(len(word) for pieces in found for piece in pieces for word in piece.split()) == 2000
    inner = build_inner(TokenizerConfig(**CASES[kind]), iter([*TEXTS, "a" * 3_000_000]))
    assert len(inner.encode("a" * 1024).ids) < 1024


def test_bytes_are_themselves() -> None:
    inner = build_inner(TokenizerConfig(type="byte"), iter(["x"]))
    for text in [*TEXTS[:4], *STRANGE]:
        plain = Tokenizer(inner)
        assert plain.encode(text, as_text=True) == [byte + 4 for byte in text.encode()]
    assert inner.get_vocab_size() == 260


def test_words_are_those_of_a_plain_count(tmp_path: Path) -> None:
    import re

    def words(text: str, split: str) -> list[str]:
        return text.split() if split == "whitespace" else re.findall(r"\w+|[^\w\s]", text)

    for split, extra in [("whitespace", {}), ("punctuation", {}), ("regex", {"regex": r"\w+|[^\w\s]"})]:
        config = TokenizerConfig(type="word", vocab_size=16, min_frequency=2, split=split, **extra)  # type: ignore[arg-type]
        inner = build_inner(config, iter(TEXTS))
        counts = Counter(word for text in TEXTS for word in words(text, split))
        common = {word for word, count in counts.items() if count >= 2}
        kept = set(inner.get_vocab()) - {*SPECIALS, UNKNOWN}
        assert kept <= common
        assert min(counts[word] for word in kept) >= max((counts[word] for word in common - kept), default=0)
        for text in ["the cat, the\u00a0unheard-of dog.", "  The end \n", ""]:
            assert inner.encode(text).ids == ids_of(inner, words(text, split)), (split, text)
    small = build_inner(TokenizerConfig(type="word", vocab_size=40, min_frequency=1, lowercase=True), iter(TEXTS))
    assert small.encode("THE Café").ids == ids_of(small, ["the", "cafe"])


def test_characters_by_frequency() -> None:
    inner = build_inner(TokenizerConfig(type="char", vocab_size=16, min_frequency=1), iter(TEXTS))
    kept = set(inner.get_vocab()) - {*SPECIALS, UNKNOWN}
    counts = Counter("".join(TEXTS))
    assert len(kept) == 11
    assert min(counts[one] for one in kept) >= max(count for one, count in counts.items() if one not in kept)
    assert inner.encode("the\nz").ids == ids_of(inner, list("the\nz"))


def longest(text: str, entries: set[str]) -> list[str]:
    """Maximal matching, plainly."""
    found = []
    for run in text.split():
        place = 0
        while place < len(run):
            end = next((end for end in range(len(run), place, -1) if run[place:end] in entries), place + 1)
            found.append(run[place:end])
            place = end
    return found


def test_dictionary_takes_the_longest_word(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("日本\n日本語\n語の\nthe\nthem\ncat\nqx\n\n")
    config = TokenizerConfig(type="word", vocab_size=60, split="dictionary", dictionary=str(path), min_frequency=1)
    inner = build_inner(config, iter(TEXTS))
    entries = set(inner.get_vocab()) - {*SPECIALS, UNKNOWN}
    for text in ["日本語の本", "thecatthemq", "qqxz🦙the", "日 本語のx", "", "the " * 50 + "cat" * 300]:
        assert inner.encode(text).ids == ids_of(inner, longest(text, entries)), text
    with pytest.raises(UserError, match=r"has \d+ entries with letters and special tokens"):
        build_inner(config.model_copy(update={"vocab_size": 16}), iter(TEXTS))
    with pytest.raises(UserError, match="no such file"):
        build_inner(config.model_copy(update={"dictionary": str(tmp_path / "absent")}), iter(TEXTS))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"type": "word", "pattern": "gpt2"}, "pattern is a setting of type bpe"),
        ({"type": "word", "split": "regex"}, "go together"), ({"regex": "x"}, "regex is a setting"),
        ({"type": "byte", "vocab_size": 300}, "leave vocab_size out"),
        ({"vocab_size": 200}, "less than 300"), ({"lowercase": True}, "lowercase is a setting"),
        ({"type": "word", "split": "dictionary"}, "go together"),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TokenizerConfig(**config)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(UserError, match="not a pattern of Oniguruma"):
        build_inner(TokenizerConfig(type="word", split="regex", regex="("), iter(TEXTS))


def test_the_stage_says_what_cannot_be_trained_twice(corpus: Path, tmp_path: Path) -> None:
    for kind in ("unigram", "wordpiece", "byte"):
        stage = tokenizer_stage(TokenizerConfig(**CASES[kind]))
        out = tmp_path / kind
        out.mkdir()
        reason = stage.build(Build(out, out, {"corpus": corpus}, None))  # type: ignore[arg-type]
        assert reason == NOT_THE_SAME.get(kind)
        assert (reason is None) == (kind == "byte")


def test_a_tokenizer_is_loaded_with_what_it_lacks(tmp_path: Path) -> None:
    inner = build_inner(TokenizerConfig(type="word", vocab_size=40, min_frequency=1), iter(TEXTS))
    facts = json.loads(inner.to_str())
    facts["added_tokens"] = []
    for name in SPECIALS:
        del facts["model"]["vocab"][name]
    facts["model"]["vocab"] = {word: index for index, word in enumerate(facts["model"]["vocab"])}
    source = tmp_path / "source.json"
    source.write_text(json.dumps(facts))
    out = tmp_path / "out"
    out.mkdir()
    config = TokenizerConfig(load=str(source))
    stage = tokenizer_stage(config)
    assert stage.inputs == {}
    assert stage.build(Build(out, out, {}, None)) is None  # type: ignore[arg-type]
    before, after = Tokenizer.load(source), Tokenizer.load(out)
    assert after.encode("the cat sat") == before.encode("the cat sat")
    assert after.vocab_size == before.vocab_size + 3
    assert after.eos_ids == (before.vocab_size,)
    _, mask = after.encode_chat_masked([{"role": "assistant", "content": "the cat"}])
    assert sum(mask) == 3
    whole = tmp_path / "whole"
    whole.mkdir()
    load_tokenizer(TokenizerConfig(load=str(out)), whole)
    assert Tokenizer.load(whole).vocab_size == after.vocab_size, "nothing is added twice"
    assert stage.fingerprint() == Tokenizer.load(source).hash
