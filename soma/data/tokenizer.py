"""Tokenizer training over the training split, written as Hugging Face reads it. Byte-level BPE is the default.

Bytes per token on held-out files of the Python 3.11 standard library, vocabulary 4096, by the pattern that cuts text
before merging: gpt2 3.39, gpt4 3.36, `code` with the line end apart from the punctuation before it 3.44, as it is
3.57. In `code` a line end and the indentation after it are one piece (joined to closing punctuation: `):\\n        `),
and a word after indentation carries no space, so a prompt may end anywhere in the indentation of a line.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from soma.base import progress
from soma.base.artefact import write_json
from soma.base.errors import UserError
from soma.base.fetch import fetch
from soma.data.config import TokenizerConfig
from soma.data.corpus import read_corpus
from soma.model.tokenizer import Tokenizer as Runtime
from soma.model.tokenizer_files import byte_characters

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = [END_OF_TEXT, IM_START, IM_END, PAD]
UNKNOWN = "<|unknown|>"
HAVE_UNKNOWN = ("wordpiece", "word", "char")
LONGEST_RUN = 1_000_000  # characters without white space that a dictionary is laid over
LONGEST_MERGED = 2_000  # characters of a run that pairs are merged in: the trainer's time grows with its square
LONG_RUNS = re.compile(rf"(?<!\S)\S{{{LONGEST_MERGED + 1},}}|(?<!\s)\s{{{LONGEST_MERGED + 1},}}")
NOT_THE_SAME = {
    "unigram": "unigram training in `tokenizers` sums in the order of its hash tables: two trainings may differ",
    "wordpiece": "WordPiece training in `tokenizers` breaks ties by its hash tables: two trainings may differ",
}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?NUMBERS| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "code": CONTRACTIONS
    + r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+",
}
NUMBERS = {"single": r"\p{N}", "three": r"\p{N}{1,3}"}

# ChatML. The `generation` marks bound exactly what the assistant writes, its end-of-turn token included.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(config: TokenizerConfig, corpus: Path, out: Path) -> str | None:
    """Fill the directory `out` with `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    The special tokens are ids 0 to 3: end of text (also beginning of text), the two ChatML marks, padding; types that
    do not know every text have the unknown token as id 4. The vocabulary is smaller than asked for where the corpus
    gives no more. Returns the reason why a second training may give other bytes, or None. Raises UserError for a corpus
    without training text, and a `dictionary` or `regex` that cannot be used.
    """
    with progress.current().task("tokenizer", unit="bytes") as task:
        tokenizer = build(config, _texts(config, corpus, task))
    size = tokenizer.get_vocab_size()
    if config.type != "byte" and size < config.vocab_size:
        progress.current().note(
            f"the corpus gives a vocabulary of {size} tokens, fewer than the {config.vocab_size} asked for"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_configs(out, UNKNOWN if config.type in HAVE_UNKNOWN else None)
    return NOT_THE_SAME.get(config.type)


def load_tokenizer(config: TokenizerConfig, out: Path) -> None:
    """Fill `out` with the tokenizer that `config.load` names, as a tokenizer.json with its special tokens and template.

    What it lacks of an end of text, or of a chat template with its marks, is added at the end of the vocabulary.
    """
    assert config.load is not None
    runtime = Runtime.load(config.load)
    inner, named, templates = runtime.inner, dict(runtime.special_tokens), dict(runtime.chat_templates)
    added = []
    if runtime.eos_ids:
        named.setdefault("eos_token", runtime.token_text(runtime.eos_ids[0]))
    else:
        named["eos_token"] = END_OF_TEXT
        added.append(END_OF_TEXT)
    if not templates:
        templates = {"default": CHAT_TEMPLATE}
        added += [IM_START, IM_END]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    inner.save(str(out / "tokenizer.json"))
    template: Any = [{"name": name, "template": text} for name, text in sorted(templates.items())]
    _write_settings(out, named, [IM_START, IM_END] if IM_START in added else [], inner,
                    templates["default"] if set(templates) == {"default"} else template)  # fmt: skip


def build(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The trained tokenizer of a config's type. Where a type has a reference implementation, it is the library's own
    trainer and model; `dictionary` is maximal matching (WordPiece's search without its prefix).
    """
    if config.type == "bpe":
        return _bpe(config, cut_long_runs(texts))
    if config.type == "byte":
        next(texts)  # an empty corpus is an error here too
        return _bytes()
    if config.type == "unigram":
        return _unigram(config, texts)
    if config.type == "wordpiece":
        return _wordpiece(config, cut_long_runs(texts))
    if config.split == "dictionary":
        return _dictionary(config, texts)
    return _words(config, texts)


def cut_long_runs(texts: Iterator[str]) -> Iterator[str]:
    """The same texts, in pieces where one has a run without (or of) white space that is longer than `LONGEST_MERGED`.

    Merging in a run of 30,000 letters took 0.5 s, in one of 100,000 8 s: a file of base64 would take hours.
    """
    for text in texts:
        start = 0
        for run in LONG_RUNS.finditer(text):
            for end in range(run.start() + LONGEST_MERGED, run.end(), LONGEST_MERGED):
                yield text[start:end]
                start = end
        yield text[start:]


def _specials(config: TokenizerConfig) -> list[AddedToken]:
    names = [*SPECIALS, *([UNKNOWN] if config.type in HAVE_UNKNOWN else [])]
    return [AddedToken(token, special=True, normalized=False) for token in names]


def _bpe(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(PATTERNS[config.pattern].replace("NUMBERS", NUMBERS[config.digits]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=_specials(config),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _bytes() -> Tokenizer:
    """Byte b is id b + 4."""
    ids = {token: index for index, token in enumerate([*SPECIALS, *byte_characters()])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def _unigram(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """Pieces by SentencePiece's unigram training, spaces as ▁ (Kudo & Richardson 2018), then the 256 bytes, which spell
    what no piece covers: every text comes back as it was.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=config.vocab_size - 256, show_progress=False, special_tokens=_specials(config), unk_token=END_OF_TEXT
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in vocabulary) - 10
    vocabulary += [(f"<0x{byte:02X}>", lowest) for byte in range(256)]
    tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _wordpiece(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=False,
        special_tokens=_specials(config),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _words(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """One entry a word, or a character for type char; the most frequent ones, ties by the text."""
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    if config.lowercase:
        tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, lowercase=True)
    if config.type == "char":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif config.split == "regex":
        assert config.regex is not None
        try:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(config.regex), "removed", invert=True)
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise UserError(f"tokenizer.regex: {config.regex!r}: not a pattern of Oniguruma ({error})") from None
    elif config.split == "punctuation":
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=False,
        special_tokens=_specials(config),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _dictionary(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The longest word that fits, from left to right; then single characters of the corpus, the frequent ones first."""
    assert config.dictionary is not None
    try:
        lines = fetch(config.dictionary, "file").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.dictionary: {config.dictionary}: cannot be read ({error})") from None
    normalizer = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, lowercase=config.lowercase)
    words = [normalizer.normalize_str(line.strip()) if config.lowercase else line.strip() for line in lines]
    # Every character of a word is an entry too: where no word fits, the run goes on after one character.
    letters = sorted({character for word in words for character in word if not character.isspace()})
    entries = list(dict.fromkeys([*SPECIALS, UNKNOWN, *(word for word in words if word), *letters]))
    if len(entries) > config.vocab_size:
        raise UserError(
            f"tokenizer.dictionary: {config.dictionary} has {len(entries)} entries with letters and special tokens, "
            f"more than tokenizer.vocab_size {config.vocab_size}: raise it"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text) if config.lowercase else text)
    seen = set(entries)
    common = sorted((-count, character) for character, count in counts.items() if count >= config.min_frequency)
    entries += [one for _, one in common if one not in seen and not one.isspace()][: config.vocab_size - len(entries)]
    ids = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix="", max_input_chars_per_word=LONGEST_RUN)
    )
    if config.lowercase:
        tokenizer.normalizer = normalizer
    # A character that is no entry stands alone, so that it does not make its whole run unknown.
    known = "".join(entry for entry in entries if len(entry) == 1)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(f"[^{_escaped(known)}]"), "isolated"),
    ])  # fmt: skip
    tokenizer.add_special_tokens(_specials(config))
    return tokenizer


def _escaped(characters: str) -> str:
    """Characters for the inside of a class of Oniguruma."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in characters)


def _texts(config: TokenizerConfig, corpus: Path, task: progress.Task) -> Iterator[str]:
    total = 0
    for row in read_corpus(corpus, "train", ["text"]):
        size = len(row["text"].encode())
        if total and total + size > config.max_bytes:
            break
        total += size
        yield row["text"]
        task.advance(size)
    if not total:
        raise UserError(f"{corpus}: the training split is empty, a tokenizer cannot be trained on it")


def _write_configs(out: Path, unknown: str | None) -> None:
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    if unknown is not None:
        named["unk_token"] = unknown
    _write_settings(out, named, [IM_START, IM_END], Tokenizer.from_file(str(out / "tokenizer.json")), CHAT_TEMPLATE)


def _write_settings(out: Path, named: dict[str, str], more: list[str], inner: Tokenizer, template: Any) -> None:
    """`tokenizer_config.json` and `special_tokens_map.json`, as transformers writes them."""
    extra = {"additional_special_tokens": more} if more else {}
    added = {
        str(index): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for index, token in sorted(inner.get_added_tokens_decoder().items())
    }  # fmt: skip
    write_json(
        out / "tokenizer_config.json",
        {
            **named, **extra, "added_tokens_decoder": added, "chat_template": template,
            "clean_up_tokenization_spaces": False, "model_max_length": 1_000_000_000,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )  # fmt: skip
    write_json(out / "special_tokens_map.json", {**named, **extra})
