"""Tool calls and structured output through the openai client, against a real service on a model that knows nothing."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from http_tools import metric, post

from soma.model.tokenizer import Tokenizer

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "hello"}]
CITY: dict[str, Any] = {
    "type": "object", "properties": {"city": {"enum": ["Köln", "Oslo"]}, "days": {"type": "integer", "maximum": 99}},
    "required": ["city", "days"], "additionalProperties": False,
}  # fmt: skip
SUM: dict[str, Any] = {
    "type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False,
}  # fmt: skip
SCHEMAS = {"weather": CITY, "add": SUM}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"the {name}", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


@pytest.fixture
def client(tools_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=tools_url + "/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 1500, **more}
    return client.chat.completions.create(**settings)


def check_calls(calls: Any) -> list[str]:
    """The functions that were called, each as its schema says."""
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


def test_required_calls_are_valid_whole_and_streamed(client: openai.OpenAI) -> None:
    seen: set[str] = set()
    for seed in range(6):
        choice = ask(client, tool_choice="required", seed=seed).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        seen |= set(check_calls(choice.message.tool_calls))
        streamed: list[dict[str, str]] = []
        reasons = []
        for chunk in ask(client, tool_choice="required", seed=seed, stream=True):
            reasons.append(chunk.choices[0].finish_reason)
            assert not chunk.choices[0].delta.content
            for part in chunk.choices[0].delta.tool_calls or []:
                if part.id:
                    assert part.index == len(streamed)
                    streamed.append({"name": part.function.name, "arguments": ""})
                streamed[part.index]["arguments"] += part.function.arguments or ""
        assert streamed == [
            {"name": call.function.name, "arguments": call.function.arguments} for call in choice.message.tool_calls
        ]
        assert reasons[-1] == "tool_calls"
        assert set(reasons[:-1]) == {None}
    assert seen == {"weather", "add"}


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    for seed in range(5):
        choice = ask(client, tool_choice={"type": "function", "function": {"name": "add"}}, seed=seed).choices[0]
        assert check_calls(choice.message.tool_calls) == ["add"]
        assert choice.finish_reason == "tool_calls"
    single = [ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed) for seed in range(8)]
    assert {len(done.choices[0].message.tool_calls) for done in single} == {1}


def test_several_choices_of_calls(client: openai.OpenAI) -> None:
    done = ask(client, tool_choice="required", n=3, seed=1, logprobs=True)
    for choice in done.choices:
        check_calls(choice.message.tool_calls)
        assert choice.logprobs.content


def test_auto_and_none_leave_text_alone(client: openai.OpenAI) -> None:
    """This model calls nothing by itself; tools that it may not call are not shown to it either."""
    for choice in ("auto", None):
        done = ask(client, max_tokens=20, temperature=0, **({} if choice is None else {"tool_choice": choice}))
        assert done.choices[0].message.tool_calls is None
        assert done.choices[0].finish_reason == "length"
        chunks = list(ask(client, max_tokens=20, temperature=0, stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said == done.choices[0].message.content
    silent = ask(client, max_tokens=20, temperature=0, tool_choice="none")
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, temperature=0)
    assert silent.usage == plain.usage
    assert done.usage.prompt_tokens > plain.usage.prompt_tokens  # type: ignore[union-attr]


def test_calls_and_their_results_go_back(client: openai.OpenAI, tools_folder: Path) -> None:
    first = ask(client, tool_choice={"type": "function", "function": {"name": "weather"}}, seed=3).choices[0].message
    call = first.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    assert ask(client, messages=[*HELLO, first.model_dump(), result], max_tokens=3).choices
    shown = Tokenizer.load(tools_folder).render_chat(
        [{"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "weather", "arguments": json.loads(call.function.arguments)}}]}], False,
    )  # fmt: skip
    object_ = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    assert f'"arguments": {object_}}}' in shown  # the template got an object, not its text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": []}},
      "required": ["a"]}}}], "tool_choice": "required"}, "tools"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "messages.1.tool_calls"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_grammar": "start: b"}, "guided_grammar"),
    ({"guided_json": "{", "response_format": {"type": "text"}}, "guided_json"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(tools_url: str, change: dict[str, Any], param: str) -> None:
    """A 400 that names the field, and nothing reaches the engine."""
    before = metric(tools_url, "vllm:prompt_tokens_total")
    body = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 3, **change}
    status, answer = post(tools_url, "/v1/chat/completions", body)
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert metric(tools_url, "vllm:prompt_tokens_total") == before


def test_a_template_without_tools(service_url: str) -> None:
    body = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 3}
    status, answer = post(service_url, "/v1/chat/completions", body)
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "tools_not_supported")
    assert post(service_url, "/v1/chat/completions", {**body, "tool_choice": "none"})[0] == 200


# Structured output:


def test_response_formats(client: openai.OpenAI) -> None:
    def content(**more: Any) -> str:
        done = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=400, **more)
        assert done.choices[0].finish_reason == "stop"
        return done.choices[0].message.content or ""

    for seed in range(6):
        form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
        text = content(seed=seed, response_format=form)
        jsonschema.validate(json.loads(text), CITY)
        assert content(seed=seed, extra_body={"structured_outputs": {"json": CITY}}) == text
        assert content(seed=seed, extra_body={"guided_json": json.dumps(CITY)}) == text
    end = {str(client.post("/../tokenize", body={"model": MODEL, "prompt": "}"}, cast_to=object)["tokens"][0]): 30}  # type: ignore[index]
    assert isinstance(json.loads(content(seed=0, response_format={"type": "json_object"}, logit_bias=end)), dict)


def test_vllms_fields(client: openai.OpenAI) -> None:
    for fields, pattern in (
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"), ({"guided_regex": "a|b{2}"}, "a|bb"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"), ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "(" /[a-z]/ ")"'}}, r"\([a-z]\)"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ):  # fmt: skip
        done = client.completions.create(model=MODEL, prompt="hello", max_tokens=20, n=4, extra_body=fields)
        assert all(re.fullmatch(pattern, choice.text) for choice in done.choices), (fields, done.choices)
        chunks = client.completions.create(model=MODEL, prompt="hello", max_tokens=20, stream=True, extra_body=fields)
        assert re.fullmatch(pattern, "".join(chunk.choices[0].text for chunk in chunks))
