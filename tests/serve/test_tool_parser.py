"""Calls read out of answers, however the text is cut; grammars of calls, walked at random and read back."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from soma.engine.guided import Guided, Guides
from soma.model.tokenizer import Tokenizer
from soma.serve.errors import ApiError
from soma.serve.tool_parser import HERMES, LLAMA, MISTRAL, Delta, ToolFormat, ToolParser
from soma.serve.tools import Tool, format_of, grammar

NAMES = {"weather", "add"}
WEATHER, ADD = (
    '{"name": "weather", "arguments": {"city": "Köln \\"}{\\" ]"}}',
    '{"name": "add", "arguments": {"x": [1, {}]}}',
)
CITY, SUM = ("weather", {"city": 'Köln "}{" ]'}), ("add", {"x": [1, {}]})
OTHER = '{"name": "other", "arguments": {}}'

# form, answer, its text, its calls
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [CITY]),
    (HERMES, f"Hm.\n\n<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>\n", "Hm.", [CITY, SUM]),
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>\nDone.", "\nDone.", [CITY]),
    (HERMES, "plain <tool text, 1 < 2", "plain <tool text, 1 < 2", []),
    (HERMES, "ends in <tool_ca", "ends in <tool_ca", []),
    (HERMES, "<tool_call>\nnonsense</tool_call>", "<tool_call>\nnonsense</tool_call>", []),
    (HERMES, f"<tool_call>\n{OTHER}\n</tool_call>", f"<tool_call>\n{OTHER}\n</tool_call>", []),
    (HERMES, f"<tool_call>x\n<tool_call>{ADD}</tool_call>", "<tool_call>x", [SUM]),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "add"}</tool_call>', "", [("add", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("add", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"x": 1}, "id": "7"}</tool_call>', "", [("add", {"x": 1})]),
    (HERMES, f"<tool_call>{ADD}</tool_c", "", [SUM]),
    (HERMES, '<tool_call>\n{"name": "ad', '<tool_call>\n{"name": "ad', []),
    (HERMES, "", "", []),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]", "", [CITY, SUM]),
    (MISTRAL, f"Hm. [TOOL_CALLS][{ADD}]", "Hm.", [SUM]),
    (MISTRAL, "[TOOL_CALLS] no list", "[TOOL_CALLS] no list", []),
    (MISTRAL, "a [list]", "a [list]", []),
    (LLAMA, f"{WEATHER.replace('arguments', 'parameters')}; {ADD}", "", [CITY, SUM]),
    (LLAMA, f"\n{ADD}", "", [SUM]),
    (LLAMA, '{"answer": 42} is it', '{"answer": 42} is it', []),
    (LLAMA, f"No. {ADD}", f"No. {ADD}", []),
    (LLAMA, "  ", "  ", []),
]  # fmt: skip


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """The text, the calls with their arguments as they came, and the calls' ids."""
    text, calls, ids = "", [], []
    for delta in deltas:
        text += delta.content
        if delta.name:
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
            ids.append(delta.id)
        elif delta.index is not None:
            assert delta.index == len(calls) - 1  # only the last call grows
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return text, calls, ids


def parse(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolParser(form, NAMES, {})
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.end()
    text, calls, ids = joined(deltas)
    assert parser.calls == len(calls) == len(set(ids))
    return text, [(name, json.loads(arguments or "{}")) for name, arguments in calls]


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"), CASES, ids=lambda value: value[:30] if isinstance(value, str) else ""
)
def test_answers_at_once_and_letter_by_letter(
    form: ToolFormat, answer: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    assert parse(form, [answer]) == (text, calls)
    assert parse(form, list(answer)) == (text, calls)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CASES), st.sets(st.integers(0, 90), max_size=8))
def test_answers_cut_anywhere(case: tuple[ToolFormat, str, str, list[tuple[str, Any]]], cuts: set[int]) -> None:
    form, answer, text, calls = case
    edges = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    assert parse(form, [answer[a:b] for a, b in pairwise(edges)]) == (text, calls)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([HERMES, MISTRAL, LLAMA]), st.text(alphabet='<tool_cal>/[]TOOLCALLS{}"name:,; ad', max_size=60))
def test_no_text_is_lost_and_nothing_hangs(form: ToolFormat, answer: str) -> None:
    """What holds no call comes back as it was, but for white space around marks."""
    text, calls = parse(form, list(answer))
    assert calls == []
    assert text.split() == answer.split() or "".join(text.split()) == "".join(answer.split())


def test_arguments_go_out_as_they_come() -> None:
    parser = ToolParser(HERMES, NAMES, {})
    begun = parser.push('<tool_call>{"name": "add", "arguments": {"x":')
    assert [(delta.name, delta.arguments) for delta in begun] == [("add", ""), ("", '{"x":')]
    assert [delta.arguments for delta in parser.push(" 12")] == [" 12"]
    assert [delta.arguments for delta in parser.push("3}}</tool_call>")] == ["3}"]
    assert parser.end() == []


def test_a_call_that_breaks_off_stays_a_call() -> None:
    """The answer reached its length: what came of the arguments is all there is."""
    text, calls, _ = joined(ToolParser(HERMES, NAMES, {}).push('<tool_call>{"name": "add", "arguments": {"x": 1'))
    assert (text, calls) == ("", [("add", '{"x": 1')])
    parser = ToolParser(HERMES, NAMES, {})
    parser.push('<tool_call>{"name": "add", "arguments": {"x": 1')
    assert parser.end() == []


def test_ids() -> None:
    for form, pattern in ((HERMES, r"call_[A-Za-z0-9]{24}"), (MISTRAL, r"[A-Za-z0-9]{9}")):
        _, _, ids = joined(ToolParser(form, NAMES, {}).push(form.first + ADD))
        assert re.fullmatch(pattern, ids[0])


def test_forms_are_known_by_their_templates() -> None:
    assert format_of("{% for tool in tools %}<tool_call>{{ tool }}") is HERMES
    assert format_of("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]") is MISTRAL
    assert format_of('{"name": function name, "parameters": …}<|start_header_id|>') is LLAMA
    for other in ("<|user|>", "<tool_call><function=f>", "[TOOL_CALLS]f[ARGS]{}"):
        with pytest.raises(ApiError, match="no form of tool calls") as caught:
            format_of(other)
        assert (caught.value.status, caught.value.param) == (400, "tools")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False, "$defs": {"city": {"enum": ["Köln", 'a "b"']}},
}  # fmt: skip
EMPTY: dict[str, Any] = {"type": "object", "additionalProperties": False}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}),
    Tool.model_validate({"type": "function", "function": {"name": "add", "parameters": EMPTY}}),
]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
def test_random_walks_through_the_grammar_are_calls(tmp_path: Path, form: ToolFormat, special: bool) -> None:
    """Any way through the grammar is read back as valid calls, also where the marks are special tokens without text."""
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    marks: dict[int, str] = {}
    if special and form.mark:
        tokenizer.inner.add_special_tokens([form.mark, form.close] if form is HERMES else [form.mark])
        tokenizer = Tokenizer(tokenizer.inner, tokenizer.special_tokens, tokenizer.chat_templates, tokenizer.eos_ids)
        marks = {tokenizer.inner.token_to_id(text): text for text in (form.mark, form.close) if
                 tokenizer.inner.token_to_id(text) is not None and len(text) > 1}  # fmt: skip
    size = tokenizer.vocab_size
    guides = Guides(tokenizer, size)
    counts: set[int] = set()
    for seed in range(20):
        guide = guides.start(Guided.grammar(grammar(form, TOOLS, 1 + seed % 3, marks)))
        assert guide is not None
        draw, ids = random.Random(seed), []
        while not guide.finished and len(ids) < 600:
            words = np.zeros(-(-size // 32), dtype=np.int32)
            guide.allowed(words)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            ends = tokenizer.eos_ids[0] in allowed and draw.random() < 0.5
            token = tokenizer.eos_ids[0] if ends else int(draw.choice(allowed))
            guide.take(token)
            ids.append(token)
        assert guide.finished
        decoder, parser = tokenizer.stream_decoder(), ToolParser(form, NAMES, marks)
        deltas = [delta for id in ids for delta in parser.push(decoder.push(id), id)] + parser.end()
        text, calls, _ = joined(deltas)
        assert text == ""
        assert 1 <= len(calls) <= 1 + seed % 3
        counts.add(len(calls))
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMA if name == "weather" else EMPTY)
    assert len(counts) > 1
