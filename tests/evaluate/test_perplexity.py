"""Bits per byte against transformers, against brute force, and against a worked number."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soma.base.errors import UserError
from soma.evaluate import perplexity
from soma.evaluate.perplexity import (
    bits_per_byte,
    bootstrap,
    by_kind,
    interval,
    score_texts,
    separator_id,
    to_bits_per_byte,
    to_perplexity,
    totals,
    window_settings,
    windows_of,
)  # fmt: skip
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Transformer:
    return load_model(model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


def test_worked_numbers() -> None:
    assert to_bits_per_byte(2000.0, 4000) == pytest.approx(0.7213, abs=5e-5)
    assert to_perplexity(2000.0, 1000) == pytest.approx(7.389, abs=5e-4)
    assert [(w.first, w.stop) for w in windows_of(0, 10, 6, 3)] == [(1, 6), (7, 9), (10, 10)]
    assert math.isnan(to_bits_per_byte(0.0, 0))


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40))
def test_windows_score_every_target_once_with_enough_context(targets: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    windows = windows_of(3, targets, length, stride)
    scored = [target for w in windows for target in range(w.first, w.stop + 1)]
    assert scored == list(range(1, targets + 1))
    for w in windows:
        assert 0 <= w.start < w.first <= w.stop <= w.start + length
        assert w.start == 0 or w.first - w.start > length - stride, "a later window brings context"


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def reference(theirs: Any, ids: list[int], length: int, stride: int) -> list[float]:
    """Each token by itself, from the start of the window that scores it, with no padding."""
    found: list[float] = []
    with torch.no_grad():
        for target in range(1, len(ids)):
            # The window that scores this target: the first, or the one that ends at the stride after it.
            moves = 0 if target <= length else -(-(target - length) // stride)
            stop = min(length + moves * stride, len(ids) - 1)
            logits = theirs(torch.tensor([ids[max(0, stop - length) : target]])).logits[0, -1]
            found.append(float(torch.log_softmax(logits.float(), 0)[ids[target]]))
    return found


@pytest.mark.parametrize(("length", "stride"), [(128, 64), (16, 8), (16, 16), (8, 1)])
def test_parity_with_transformers(
    model: Transformer, tokenizer: Tokenizer, theirs: Any, length: int, stride: int, documents: list[str]
) -> None:
    chosen = documents[:3]
    scores = score_texts(model, tokenizer, chosen, sequence_length=length, stride=stride, batch_size=3)
    for text, score in zip(chosen, scores, strict=True):
        ids = [separator_id(tokenizer), *tokenizer.encode(text)]
        assert score.ids.tolist() == ids[1:]
        assert score.logprobs == pytest.approx(reference(theirs, ids, length, stride), abs=2e-4)
    found = totals(scores)
    assert found["bytes"] == sum(len(text.encode()) for text in chosen)
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / found["bytes"])


def test_negative_control_skipping_the_first_token_is_seen(
    model: Transformer, tokenizer: Tokenizer, documents: list[str]
) -> None:
    scores = score_texts(model, tokenizer, documents)
    whole = totals(scores)["bits_per_byte"]
    without = [perplexity.Score(score.ids[1:], score.logprobs[1:], score.n_bytes) for score in scores]
    assert totals(without)["bits_per_byte"] < whole - 1e-3, "an unpaid token must show"


def test_negative_control_other_windows_give_another_number(
    model: Transformer, tokenizer: Tokenizer, documents: list[str]
) -> None:
    long, short = (bits_per_byte(model, tokenizer, documents, sequence_length=n)["bits_per_byte"] for n in (128, 4))
    assert abs(long - short) > 1e-3


def test_batches_do_not_change_the_score_and_runs_agree_to_the_bit(
    model: Transformer, tokenizer: Tokenizer, documents: list[str]
) -> None:
    first = score_texts(model, tokenizer, documents, batch_size=4, sequence_length=32)
    again = score_texts(model, tokenizer, documents, batch_size=4, sequence_length=32)
    single = score_texts(model, tokenizer, documents, batch_size=1, sequence_length=32)
    for a, b, c in zip(first, again, single, strict=True):
        assert np.array_equal(a.logprobs, b.logprobs)
        assert a.logprobs == pytest.approx(c.logprobs, abs=1e-4)


def test_bf16_is_close(model: Transformer, tokenizer: Tokenizer, model_dir: Path, documents: list[str]) -> None:
    exact = bits_per_byte(model, tokenizer, documents)["bits_per_byte"]
    rounded = bits_per_byte(load_model(model_dir, dtype=torch.bfloat16), tokenizer, documents)["bits_per_byte"]
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


def test_logits_in_chunks_are_the_same(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, documents: list[str]
) -> None:
    whole = totals(score_texts(model, tokenizer, documents))["nats"]
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 320 * 5)
    assert totals(score_texts(model, tokenizer, documents))["nats"] == pytest.approx(whole, rel=1e-6)


def test_bootstrap_interval() -> None:
    generator = np.random.default_rng(1)
    sizes = generator.integers(500, 1500, 400).astype(float)
    costs = sizes * generator.normal(2.0, 0.2, 400)
    low, high = bootstrap(costs, sizes, 1000, seed=0) or (0, 0)
    ratio = costs.sum() / sizes.sum()
    assert low < ratio < high
    # The delta method's standard error of a ratio of means.
    error = math.sqrt(((costs - ratio * sizes) ** 2).sum()) / sizes.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert bootstrap(costs, sizes, 1000, seed=0) == (low, high)
    assert bootstrap(costs[:1], sizes[:1], 1000, seed=0) is None
    assert bootstrap(costs, sizes, 0, seed=0) is None


def test_kinds_add_up(model: Transformer, tokenizer: Tokenizer, documents: list[str]) -> None:
    scores = score_texts(model, tokenizer, documents)
    kinds = by_kind(scores, ["a", "b", "b"] * 4)
    assert sum(facts["bytes"] for facts in kinds.values()) == totals(scores)["bytes"]
    assert sum(facts["nats"] for facts in kinds.values()) == pytest.approx(totals(scores)["nats"])
    assert next(iter(kinds)) == max(kinds, key=lambda kind: kinds[kind]["bytes"])
    low, high = interval(scores, 200, 0) or (0, 0)
    assert low < totals(scores)["bits_per_byte"] < high


def test_an_empty_document_costs_nothing(model: Transformer, tokenizer: Tokenizer) -> None:
    empty, full = score_texts(model, tokenizer, ["", "cat"])
    assert (empty.nats, empty.n_bytes, len(empty.ids)) == (0.0, 0, 0)
    assert full.nats > 0


def test_mistakes_are_named(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="made for 128 tokens"):
        window_settings(model, 256, None)
    with pytest.raises(UserError, match="stride"):
        window_settings(model, None, 129)
    with pytest.raises(UserError, match="does not belong to this model"):
        perplexity.token_logprobs(model, [np.array([1, 320])], length=8, stride=4, batch_size=1)

    class Bare:
        bos_id = None
        eos_ids = ()

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return []

    with pytest.raises(UserError, match="neither a bos nor an eos"):
        separator_id(Bare())


def test_a_special_tokens_name_in_a_document_is_text(model: Transformer, tokenizer: Tokenizer) -> None:
    name = tokenizer.token_text(tokenizer.eos_ids[0])
    score = score_texts(model, tokenizer, [f"fox{name}dog"], sequence_length=32, stride=16, batch_size=1)[0]
    assert not set(score.ids.tolist()) & set(tokenizer.eos_ids)
    assert tokenizer.decode(score.ids.tolist(), skip_special=False) == f"fox{name}dog"
    assert set(tokenizer.encode(f"fox{name}dog")) & set(tokenizer.eos_ids)  # the control
