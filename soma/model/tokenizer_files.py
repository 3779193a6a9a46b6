"""Tokenizers as others write them, as `tokenizers` objects: one runtime serves all. Loads no torch.

    tokenizer.json, any .json of that form            Hugging Face
    tokenizer.model, *.model, *.model.v3              SentencePiece, BPE or unigram (sentencepiece_model.py)
    *.tiktoken                                        tiktoken: base64 of a token's bytes, its rank
    vocab.txt, *vocab.txt                             WordPiece of BERT
    vocab.json + merges.txt, encoder.json + vocab.bpe byte-level BPE of GPT-2

A tiktoken file has no split pattern and no special tokens; both go by its name (`TIKTOKEN`), or the pattern by
`pattern` in tokenizer_config.json.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.model import sentencepiece_model

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
LLAMA3 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
    r"""\s+(?!\S)|\s+"""
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
END = "<|endoftext|>"
# By the name of the file: the pattern, and special tokens with their ids where they are not the next free ones.
TIKTOKEN: dict[str, tuple[str, dict[str, int | None]]] = {
    "gpt2": (GPT2, {END: None}), "r50k_base": (GPT2, {END: None}), "p50k_base": (GPT2, {END: 50256}),
    "cl100k_base": (CL100K, {END: 100257}), "o200k_base": (O200K, {END: 199999}), "multilingual": (GPT2, {END: None}),
    "qwen": (QWEN, {END: None, "<|im_start|>": None, "<|im_end|>": None}),
}  # fmt: skip
BERT_SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                 "mask_token": "[MASK]"}  # fmt: skip


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


@dataclass
class Source:
    """A tokenizer as it was found: `special_tokens` are those that the format itself fixes, by role."""

    inner: Tokenizer
    content: bytes
    special_tokens: dict[str, str] = field(default_factory=dict)


def read(path: Path, settings: dict[str, Any]) -> Source:
    """The tokenizer of a folder or file. `settings` are those of tokenizer_config.json. UserError if there is none."""
    if path.is_file():
        return _file(path, settings)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return _file(path / name, settings)
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (path / vocabulary).is_file() and (path / merges).is_file():
            return byte_level_bpe(path / vocabulary, path / merges)
    found = [*sorted(path.glob("*vocab.txt")), *sorted(path.glob("*.tiktoken"))]
    if len(found) == 1:
        return _file(found[0], settings)
    if found:
        raise UserError(f"{path}: several tokenizers ({', '.join(one.name for one in found)}): name one of the files")
    raise UserError(f"{path}: no tokenizer there (neither tokenizer.json nor tokenizer.model, vocab.txt, *.tiktoken …)")


def _file(path: Path, settings: dict[str, Any]) -> Source:
    if path.suffix == ".json":
        content = path.read_bytes()
        try:
            return Source(Tokenizer.from_buffer(content), content)
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise UserError(f"{path}: not a valid tokenizer ({error})") from None
    if ".model" in path.suffixes:
        inner = sentencepiece_model.load(path, bool(settings.get("legacy", True)))
        return Source(inner, path.read_bytes(), sentencepiece_model.special_roles(path))
    if path.suffix == ".tiktoken":
        return tiktoken(path, settings.get("pattern"))
    if path.name.endswith("vocab.txt"):
        return wordpiece(path, settings)
    raise UserError(f"{path}: no tokenizer's file (tokenizer.json, *.model, *.tiktoken, vocab.txt)")


def byte_level_bpe(vocabulary: Path, merges: Path) -> Source:
    """Byte-level BPE of GPT-2's two files."""
    ids = read_json(vocabulary)
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip() and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise UserError(f"{merges}:{number}: expected two pieces with a space between them")
            pairs.append(pair)
    try:
        inner = _byte_level(models.BPE(ids, pairs), GPT2)
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise UserError(f"{vocabulary}, {merges}: do not belong together ({error})") from None
    special = {}
    if END in ids:
        inner.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        special = {"bos_token": END, "eos_token": END, "unk_token": END}
    return Source(inner, vocabulary.read_bytes() + merges.read_bytes(), special)


def _byte_level(model: Any, pattern: str) -> Tokenizer:
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def tiktoken(path: Path, pattern: str | None = None) -> Source:
    """A tiktoken vocabulary. tiktoken merges the pair whose joint bytes have the lowest rank, so every way to cut a
    token into two tokens is a merge, by the token's rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, place = line.split()
            ranks[base64.b64decode(token)] = int(place)  # Whisper has a bare "=" for no bytes: a row without use
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: expected the base64 of a token, a space and its rank") from None
    known, specials = TIKTOKEN.get(path.stem.removesuffix("_v1"), ("", {END: None}))
    if not (pattern := pattern or known):
        raise UserError(
            f"{path}: the file has no split pattern and its name is not one of {', '.join(TIKTOKEN)}: name it "
            'so, or give "pattern" in a tokenizer_config.json beside it'
        )
    characters = byte_characters()
    names = {whole: "".join(characters[byte] for byte in whole) for whole in ranks}
    merges = []
    for whole, rank in ranks.items():
        for cut in range(1, len(whole)):
            if whole[:cut] in ranks and whole[cut:] in ranks:
                merges.append((rank, cut, names[whole[:cut]], names[whole[cut:]]))
    merges.sort()
    ids = {names[whole]: rank for whole, rank in ranks.items()}
    taken = set(ids.values())  # a special token may lie beyond the next free id, or among the ranks (p50k_base)
    ids |= {name: id for name, id in specials.items() if id is not None and id not in taken}
    try:
        model = models.BPE(ids, [(left, right) for _, _, left, right in merges], ignore_merges=True)
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
        raise UserError(f"{path}: not a tiktoken vocabulary ({error})") from None
    special = {"bos_token": END, "eos_token": END} if END in specials else {}
    content = path.read_bytes() + pattern.encode()
    inner = _byte_level(model, pattern)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return Source(inner, content, special)


def wordpiece(path: Path, settings: dict[str, Any]) -> Source:
    """BERT's WordPiece. Lower case and accents by tokenizer_config.json; left out, a vocabulary without any capital
    letter outside of [BRACKETS] is taken for an uncased one.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        ids[token] = index
    if "[UNK]" not in ids:
        raise UserError(f"{path}: no [UNK] in it; a WordPiece vocabulary has one token a line, [UNK] among them")
    cased = any(token.lower() != token for token in tokens if not token.startswith("["))
    lower = bool(settings.get("do_lower_case", not cased))
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"), lowercase=lower,
    )  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = {role: token for role, token in BERT_SPECIALS.items() if token in ids}
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    if "[CLS]" in ids and "[SEP]" in ids:
        inner.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return Source(inner, path.read_bytes() + json.dumps(lower).encode(), special)
