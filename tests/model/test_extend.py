"""More tokens for a finished model: the same logits on old ids in transformers, new rows, learned merges."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXT, make_model
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.model import merges
from soma.model.extend import extend, grown
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

WORDS = "zebra crossing zebras cross the crossing; a zebra crosses. " * 5


def theirs(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["pieces", "mean"])
def test_old_ids_keep_their_logits_in_transformers(tied: bool, init: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, tie_word_embeddings=tied)
    done = extend(folder, tmp_path / "out", tokens=["zebra", "<|tool|>", "the"], init=init, multiple=32)  # type: ignore[arg-type]
    before, after = Tokenizer.load(folder), Tokenizer.load(tmp_path / "out")
    assert done.rows % 32 == 0
    assert done.rows >= after.vocab_size == before.vocab_size + len(done.tokens)
    assert done.tokens[:2] == ["zebra", "<|tool|>"]
    old, _ = theirs(folder)
    new, names = theirs(tmp_path / "out")
    ids = torch.tensor([before.encode(TEXT)])
    with torch.no_grad():
        kept, larger = old(ids).logits, new(ids).logits
    assert larger.shape[-1] == done.rows
    assert torch.equal(kept, larger[..., : kept.shape[-1]])
    assert new.config.tie_word_embeddings == tied
    for text in [TEXT, "a zebra<|tool|>s", "é zebra"]:
        assert after.encode(text) == names.encode(text, add_special_tokens=False), text
    zebra = after.inner.token_to_id("zebra")
    for was, now in ((old.get_input_embeddings(), new.get_input_embeddings()),
                     (old.get_output_embeddings(), new.get_output_embeddings())):  # fmt: skip
        rows = was.weight[before.encode("zebra")] if init == "pieces" else was.weight
        torch.testing.assert_close(now.weight[zebra], rows.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert load_model(tmp_path / "out").config.vocab_size == done.rows


def test_learned_merges_join_what_old_ones_left(tmp_path: Path) -> None:
    folder = make_model(tmp_path, dtype=torch.bfloat16)
    done = extend(folder, tmp_path / "out", texts=[WORDS], size=12)
    before, after = Tokenizer.load(folder), Tokenizer.load(tmp_path / "out")
    assert len(done.tokens) == 12
    for text in [WORDS, TEXT, "zebracrossing é"]:
        ids = after.encode(text)
        assert after.decode(ids) == text
        assert len(ids) <= len(before.encode(text))
        assert theirs(tmp_path / "out")[1].encode(text, add_special_tokens=False) == ids
        # A new token stands for the old ids that it is made of, and for nothing else.
        _, pieces = merges.with_merges(before, merges.learn(before, [WORDS], 12))
        assert [old for id in ids for old in pieces.get(id, [id])] == before.encode(text)
    assert len(after.encode(WORDS)) < 0.6 * len(before.encode(WORDS))
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_merges_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    before = Tokenizer.load(make_model(tmp_path))
    found = merges.learn(before, [WORDS, TEXT], 30)
    inner = before.plain
    parts = Counter(part for text in (WORDS, TEXT) for part, _ in inner.pre_tokenizer.pre_tokenize_str(text))  # type: ignore[union-attr]
    words = {part: [token.value for token in inner.model.tokenize(part)] for part in parts}
    plain: list[tuple[str, str]] = []
    while len(plain) < len(found):
        pairs: Counter[tuple[str, str]] = Counter()
        for part, word in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += parts[part]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert pairs[best] >= 2
        plain.append(best)
        words = {part: merges._joined(word, best) for part, word in words.items()}
    assert found == plain


def test_rows_of_the_worked_example() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    assert grown(table, 4, {2: [0, 1]}, "pieces").tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]
    assert grown(table[:2], 3, {2: [1]}, "mean").tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def test_the_command_and_its_mistakes(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (tmp_path / "add.txt").write_text("<|a|>\nzebra\n\n")
    (tmp_path / "text.txt").write_text(WORDS)
    run = CliRunner().invoke
    base = ["tokenizer", "extend", str(folder), "--out"]
    shown = run(app, [*base, str(tmp_path / "one"), "--add", str(tmp_path / "add.txt"), "--special", "--multiple", "8"])
    assert "2 new tokens" in shown.output, shown.output
    larger = Tokenizer.load(tmp_path / "one")
    assert len(larger.encode("<|a|>")) == 1
    assert len(larger.encode("<|a|>", as_text=True)) > 1, "special tokens are not found in data"
    assert (
        "5 new tokens"
        in run(app, [*base, str(tmp_path / "two"), "--train-on", str(tmp_path / "text.txt"), "--size", "5"]).output
    )
    for options, why in [
        ([], "nothing to add"), (["--add", str(tmp_path / "absent")], "no such file"),
        (["--add", str(tmp_path / "add.txt"), "--init", "x"], "pieces or mean"),
    ]:  # fmt: skip
        assert why in str(run(app, [*base, str(tmp_path / "x"), *options]).exception)
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="nothing to add"):
        extend(folder, tmp_path / "x", tokens=["t"])
