"""Structured output: every answer of a model that knows nothing parses, whatever happens to the request meanwhile."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from speculating import Guesses, draft_always

from soma.engine.adjust import Row, SamplingState
from soma.engine.engine import Engine
from soma.engine.errors import RequestError
from soma.engine.guided import KEPT, Guided, Guides
from soma.engine.params import SamplingParams
from soma.engine.sampling import distribution, sample
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

Make = Callable[..., Engine]
SEEDS = 50

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "日本"]}, "minItems": 1, "maxItems": 3},
        "friend": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/friend"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
    "$defs": {
        "friend": {
            "type": "object", "properties": {"known": {"type": "boolean"}}, "required": ["known"],
            "additionalProperties": False,
        }
    },
}  # fmt: skip
GBNF = 'root ::= "(" item ("," item)? ")"\nitem ::= [a-c] | "日"'
PATTERNS = [r"[0-9]{3}-[a-f]{2,5}", r"(yes|no)!?", "naïve|日本{1,3}", 'a/b"c?']


def params(seed: int, guided: Guided | None, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 300, "guided": guided, **more})


def answers(engine: Engine, tokenizer: Tokenizer, guided: Guided | None, seeds: int = SEEDS, **more: Any) -> list[str]:
    """One answer for each seed, all of them ended by themselves."""
    prompt = tokenizer.encode("hello")
    requests = engine.submit_all([prompt] * seeds, [params(seed, guided, **more) for seed in range(seeds)])
    done = [request.result() for request in requests]
    if guided is not None:
        assert {one.finish_reason for one in done} == {"stop"}
    return [one.text for one in done]


def is_valid(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), PERSON)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_json_schema(make_engine: Make, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    texts = answers(engine, tokenizer, Guided.json_schema(PERSON))
    assert [text for text in texts if not is_valid(text)] == []
    assert len(set(texts)) == SEEDS
    free = answers(engine, tokenizer, None)  # negative control: the same model without the grammar
    assert sum(is_valid(text) for text in free) == 0


def test_patterns_choices_grammars(make_engine: Make, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    for pattern in PATTERNS:
        texts = answers(engine, tokenizer, Guided.regex(pattern))
        assert [text for text in texts if not re.fullmatch(pattern, text)] == []
    choices = ['a "quoted" one', "日本", "line\nbreak"]
    assert set(answers(engine, tokenizer, Guided.choice(choices))) == set(choices)
    lark = 'start: "<" word ("," word){1,2} ">"\nword: /[a-z]{1,4}/'
    for grammar, pattern in ((lark, r"<[a-z]{1,4}(,[a-z]{1,4}){1,2}>"), (GBNF, r"\([a-c日](,[a-c日])?\)")):
        texts = answers(engine, tokenizer, Guided.grammar(grammar))
        assert [text for text in texts if not re.fullmatch(pattern, text)] == []


def test_filters_and_penalties_keep_to_the_grammar(make_engine: Make, tokenizer: Tokenizer) -> None:
    guided = Guided.json_schema(PERSON)
    for more in ({"temperature": 0.0}, {"top_p": 0.6}, {"top_k": 3, "repetition_penalty": 1.5}, {"min_p": 0.2}):
        assert all(map(is_valid, answers(make_engine(), tokenizer, guided, 10, **more)))


def test_text_ends_only_where_the_grammar_lets_it(make_engine: Make, tokenizer: Tokenizer) -> None:
    """An end that the model wants above all comes at the first place where it is allowed, and is not needed at all."""
    engine = make_engine()
    end, prompt = tokenizer.eos_ids[0], tokenizer.encode("hello")
    wanted = {end: 100.0}
    done = engine.generate(prompt, params(0, Guided.regex("[ab]{3,9}"), logit_bias=wanted))
    assert (len(done.text), done.finish_reason, done.ids[-1]) == (3, "stop", end)
    whole = engine.generate(prompt, params(0, Guided.regex("[ab]{3}"), logit_bias=wanted, ignore_eos=True))
    assert (len(whole.text), whole.finish_reason) == (3, "stop")
    assert end not in whole.ids
    never = engine.generate(prompt, params(0, Guided.regex("[ab]{3,}"), logit_bias={end: -100.0}, max_tokens=20))
    assert (never.finish_reason, len(never.ids)) == ("length", 20)


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_and_prefix_cache_change_nothing(make_engine: Make, tokenizer: Tokenizer, overlap: bool) -> None:
    """With little memory, requests are thrown out and computed anew; their place in the grammar stays."""
    guided = Guided.json_schema(PERSON)
    prompt = tokenizer.encode("the quick brown fox") * 6
    each = [params(seed, guided if seed % 3 else None, max_tokens=200) for seed in range(12)]
    wide = [one.result() for one in make_engine().submit_all([prompt] * 12, each)]
    engine = make_engine(cache_tokens=384, max_running=8, overlap=overlap)
    narrow = [one.result() for one in engine.submit_all([prompt] * 12, each)]
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["prefix_cache_hits"] > 0
    assert [one.ids for one in narrow] == [one.ids for one in wide]
    assert all(is_valid(one.text) for one, asked in zip(narrow, each, strict=True) if asked.guided)


@pytest.mark.parametrize("draft", ["ngram", "guesses", "model"])
def test_speculation_changes_nothing(make_engine: Make, tokenizer: Tokenizer, tiny_folder: Path, draft: str) -> None:
    """Drafts that leave the grammar are refused, those that go on behind its end are cut, and the rest is accepted."""
    guided = Guided.json_schema(PERSON)
    prompts = [tokenizer.encode(f'"name": "large", "age": 10, "tags": ["red"], more {seed}') for seed in range(8)]
    each = [params(seed, guided if seed % 4 else None, max_tokens=700 if seed % 4 else 40) for seed in range(8)]
    plain = [one.result().ids for one in make_engine().submit_all(prompts, each)]
    engine = make_engine()
    known = {tuple(ids): answer for ids, answer in zip(prompts, plain, strict=True)}
    guesses = Guesses(known, engine.config.vocab_size) if draft == "guesses" else None
    draft_always(engine, guesses or (load_model(tiny_folder) if draft == "model" else "ngram"))
    drafted = [one.result() for one in engine.submit_all(prompts, each)]
    assert [one.ids for one in drafted] == plain
    assert {one.finish_reason for one, asked in zip(drafted, each, strict=True) if asked.guided} == {"stop"}
    assert engine.stats()["accepted_tokens"] > (5 if draft == "ngram" else 100)
    if draft == "model":  # without a seed its drafts go through rejection sampling
        requests = [one.result() for one in engine.submit_all(prompts, [replace(one, seed=None) for one in each])]
        texts = [one.text for one, asked in zip(requests, each, strict=True) if asked.guided]
        assert all(map(is_valid, texts))


def test_rows_of_a_draft(tokenizer: Tokenizer) -> None:
    """Rows ahead are masked as after these tokens; the request itself stays where it is."""
    size = 400
    guides = Guides(tokenizer, size)
    ids = [tokenizer.encode(letter)[0] for letter in "abc"]
    state = SamplingState(SamplingParams(seed=1), guide=guides.start(Guided.regex("ab(c|a)")))
    x_RV = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    drafts = [(), (ids[0],), (ids[0], ids[1]), (ids[0], ids[0])]
    rows = [Row(state, draft) for draft in drafts]
    kept_RV = distribution(x_RV, rows) > 0
    for row, letters in enumerate(("a", "b", "ca")):
        assert {tokenizer.token_text(id) for id in kept_RV[row].nonzero()[:, 0].tolist()} >= set(letters)
        assert all(tokenizer.token_text(id)[0] in letters for id in kept_RV[row].nonzero()[:, 0].tolist())
    assert kept_RV[3].all()  # a draft that the grammar refuses: no use to anybody
    ahead = sample(x_RV, rows)
    for place, token in enumerate(drafts[2]):
        alone = sample(x_RV[place : place + 1], [Row(state)])[0]
        assert alone is not None
        assert alone.id == ahead[place].id  # type: ignore[union-attr]
        state.take(token)
    assert not state.finished
    state.take(ids[2])
    assert state.finished


IMPOSSIBLE = [
    Guided.json_schema({"enum": []}), Guided.json_schema({"type": "string", "minLength": 5, "maxLength": 2}),
    Guided.json_schema({"type": "strange"}), Guided.json_schema({"not": {}}), Guided.json_schema("{"),
    Guided.json_schema("false"), Guided.json_schema({"$ref": "https://example.com/schema"}),
    Guided.json_schema({"type": "object", "required": ["b"], "additionalProperties": False}),
    Guided.regex("("), Guided.regex("(?=a)b"), Guided.grammar("start: b"), Guided.grammar('root ::= "a" | other'),
    Guided.choice([]), Guided.regex("a" * ((1 << 20) + 1)),
]  # fmt: skip


@pytest.mark.parametrize("guided", IMPOSSIBLE, ids=lambda one: one.text[:40])
def test_impossible_grammars_name_the_field(tokenizer: Tokenizer, guided: Guided) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        Guides(tokenizer, 400).check(guided.named("response_format"))
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 400


def test_an_engine_refuses_before_it_runs(make_engine: Make, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="guided is not possible"):
        make_engine().submit(tokenizer.encode("hello"), params(0, Guided.json_schema({"enum": []})))
    with pytest.raises(RequestError, match="must be a Guided"):
        SamplingParams(guided='{"type": "object"}')  # type: ignore[arg-type]


def test_a_tokenizer_without_an_end(tokenizer: Tokenizer) -> None:
    endless = Tokenizer(tokenizer.inner)
    guides = Guides(endless, 400)
    guides.prepare()  # nobody has asked yet
    with pytest.raises(RequestError, match="end-of-text"):
        guides.check(Guided.regex("a"))


def test_grammars_are_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    guides, made = Guides(tokenizer, 400), []
    real = guides._new
    monkeypatch.setattr(guides, "_new", lambda guided: made.append(guided.text) or real(guided))
    for pattern in [*map(str, range(KEPT)), "0", "new", "0", "1"]:
        guides.check(Guided.regex(pattern))
    assert made == [*map(str, range(KEPT)), "new", "1"]  # the one that was least used made way
    words = np.zeros(13, dtype=np.int32)
    one, other = guides.start(Guided.regex("ab")), guides.start(replace(Guided.regex("ab"), param="x"))
    assert one is not None
    assert other is not None
    one.take(tokenizer.encode("a")[0])
    other.allowed(words)  # copies do not move together
    assert np.unpackbits(words.view(np.uint8), bitorder="little")[tokenizer.encode("a")[0]] == 1
    with pytest.raises(RuntimeError):
        one.take(tokenizer.encode("a")[0])
