"""New tokens for a finished model: the tokenizer and both embeddings grow, all old ids keep their logits.

A new token's rows start as the mean of the rows of the pieces that spelled it before (`pieces`), so that the model sees
about what it saw, or as the mean of all rows (`mean`): Hewitt 2021, "Initializing New Word Embeddings for Pretrained
Language Models", shows that the latter keeps the new tokens' share of the probability small. Rows that only pad the
table to a multiple are the mean of all rows as well.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner
from torch import Tensor, nn

from soma.base.artefact import building
from soma.base.errors import UserError
from soma.model import merges
from soma.model.folder import local_folder
from soma.model.hub import load_model, save_model
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer

Init = Literal["pieces", "mean"]
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Extended:
    """What was done. `rows` are those of the embeddings, padding among them."""

    tokens: list[str]
    old_entries: int
    entries: int
    rows: int


def extend(
    ref: str | Path, out: Path, *, tokens: Sequence[str] = (), texts: Iterable[str] = (), size: int = 0,
    init: Init = "pieces", multiple: int = 64, special: bool = False,
) -> Extended:  # fmt: skip
    """Write the model `ref` with more tokens to the new folder `out`.

    tokens: added as they are, found wherever they stand in a text; those that are there already are left out. texts,
    size: so many tokens that BPE learns next on these texts (`merges.learn`). multiple: the embeddings' rows are
    rounded up to it. special: `tokens` are special tokens. Raises UserError where nothing is new, for an empty token,
    and for a model whose weights are rounded.
    """
    folder = local_folder(ref)
    before = Tokenizer.load(folder)
    if any(not token for token in tokens):
        raise UserError("an empty token cannot be added")
    inner = Inner.from_str(before.inner.to_str())
    pieces: dict[int, list[int]] = {}
    if size:
        inner, pieces = merges.with_merges(before, merges.learn(before, texts, size))
    new = [token for token in dict.fromkeys(tokens) if inner.token_to_id(token) is None]
    added = [AddedToken(token, special=special, normalized=False) for token in new]
    inner.add_special_tokens(added) if special else inner.add_tokens(added)
    for token in new:
        id = inner.token_to_id(token)
        assert id is not None
        pieces[id] = before.encode(token, as_text=True)
    if not pieces:
        raise UserError(f"{ref}: nothing to add: its vocabulary has all of these tokens, or the text is too small")
    model = load_model(folder, quantized=False)
    names = [inner.id_to_token(id) or "" for id in sorted(pieces)]
    with building(out) as made:
        copy_tokenizer(folder, made, inner, added)
        after = Tokenizer.load(made)
        rows = -(-max(after.vocab_size, model.config.vocab_size) // multiple) * multiple
        for name in EMBEDDINGS:
            _grow(model, name, rows, pieces, init)
        model.config = model.config.model_copy(update={"vocab_size": rows})
        save_model(model, made)
    return Extended(names, before.vocab_size, after.vocab_size, rows)


def copy_tokenizer(folder: Path, out: Path, inner: Inner, added: Sequence[AddedToken]) -> None:
    """The tokenizer `inner` with the settings of `folder`, in `out`."""
    inner.save(str(out / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (folder / name).is_file():
            (out / name).write_bytes((folder / name).read_bytes())
    config = out / "tokenizer_config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        declared = settings.get("added_tokens_decoder")
        if isinstance(declared, dict):
            for token in added:
                declared[str(inner.token_to_id(token.content))] = {
                    "content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
                    "single_word": False, "special": token.special,
                }  # fmt: skip
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _grow(model: Transformer, name: str, rows: int, pieces: dict[int, list[int]], init: Init) -> None:
    """Replace an embedding's table by one with more rows. A tied output has no table of its own."""
    module = getattr(model, name, None)
    if module is None or (name == "lm_head" and model.config.tie_word_embeddings):
        return
    with torch.no_grad():
        module.weight = nn.Parameter(grown(module.weight, rows, pieces, init), requires_grad=False)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(grown(module.bias[:, None], rows, pieces, init)[:, 0], requires_grad=False)
    for attribute in ("num_embeddings", "out_features"):
        if hasattr(module, attribute):
            setattr(module, attribute, rows)


def grown(table_VD: Tensor, rows: int, pieces: dict[int, list[int]], init: Init) -> Tensor:
    """The table with `rows` rows: old ones as they are, those of `pieces` from the rows of their pieces, the rest the
    mean; sums in float32.

    Worked example: rows (1, 0) and (0, 1), a token of both pieces: (0.5, 0.5).
    """
    values_VD = table_VD.float()
    used = min([len(values_VD), *pieces])  # padding rows below the new ids hold nothing learned
    mean_D = values_VD[:used].mean(dim=0)
    out_VD = mean_D.repeat(rows, 1)
    out_VD[: len(values_VD)] = values_VD
    for id, parts in pieces.items():
        out_VD[id] = values_VD[parts].mean(dim=0) if init == "pieces" and parts else mean_D
    return out_VD.to(table_VD.dtype)
