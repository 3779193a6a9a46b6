"""SentencePiece `tokenizer.model` files as `tokenizers` objects, so that one runtime serves all. Loads no torch.

The file is a protocol buffer (sentencepiece_model.proto); the few fields we need are read here directly.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from soma.base.errors import UserError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass
class Piece:
    text: str = ""
    score: float = 0.0
    kind: int = NORMAL


@dataclass
class SentencePiece:
    """What a `tokenizer.model` says."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: int for varints, bytes for the rest."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError("unknown wire type")
        length = varint() if wire == 2 else (8 if wire == 1 else 4)
        if position + length > len(data):
            raise ValueError("truncated")
        yield number, data[position : position + length]
        position += length


def parse(path: Path) -> SentencePiece:
    """Read a `tokenizer.model`. UserError if it is none."""
    model = SentencePiece()
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                parts = dict(fields(value))
                score = struct.unpack("<f", parts[2])[0] if 2 in parts else 0.0
                model.pieces.append(Piece(parts[1].decode(), score, parts.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(fields(value))
                model.model_type = trainer.get(3, UNIGRAM)
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(fields(value))
                model.charsmap = normalizer.get(2, b"")
                model.add_dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_whitespaces = bool(normalizer.get(4, 1))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(f"{path}: not a SentencePiece model") from None
    if not model.pieces:
        raise UserError(f"{path}: not a SentencePiece model (no pieces)")
    if model.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{path}: SentencePiece model type {model.model_type} is not supported (only unigram and BPE)")
    return model


def special_roles(path: Path) -> dict[str, str]:
    """The control symbols that a SentencePiece model has under their usual names, by role."""
    usual = {"<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token", "<unk>": "unk_token"}
    pieces = [piece for piece in parse(path).pieces if piece.kind in (CONTROL, UNKNOWN)]
    return {usual[piece.text]: piece.text for piece in pieces if piece.text in usual}


def bpe_merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that make each piece out of two others, best piece first."""
    merges = []
    for piece, score in scores.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += [(-score, ids[left], ids[right], left, right) for left, right in found]
    return [(left, right) for *_, left, right in sorted(merges)]


def load(path: Path, prefix_every_segment: bool = True) -> Tokenizer:
    """A `tokenizers.Tokenizer` that gives the ids of the SentencePiece model at `path`.

    Control symbols (`<s>`) in a text become their id, as in Hugging Face tokenizers; the SentencePiece library itself
    would spell them out. `prefix_every_segment`: text after such a symbol gets a leading space too (the "legacy"
    behaviour of Llama tokenizers).
    """
    model = parse(path)
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = next((index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), 0)
    if model.model_type == BPE:
        scores = {piece.text: piece.score for piece in model.pieces if piece.kind in (NORMAL, USER_DEFINED)}
        tokenizer = Tokenizer(models.BPE(
            vocab=ids, merges=bpe_merges(scores, ids), unk_token=model.pieces[unknown].text, fuse_unk=True,
            byte_fallback=model.byte_fallback,
        ))  # fmt: skip
    else:
        vocabulary = [(piece.text, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = model.add_dummy_prefix
    if model.model_type == BPE and (prefix_every_segment or not prefix):
        steps += [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    else:
        scheme = ("always" if prefix_every_segment else "first") if prefix else "never"
        split = model.model_type == UNIGRAM  # a unigram piece never reaches over a space
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    specials = [piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    users = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in users])
    return tokenizer
