"""A model folder's input embeddings by token and by word, read alone; export, nearest words, analogies, a plane.

A *word* is a token to which its own text, where a word begins, is encoded: ` the` of a byte-level BPE, `▁the` of
SentencePiece, `the` of WordPiece. Pieces of words, and words of several tokens, are none.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from soma.base.errors import UserError
from soma.model.encoder import encoder_config, is_encoder
from soma.model.folder import local_folder
from soma.model.hub import FLOATS, load_config, open_weights
from soma.model.layout import disk_layout
from soma.model.safetensors_io import SafetensorsFile
from soma.model.tokenizer import Tokenizer

ENCODER_NAMES = tuple(f"{prefix}embeddings.word_embeddings.weight" for prefix in ("", "bert.", "roberta."))
CHUNK = 256  # questions answered at once


@dataclass(frozen=True)
class Words:
    """Words and their vectors scaled to length 1, float32 (N, D), in the vocabulary's order."""

    words: list[str]
    unit: np.ndarray

    @cached_property
    def exact(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    @cached_property
    def folded(self) -> dict[str, int]:
        """Rows by the word without its case; of several the first, in most vocabularies the most frequent."""
        return {word.casefold(): row for row, word in reversed(list(enumerate(self.words)))}

    def row(self, word: str) -> int:
        """Row of a word, as it is written or else whatever its case. UserError if it is no word here."""
        found = self.exact.get(word, self.folded.get(word.casefold()))
        if found is None:
            raise UserError(f"{word!r} is not one of the {len(self.words):,} words that are one token of this model")
        return found

    def nearest(self, word: str, count: int) -> list[tuple[str, float]]:
        """The `count` words nearest to a word by cosine, itself left out; equal ones in the vocabulary's order."""
        row = self.row(word)
        cosine_N = self.unit @ self.unit[row]
        cosine_N[row] = -np.inf
        order = np.argsort(-cosine_N, kind="stable")[: min(count, len(self.words) - 1)]
        return [(self.words[index], float(cosine_N[index])) for index in order]


@dataclass(frozen=True)
class Embeddings:
    """Row i of `vectors`, float32 (V, D), is token i, `tokens[i]` as the vocabulary spells it ("" where ids have a
    gap). `word_rows`: the row of each word, in the vocabulary's order."""

    tokens: list[str]
    vectors: np.ndarray
    word_rows: dict[str, int]

    def words(self) -> Words:
        """The words alone."""
        vectors_ND = self.vectors[list(self.word_rows.values())]
        lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return Words(list(self.word_rows), vectors_ND / np.maximum(lengths_N1, 1e-12))


def read_embeddings(ref: str | Path) -> Embeddings:
    """The input embeddings of a language model or an encoder; no other tensor is read. Rows without a token (padding
    of the matrix) are left out. Raises UserError for a folder without them, and for a tensor of another shape."""
    directory = local_folder(ref)
    tokenizer = Tokenizer.load(directory)
    if is_encoder(directory):
        encoder = encoder_config(directory)
        expected = (encoder.vocab_size, encoder.hidden_size)
        path = directory / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{directory}: no weights there (model.safetensors)")
        files = [SafetensorsFile(path)]
        places = [(files[0], name) for name in ENCODER_NAMES if name in files[0].tensors]
    else:
        config = load_config(directory, quantized=True)
        expected = (config.vocab_size, config.hidden_size)
        files, location = open_weights(directory, config)
        name = disk_layout(config, ["embed_tokens.weight"])[0].name
        places = [location[name]] if name in location else []
    try:
        if not places:
            raise UserError(f"{directory}: no input embeddings among its tensors")
        matrix = _read(*places[0], expected)
    finally:
        for file in files:
            file.close()
    rows = min(len(matrix), tokenizer.vocab_size)
    tokens = [tokenizer.token_text(id) for id in range(rows)]
    return Embeddings(tokens, matrix[:rows].float().numpy(), words_of(tokenizer, rows))


def _read(file: SafetensorsFile, name: str, expected: tuple[int, int]) -> Tensor:
    dtype, shape = file.tensors[name][:2]
    if shape != expected or dtype not in FLOATS:
        raise UserError(f"{file.path}: tensor {name!r} is {dtype} {list(shape)}, expected floats {list(expected)}")
    return file.mapped(name)


def words_of(tokenizer: Tokenizer, rows: int) -> dict[str, int]:
    """The letters-and-digits words among the first `rows` tokens, and their ids."""
    texts = [tokenizer.decode([id]) for id in range(rows)]
    # Where a token may carry the space before it, a word is a token that does; elsewhere the tokenizer marks it itself.
    space = " " if any(text[0] == " " and text[1:].isalnum() for text in texts if text) else ""
    ids = [id for id, text in enumerate(texts) if text.startswith(space) and text[len(space) :].isalnum()]
    encoded = tokenizer.encode_batch([texts[id] for id in ids], as_text=True)
    return {texts[id][len(space) :]: id for id, back in zip(ids, encoded, strict=True) if back == [id]}


# --- Export ---


def export(embeddings: Embeddings, path: Path) -> int:
    """Write all tokens to `.npz` (`tokens`, `vectors`), `.parquet` (`id`, `token`, `vector`) or word2vec's text format
    (`.txt`, `.vec`); the number of tokens left out. The text format parts by white space, so tokens that are empty or
    hold some are left out of it. The same embeddings give the same bytes. Raises UserError for another suffix.
    """
    writers: dict[str, Callable[[Embeddings, Path], int]] = {
        ".npz": _write_npz, ".parquet": _write_parquet, ".txt": _write_text, ".vec": _write_text,
    }  # fmt: skip
    if path.suffix not in writers:
        raise UserError(f"{path}: its suffix says the format: {', '.join(writers)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        left_out = writers[path.suffix](embeddings, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return left_out


def _write_npz(embeddings: Embeddings, path: Path) -> int:
    # Not np.savez, which would put its own suffix behind the temporary name.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in (("tokens", np.array(embeddings.tokens)), ("vectors", embeddings.vectors)):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return 0


def _write_parquet(embeddings: Embeddings, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, width = embeddings.vectors.shape
    flat = pa.array(np.ascontiguousarray(embeddings.vectors).reshape(-1))
    table = pa.table({
        "id": pa.array(range(rows), pa.int32()), "token": pa.array(embeddings.tokens, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, width),
    })  # fmt: skip
    pq.write_table(table, path, compression="zstd")
    return 0


def _write_text(embeddings: Embeddings, path: Path) -> int:
    kept = [id for id, token in enumerate(embeddings.tokens) if token and token.split() == [token]]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"{len(kept)} {embeddings.vectors.shape[1]}\n")
        for id in kept:  # nine digits give every float32 back
            numbers = " ".join(f"{value:.9g}" for value in embeddings.vectors[id].tolist())
            file.write(f"{embeddings.tokens[id]} {numbers}\n")
    return len(embeddings.tokens) - len(kept)


# --- Analogies ---


@dataclass(frozen=True)
class Section:
    """One kind of analogy: how many questions it has, of how many all four words are known, how many were right."""

    name: str
    questions: int
    covered: int
    right: int


def read_questions(path: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    """word2vec's file: a line `: NAME` begins a section, then four words a line. UserError where a line is neither."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    sections: dict[str, list[tuple[str, str, str, str]]] = {}
    name = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if words[:1] == [":"] and len(words) > 1:
            name = " ".join(words[1:])
            sections.setdefault(name, [])
        elif len(words) == 4 and name:
            sections[name].append((words[0], words[1], words[2], words[3]))
        elif words:
            raise UserError(f"{path}, line {number}: expected ': NAME' or four words, after a first ': NAME'")
    if not any(sections.values()):
        raise UserError(f"{path}: no question in it")
    return sections


def answer(words: Words, questions: dict[str, list[tuple[str, str, str, str]]]) -> list[Section]:
    """a is to b as c is to d: the word nearest to b - a + c, other than these three, is right if it is d.

    3CosAdd as in word2vec's compute-accuracy (arXiv:1301.3781): vectors of length 1, case does not count (of words that
    differ in case the first of the vocabulary stands), questions with an unknown word are not asked. There the answer
    is sought among the 30,000 most frequent words, here among all words. Worked example: with king (3, 1),
    man (1, 0), woman (1, 1), queen (3, 2), all scaled: king - man + woman = (0.656, 1.023), whose
    cosine with queen is 0.916.
    """
    rows = sorted(words.folded.values())
    place = {words.words[row].casefold(): index for index, row in enumerate(rows)}
    unit_ND = words.unit[rows]
    found = []
    for name, asked in questions.items():
        folded = [[word.casefold() for word in question] for question in asked]
        known = [[place[word] for word in question] for question in folded if all(word in place for word in question)]
        right = 0
        for start in range(0, len(known), CHUNK):
            ids_Q4 = np.array(known[start : start + CHUNK])
            a, b, c, d = ids_Q4.T
            score_QN = (unit_ND[b] - unit_ND[a] + unit_ND[c]) @ unit_ND.T
            np.put_along_axis(score_QN, ids_Q4[:, :3], -np.inf, axis=1)
            right += int((score_QN.argmax(axis=1) == d).sum())
        found.append(Section(name, len(asked), len(known), right))
    return found


# --- A plane of words ---


class TooFewWords(UserError):  # noqa: N818
    """Two words have no plane."""


@dataclass(frozen=True)
class Plane:
    """Words at points, float64 (N, 2), and the share of the variance that each of the two axes has."""

    words: list[str]
    points: np.ndarray
    shares: tuple[float, float]


def facts_of(ref: str | Path) -> dict[str, Any] | None:
    """What a report draws of a model's words: {words, points, shares}, rounded; None where it has fewer than three."""
    try:
        found = plane(read_embeddings(ref).words())
    except TooFewWords:
        return None
    return {
        "words": found.words,
        "points": found.points.round(5).tolist(),
        "shares": [round(x, 5) for x in found.shares],
    }


def plane(words: Words, chosen: Sequence[str] = (), count: int = 150) -> Plane:
    """The two principal components of the words chosen, or of the first `count` of three letters or more.

    By singular values, in float64; each axis points to where its largest weight is positive, so the signs do not
    depend on the library. UserError for fewer than three words.
    """
    long = (word for word in words.words if len(word) >= 3 and word.isalpha())
    names = [words.words[words.row(word)] for word in chosen] or list(islice(long, count))
    names = list(dict.fromkeys(names))
    if len(names) < 3:
        raise TooFewWords(f"a map needs three words at least, there are {len(names)}")
    vectors_ND = words.unit[[words.exact[name] for name in names]].astype(np.float64)
    centred_ND = vectors_ND - vectors_ND.mean(axis=0)
    _, size, axes_KD = np.linalg.svd(centred_ND, full_matrices=False)
    axes_2D = axes_KD[:2]
    axes_2D = axes_2D * np.sign(axes_2D[np.arange(len(axes_2D)), np.abs(axes_2D).argmax(axis=1)])[:, None]
    share = np.square(size) / max(float(np.square(size).sum()), 1e-300)
    return Plane(names, centred_ND @ axes_2D.T, (float(share[0]), float(share[1])))
