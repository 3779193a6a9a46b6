"""Prompts as versioned files: variables, examples, budgets, tests and scores, and requests that name them."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import yaml
from aiohttp import web
from fastapi.testclient import TestClient
from gateway_tools import Scripted, running_gateway, until
from http_tools import call, post
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, make_tokenizer
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.engine.load import load_engine
from soma.serve.app import create_app
from soma.serve.calls import Call, Passage, Usage
from soma.serve.database import Database, ledger
from soma.serve.keys.store import KeyStore
from soma.serve.ledger.report import report
from soma.serve.running import running_service
from soma.serve.templates.config import PromptError, PromptFile
from soma.serve.templates.library import Library
from soma.serve.templates.score import compare, scores, sign_test, wilson
from soma.serve.templates.template import Rendered, Template

CAPITAL: dict[str, Any] = {
    "description": "A city for a country",
    "variables": {
        "country": {"type": "string", "max_length": 20},
        "words": {"type": "integer", "minimum": 1, "default": 1},
    },
    "messages": [
        {"role": "system", "content": "Answer in {{ words }} word{{ 's' if words > 1 else '' }}."},
        {"role": "user", "content": "Capital of {{ country }}?"},
    ],
    "examples": {
        "items": [
            {"variables": {"country": "France"}, "answer": "Paris"},
            {"variables": {"country": "Japan"}, "answer": "Tokyo"},
            {"variables": {"country": "Chile"}, "answer": "Santiago"},
        ]
    },
    "parameters": {"temperature": 0.0, "max_tokens": 5},
}
TEXT: dict[str, Any] = {
    "variables": {"q": {}},
    "text": "{{ examples }}Q: {{ q }}\nA:",
    "examples": {"form": "Q: {{ q }}\nA: {{ answer }}\n", "items": [{"variables": {"q": "1+1"}, "answer": "2"}]},
}
TESTS = [
    {"variables": {"country": "France"}, "expect": {"exact": "Paris"}},
    {"variables": {"country": "Peru"}, "expect": {"contains": ["Li", "ma"]}},
    {"variables": {"country": "Cuba"}, "expect": {"regex": "^Hav"}},
    {"variables": {"country": "Iraq"}, "expect": {"call": "judge.py:same_length"}},
]
JUDGE = "def same_length(answer, variables):\n    return 0.5 if len(answer) == len(variables['country']) else 0.0\n"


def template(value: dict[str, Any], **changes: Any) -> Template:
    return Template("p", 1, PromptFile.model_validate({**value, **changes}))


def shots(**changes: Any) -> dict[str, Any]:
    return {**CAPITAL["examples"], **changes}


def write(folder: Path, name: str, version: int, value: dict[str, Any]) -> Path:
    path = folder / name / f"{version}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prompts: capital@1 (zero-shot), capital@2 (few-shot), sums@1 (text)."""
    prompts = tmp_path / "prompts"
    write(prompts, "capital", 1, {name: value for name, value in CAPITAL.items() if name != "examples"})
    write(prompts, "capital", 2, CAPITAL)
    write(prompts, "sums", 1, TEXT)
    (prompts / "capital" / "tests.yaml").write_text(yaml.safe_dump({"cases": TESTS}))
    (prompts / "capital" / "judge.py").write_text(JUDGE)
    return prompts


# ------------------------------------------------------------------------------------------------------------ rendering


def test_zero_and_few_shot(folder: Path) -> None:
    library = Library(folder)
    _, zero = library.render("capital@1", {"country": "Peru", "words": 2})
    assert zero.messages == [
        {"role": "system", "content": "Answer in 2 words."}, {"role": "user", "content": "Capital of Peru?"},
    ]  # fmt: skip
    newest, few = library.render("capital", {"country": "Peru"})
    assert newest.version == 2
    assert few.messages is not None
    assert [turn["content"] for turn in few.messages] == [
        "Answer in 1 word.", "Capital of France?", "Paris", "Capital of Japan?", "Tokyo", "Capital of Chile?",
        "Santiago", "Capital of Peru?",
    ]  # fmt: skip
    _, text = library.render("sums", {"q": "{{ 2 }} {% raw %}"})  # values are never templates
    assert text.text == "Q: 1+1\nA: 2\nQ: {{ 2 }} {% raw %}\nA:"


def test_the_prompts_of_the_recipes() -> None:
    """Every version can be filled with every test."""
    library = Library(Path(__file__).parents[2] / "recipes" / "prompts")
    assert [each.label.partition("+")[0] for each in library] == ["capital@1", "capital@2"]
    for version in library:
        for case in library.tests(version.name).cases:
            _, made = library.render(version.label, case.variables)
            assert made.messages is not None
            assert case.variables["country"] in made.messages[-1]["content"]


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        ({"type": "string"}, "x", 3, "expected string, got an integer"),
        ({"type": "integer"}, 3, "3", "expected integer, got a string"),
        ({"type": "integer"}, 3, True, "expected integer, got a boolean"),
        ({"type": "integer"}, 3, 3.0, "expected integer, got a number"),
        ({"type": "number"}, 3, None, "expected number, got null"),
        ({"type": "boolean"}, True, 1, "expected boolean, got an integer"),
        ({"type": "date"}, "2026-11-26", "26.11.2026", "expected date as 2026-11-26, got a string"),
        ({"type": "list", "items": "integer"}, [1, 2], [1, "2"], "expected integer, got a string"),
        ({"type": "list", "minimum": 1}, ["a"], [], "list of at least 1, got 0"),
        ({"type": "string", "choices": ["a", "b"]}, "a", "c", "expected one of 'a', 'b'"),
        ({"type": "number", "maximum": 2}, 2, 2.5, "at most 2, got 2.5"),
        ({"type": "string", "max_length": 2}, "ab", "abc", "at most 2 characters, got 3"),
    ],
)
def test_variables_are_typed(kind: dict[str, Any], good: Any, bad: Any, words: str) -> None:
    made = template({"variables": {"v": kind}, "text": "{{ v }}"})
    assert str(good) == made.render({"v": good}).text
    with pytest.raises(PromptError, match=r"prompt p@1: variable v: ") as caught:
        made.render({"v": bad})
    assert words in str(caught.value)
    assert caught.value.param == "v"
    with pytest.raises(PromptError, match="variable v: is missing; expected"):
        made.render({})
    with pytest.raises(PromptError, match="variable w: is no variable of this prompt; it has v"):
        made.render({"v": good, "w": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "{{ y }}", "messages": None, "examples": None}, "y is no variable"),
        ({"messages": [{"role": "user", "content": "{% if %}"}], "examples": None}, "template, line 1"),
        ({"text": "both"}, "either messages or text"),
        ({"examples": shots(items=[{"variables": {"country": 3}, "answer": "x"}])}, "examples.items.0.variables.coun"),
        ({"examples": shots(select="nearest")}, "by"),
        ({"examples": shots(select="nearest", by="words")}, "no variable of type string"),
        ({"variables": {"country": {"type": "integer", "default": "x"}}}, "expected integer, got a string"),
        ({"parameters": {"model": "m"}}, "belongs to the request"),
        ({"budget": {"tokens": 0}}, "greater than or equal to 1"),
        ({"budgets": {}}, "Extra inputs"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path, "bad", 1, {**CAPITAL, **change})
    with pytest.raises(UserError, match=words) as caught:
        Library(tmp_path)
    assert str(path) in str(caught.value)


def test_the_sandbox() -> None:
    """A template reaches nothing but its variables."""
    for source in ("{{ v.__class__.__mro__ }}", "{{ v.append(1) }}", "{{ range(10 ** 9) | list }}"):
        with pytest.raises(PromptError, match="the template fails"):
            template({"variables": {"v": {"type": "list"}}, "text": source}).render({"v": ["a"]})


def test_references(folder: Path) -> None:
    library = Library(folder)
    label = library.get("capital").label
    assert library.get(label).version == 2
    for reference, words, status in (
        ("nobody", "no prompt nobody", 404), ("capital@9", "no version 9; it has 1, 2", 404),
        ("capital@2+00000000", "not what it was", 409), ("../capital", "expected NAME", 400),
        ("capital@", "expected NAME", 400),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=words) as caught:
            library.get(reference)
        assert caught.value.status == status
    write(folder, "capital", 2, {**CAPITAL, "description": "edited"})
    assert Library(folder).get("capital").label != label
    for name in ("x.yaml", "0.yaml", "01.yaml"):
        (folder / "capital" / name).write_text("text: x")
        with pytest.raises(UserError, match="a version is a number"):
            Library(folder)
        (folder / "capital" / name).unlink()


# ------------------------------------------------------------------------------------------------------------- examples


def test_random_examples_are_the_same_by_seed() -> None:
    picks = [template(CAPITAL, examples=shots(select="random", count=2, seed=seed)) for seed in range(20)]
    shown = [each.render({"country": "Peru"}).examples for each in picks]
    assert shown == [each.render({"country": "Cuba"}).examples for each in picks]
    assert all(len(set(places)) == 2 for places in shown)
    assert len(set(shown)) == 6  # of 3 · 2 orders


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_nearest_examples_are_a_brute_force_search(number: int, count: int, seed: int) -> None:
    """Against a plain search with one cosine at a time; the vectors are made once for all requests."""
    draw = np.random.default_rng(seed)
    vectors = {f"t{place}": draw.integers(-2, 3, 3).astype(float) for place in range(number)}
    vectors["question"] = draw.integers(-2, 3, 3).astype(float)
    asked: list[list[str]] = []

    def embed(texts: Sequence[str]) -> Sequence[Sequence[float]]:
        asked.append(list(texts))
        return [list(vectors[text]) for text in texts]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
        return float(a @ b) / norm if norm else 0.0

    items = [{"variables": {"q": f"t{place}"}, "answer": str(place)} for place in range(number)]
    made = template(TEXT, examples={"select": "nearest", "by": "q", "count": count, "items": items,
                                    "form": "{{ answer }}"})  # fmt: skip
    found = made.render({"q": "question"}, embed=embed).examples
    likeness = [cosine(vectors[f"t{place}"], vectors["question"]) for place in range(number)]
    assert len(set(found)) == len(found) == min(count, number)
    values = [likeness[place] for place in found]
    assert np.allclose(values, sorted(likeness)[number - len(found) :])
    made.render({"q": "question"}, embed=embed)
    assert [len(texts) for texts in asked] == [number, 1, 1]


def test_nearest_needs_an_encoder(folder: Path) -> None:
    write(folder, "near", 1, {**CAPITAL, "examples": shots(select="nearest", by="country")})
    with pytest.raises(PromptError, match="need an encoder"):
        Library(folder).render("near", {"country": "Peru"})
    away = {"encoder": {"url": "http://127.0.0.1:9/v1", "model": "e"}}
    (folder / "library.yaml").write_text(yaml.safe_dump(away))
    with pytest.raises(PromptError, match="does not answer") as caught:
        Library(folder).render("near", {"country": "Peru"})
    assert caught.value.status == 503


def test_the_encoder_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real HTTP encoder, with its key; the example with most letters in common is nearest."""
    monkeypatch.setenv("ENCODER_KEY", "secret")

    async def embeddings(request: web.Request, value: dict[str, Any]) -> web.Response:
        rows = [
            {"index": place, "embedding": [float(text.lower().count(chr(97 + letter))) for letter in range(26)]}
            for place, text in enumerate(value["input"])
        ]
        return web.json_response({"data": rows[::-1]})  # in no order

    with Scripted() as upstream:
        upstream.answer = embeddings
        told = {"encoder": {"url": upstream.url, "model": "letters", "key_env": "ENCODER_KEY"}}
        (folder / "library.yaml").write_text(yaml.safe_dump(told))
        write(folder, "near", 1, {**CAPITAL, "examples": shots(select="nearest", by="country", count=1)})
        _, made = Library(folder).render("near", {"country": "Jaan"})
        assert made.examples == (1,)
        assert upstream.headers[0]["Authorization"] == "Bearer secret"


# --------------------------------------------------------------------------------------------------------------- budget


def words(prompt: list[dict[str, str]] | str) -> int:
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return sum(len(text.split()) for text in texts)


@pytest.mark.parametrize("drop", ["first", "last", "longest"])
def test_examples_are_dropped_until_it_fits(drop: str) -> None:
    """For every budget: as many examples as fit, left out in the order that was said; none fits: an error."""
    lengths = [3, 1, 5, 5]
    items = [{"variables": {"country": "x"}, "answer": "a " * length} for length in lengths]
    order = {"first": [0, 1, 2, 3], "last": [3, 2, 1, 0], "longest": [3, 2, 0, 1]}[drop]
    bare = words([{"content": "Answer in 1 word."}, {"content": "Capital of Peru?"}])
    for tokens in range(1, 40):
        made = template(CAPITAL, examples={"items": items}, budget={"tokens": tokens, "drop": drop})
        left = list(range(4))
        for place in [None, *order]:
            if place is not None:
                left.remove(place)
            if (need := bare + sum(3 + lengths[each] for each in left)) <= tokens:
                break
        else:
            with pytest.raises(PromptError, match=rf"{bare} tokens without any example, its budget is {tokens}"):
                made.render({"country": "Peru"}, count=words)
            continue
        found = made.render({"country": "Peru"}, count=words)
        assert (list(found.examples), found.tokens) == (left, need)
    with pytest.raises(PromptError, match="needs a tokenizer"):
        made.render({"country": "Peru"})


def test_a_budget_by_a_real_tokenizer(folder: Path) -> None:
    make_tokenizer(folder / "tok")
    (folder / "library.yaml").write_text("tokenizer: tok")
    write(folder, "capital", 3, {**CAPITAL, "budget": {"tokens": 60}})
    library = Library(folder)
    _, made = library.render("capital@3", {"country": "Peru"})
    assert library.tokenizer is not None
    assert made.messages is not None
    assert made.tokens == len(library.tokenizer.encode_chat(made.messages, True)) <= 60
    assert len(made.examples) < 3


# --------------------------------------------------------------------------------------------------- tests and scores


KNOWN = {"France": " Paris\n", "Peru": "Lima", "Cuba": "Havana", "Iraq": "Bagh"}


def answering(known: dict[str, str]) -> Callable[[web.Request, dict[str, Any]], Any]:
    async def answer(request: web.Request, value: dict[str, Any]) -> web.Response:
        country = value["messages"][-1]["content"].removeprefix("Capital of ").removesuffix("?")
        few = len(value["messages"]) > 2
        said = known[country] if few or country != "Cuba" else "?"  # zero-shot it does not know one
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": 10 * len(value["messages"]), "completion_tokens": 1}
        return web.json_response({"choices": [choice], "usage": usage})

    return answer


def soma(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["prompt", *arguments])
    return result


def test_scores_of_versions(folder: Path) -> None:
    """Two versions against a service: kept as JSON lines, compared case by case; an edited file is told apart."""
    at = ["--prompts", str(folder)]
    with Scripted() as upstream:
        upstream.answer = answering(KNOWN)
        where = ["--url", upstream.url, "--model", "m", *at]
        assert "100.0%" not in (first := soma("test", "capital@1", *where)).output, first.output
        second = soma("test", "capital", *where, "--least", "0.9")
        assert second.exit_code == 1  # 3.5 of 4
        assert "capital@2" in second.output
        assert "87.5% of 4" in second.output
        assert upstream.seen[0]["temperature"] == 0.0
        assert upstream.seen[0]["max_tokens"] == 5
    rows = scores(Library(folder), "capital")
    assert [row.score for row in rows] == [1, 1, 0, 0.5, 1, 1, 1, 0.5]
    one, two = compare(Library(folder), "capital")
    assert (one.mean, two.mean, two.better, two.worse, two.p) == (2.5 / 4, 3.5 / 4, 1, 0, 1.0)
    assert (one.prompt_tokens, two.prompt_tokens) == (20, 80)
    assert "better 1, worse 0" in soma("compare", "capital", *at).output
    write(folder, "capital", 2, {**CAPITAL, "description": "edited"})
    edited = compare(Library(folder), "capital", "m")[1]
    assert not edited.is_current
    assert "edited since" in soma("compare", "capital", *at).output
    listed = json.loads(soma("list", "--json", *at).output)
    assert [row["scores"] for row in listed] == [{"m": 2.5 / 4}, {}, {}]
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert sign_test(5, 0) == 0.0625
    with pytest.raises(UserError, match="no version was tested yet"):
        compare(Library(folder), "sums")


def test_what_a_test_cannot_do(folder: Path) -> None:
    at = ["--prompts", str(folder), "--model", "m"]
    away = soma("test", "capital", "--url", "http://127.0.0.1:9/v1", *at)
    assert isinstance(away.exception, UserError)
    assert "does not answer" in str(away.exception)
    with Scripted() as upstream:
        upstream.answer = lambda request, value: refused()
        refusal = soma("test", "capital", "--url", upstream.url, *at)
        assert "status 400: no such model" in str(refusal.exception)
    missing = soma("test", "sums", "--url", "http://127.0.0.1:9/v1", *at)
    assert "tests.yaml: no such file" in str(missing.exception)
    assert not (folder / "capital" / "scores.jsonl").exists()
    (folder / "capital" / "judge.py").write_text("def same_length(answer, variables):\n    return 7\n")
    with Scripted() as upstream:
        upstream.answer = answering(KNOWN)
        wrong = soma("test", "capital", "--url", upstream.url, *at)
    assert "from 0 to 1" in str(wrong.exception)


async def refused() -> web.Response:
    return web.json_response({"error": {"message": "no such model"}}, status=400)


def test_the_command(folder: Path) -> None:
    at = ["--prompts", str(folder)]
    assert "capital@2+" in soma("list", *at).output
    shown = soma("show", "capital", *at).output
    assert PromptFile.model_validate(yaml.safe_load(shown)) == Library(folder).get("capital").file
    made = soma("render", "capital@1", "--var", "country=Peru", "--var", "words=2", "--json", *at)
    assert json.loads(made.output)["messages"][1]["content"] == "Capital of Peru?"
    assert "[user]\nCapital of Peru?" in soma("render", "capital@1", "--var", "country=Peru", *at).output
    assert soma("render", "sums", "--var", 'q="3"', *at).stdout.endswith("Q: 3\nA:")
    assert "expected string, got an integer" in str(soma("render", "sums", "--var", "q=3", *at).exception)


# ----------------------------------------------------------------------------------------------------------- in service


@pytest.fixture
def upstream() -> Iterator[Scripted]:
    with Scripted() as made:
        yield made


def test_the_gateway_fills_prompts_in(folder: Path, tmp_path: Path, upstream: Scripted) -> None:
    """By body, by OpenAI's object, by header; the version is in the answer's header and in the ledger."""
    database = str(tmp_path / "keys.db")
    _, secret = KeyStore(Database(database)).create("alice")
    config = {"models": {"m": {"upstreams": [{"url": upstream.url}]}}, "keys": database, "prompts": str(folder)}
    auth = {"Authorization": f"Bearer {secret.text}", "Content-Type": "application/json"}
    label = Library(folder).get("capital@2").label
    variables = {"country": "Peru"}
    named = {"model": "m", "prompt": "capital@2", "prompt_variables": variables}
    openai = {"model": "m", "prompt": {"id": "capital", "version": "2", "variables": variables}}
    header = {"X-Soma-Prompt": label, "X-Soma-Prompt-Variables": json.dumps(variables)}
    with running_gateway(tmp_path, config) as gateway:
        path = "/v1/chat/completions"
        for body, more in ((named, {}), (openai, {}), ({"model": "m"}, header)):
            status, headers, _ = call(gateway.url, "POST", path, json.dumps(body), {**auth, **more})
            assert (status, headers["x-soma-prompt"]) == (200, label)
        assert all(len(seen["messages"]) == 8 and seen["max_tokens"] == 5 for seen in upstream.seen)
        assert not any("prompt" in seen or "prompt_variables" in seen for seen in upstream.seen)
        more = {**named, "messages": [{"role": "user", "content": "And?"}], "max_completion_tokens": 9}
        assert post(gateway.url, path, more, **auth)[0] == 200
        last = upstream.seen[-1]
        assert (last["messages"][-1]["content"], last.get("max_tokens")) == ("And?", None)
        assert post(gateway.url, "/v1/completions", {"model": "m", "prompt": "sums", "prompt_variables": {"q": "x"}},
                    **auth)[0] == 200  # fmt: skip
        assert upstream.seen[-1]["prompt"].endswith("Q: x\nA:")
        assert post(gateway.url, "/v1/completions", {"model": "m", "prompt": "sums"}, **auth)[0] == 200
        assert upstream.seen[-1]["prompt"] == "sums"  # a text is a text
        assert post(gateway.url, "/v1/responses", {**openai, "input": "And?"}, **auth)[0] == 200
        assert upstream.seen[-1]["input"][-1] == {"role": "user", "content": "And?"}
        assert upstream.seen[-1]["max_output_tokens"] == 5
        for change, status, param in (
            ({"prompt": "nobody"}, 404, "prompt"), ({"prompt_variables": {}}, 400, "prompt_variables.country"),
            ({"prompt_variables": {"country": 3}}, 400, "prompt_variables.country"), ({"prompt_variables": 3}, 400,
             "prompt_variables"), ({"prompt": {"id": "capital", "x": 1}}, 400, "prompt"),
            ({"prompt": "capital@2+00000000"}, 409, "prompt"), ({"messages": 3}, 400, "messages"),
        ):  # fmt: skip
            found, said = post(gateway.url, path, {**named, **change}, **auth)
            assert (found, said["error"]["param"]) == (status, param), said
        found, said = post(gateway.url, "/v1/completions", named, **auth)
        assert (found, said["error"]["code"]) == (400, "invalid_prompt")
        found, said = post(gateway.url, path, named, **auth, **header)
        assert "named twice" in said["error"]["message"]
        found, said = post(
            gateway.url, path, {"model": "m"}, **auth, **{"X-Soma-Prompt": "capital", "X-Soma-Prompt-Variables": "{"}
        )
        assert (found, said["error"]["param"]) == (400, "prompt_variables")
        where = Database(database)

        def settled() -> bool:
            with where.read() as connection:
                return len(connection.execute(sa.select(ledger).where(ledger.c.settled_at.is_not(None))).all()) == 7

        until(settled)
    lines = {line.by["prompt"]: line.calls for line in report(where, ["prompt"])}
    assert lines == {label: 5, Library(folder).get("sums").label: 1, None: 1}


def test_a_gateway_takes_prompts_anew(folder: Path, tmp_path: Path, upstream: Scripted) -> None:
    """SIGHUP: a new version is there; one that makes no sense leaves all as it was."""
    import signal

    config = {"models": {"m": {"upstreams": [{"url": upstream.url}]}}, "prompts": str(folder)}
    named = {"model": "m", "prompt": "capital", "prompt_variables": {"country": "Peru"}}
    with running_gateway(tmp_path, config) as gateway:

        def version() -> str:
            headers = call(gateway.url, "POST", "/v1/chat/completions", json.dumps(named),
                           {"Content-Type": "application/json"})[1]  # fmt: skip
            return headers["x-soma-prompt"].partition("+")[0]

        assert version() == "capital@2"
        write(folder, "capital", 3, CAPITAL)
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: version() == "capital@3")
        bad = write(folder, "capital", 4, {"text": "{{ nothing }}"})
        gateway.process.send_signal(signal.SIGHUP)
        assert version() == "capital@3"
        bad.unlink()
        write(folder, "capital", 5, CAPITAL)
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: version() == "capital@5")


def test_the_service_fills_prompts_in(folder: Path, tmp_path: Path) -> None:
    """A real engine gets what the template makes: as many prompt tokens as the same messages sent by hand."""
    engine, tokenizer, _ = load_engine(make_model(tmp_path / "model"))
    library = Library(folder, tokenizer=tokenizer)
    made: Rendered = library.render("capital@2", {"country": "Peru"})[1]
    body = {"model": "m", "prompt": "capital@2", "prompt_variables": {"country": "Peru"}}
    path = "/v1/chat/completions"
    try:
        with TestClient(create_app(engine, tokenizer, "m", prompts=library)) as client:
            by_name = client.post(path, json=body)
            by_hand = client.post(path, json={"model": "m", "messages": made.messages, "temperature": 0,
                                              "max_tokens": 5})  # fmt: skip
            assert by_name.status_code == 200, by_name.text
            assert by_name.headers["x-soma-prompt"] == made.label
            assert by_name.json()["choices"] == by_hand.json()["choices"]
            for count in ("prompt_tokens", "completion_tokens"):  # of cached ones the second has more
                assert by_name.json()["usage"][count] == by_hand.json()["usage"][count]
            nobody = client.post(path, json={**body, "prompt": "nobody"})
            assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "prompt_not_found")
            text = {"model": "m", "prompt": "sums", "prompt_variables": {"q": "x"}, "max_tokens": 2}
            assert client.post("/v1/completions", json=text).status_code == 200
            openai = {"model": "m", "prompt": {"id": "capital", "variables": {"country": "Peru"}}}
            answer = client.post("/v1/responses", json=openai)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["input_tokens"] == by_name.json()["usage"]["prompt_tokens"]
            strange = client.post("/v1/responses", json={**openai, "prompt_variables": {}})
            assert strange.status_code == 400  # variables are in the object already
        with TestClient(create_app(engine, tokenizer, "m")) as client:
            without = client.post(path, json=body)
            assert (without.status_code, without.json()["error"]["code"]) == (400, "no_prompts")
    finally:
        engine.close()


@pytest.mark.slow
def test_soma_serve_takes_a_folder_of_prompts(folder: Path, tmp_path: Path) -> None:
    with running_service(make_model(tmp_path / "model"), prompts=str(folder), name="m") as url:
        body = {"model": "m", "prompt": "capital@1", "prompt_variables": {"country": "Peru"}}
        assert post(url, "/v1/chat/completions", body)[0] == 200
    with (
        pytest.raises(UserError, match="no such folder; prompts are"),
        running_service(tmp_path / "model" / "tiny", prompts=str(tmp_path / "nothing")),
    ):
        pass


def test_the_version_is_in_the_trace() -> None:
    """A span of the call with model, version and tokens; an error marks it."""
    trace_sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from soma.serve.graphs import trace

    exporter = InMemorySpanExporter()
    provider = trace_sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace.trace, "get_tracer_provider", lambda: provider)
        patch.setattr(trace.trace, "get_tracer", provider.get_tracer)
        a_call = Call("/v1/chat/completions", "m", "127.0.0.1", tags={"prompt": "capital@2+0a1b2c3d"})
        asyncio.run(Passage(a_call, []).leave(Usage(7, 3, outcome="error")))
    (span,) = exporter.get_finished_spans()
    told = dict(span.attributes or {})
    assert (told["soma.prompt"], told["gen_ai.usage.output_tokens"], told["soma.outcome"]) == (
        "capital@2+0a1b2c3d", 3, "error",
    )  # fmt: skip
    assert not span.status.is_ok


def test_random_names_never_leave_the_folder(folder: Path) -> None:
    library = Library(folder)
    draw = random.Random(0)
    for _ in range(300):
        name = "".join(draw.choices("ab./@+1\\%", k=draw.randint(1, 12)))
        with pytest.raises(PromptError):
            library.get(name)
