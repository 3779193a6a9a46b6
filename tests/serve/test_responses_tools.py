"""Tools in /v1/responses through the openai client: calls as items, whole and as events, and what functions returned as
input."""

import json
from typing import Any

import openai
import pytest
from http_tools import post
from test_tools import SCHEMAS, check_calls

from soma.engine.request import TokenEvent
from soma.serve.response_items import Items
from soma.serve.tool_parser import HERMES, ToolParser

TOOLS: Any = [
    {"type": "function", "name": name, "description": f"the {name}", "parameters": schema, "strict": True}
    for name, schema in SCHEMAS.items()
]
ASK: dict[str, Any] = {"model": "tiny", "input": "hello", "tools": TOOLS, "max_output_tokens": 1500}
PARTS = ("Let me see. ", '<tool_call>\n{"name": "weather", "argu', 'ments": {"city": "Oslo", ', '"days": 3}}\n</tool_',
         'call>\n<tool_call>\n{"name": "add", "arguments": {"x": true}}\n</tool_call>')  # fmt: skip


@pytest.fixture
def client(tools_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=tools_url + "/v1", api_key="none", max_retries=0)


def parser() -> ToolParser:
    return ToolParser(HERMES, set(SCHEMAS), {})


def said(*texts: str) -> list[TokenEvent]:
    ends = [None] * (len(texts) - 1) + ["stop"]
    return [TokenEvent(1, text, finish_reason=end) for text, end in zip(texts, ends, strict=True)]


def test_required_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    """The same calls, whose events the client puts together to the same items."""
    for seed in range(3):
        more = {**ASK, "tool_choice": "required", "extra_body": {"seed": seed}}
        whole = client.responses.create(**more)
        assert whole.status == "completed"
        assert {item.type for item in whole.output} == {"function_call"}
        check_items(whole.output)
        with client.responses.stream(**more) as stream:
            events = list(stream)
            last = stream.get_final_response()
        assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == sorted(
            event.sequence_number for event in events if hasattr(event, "sequence_number")
        )
        got = [(item.name, item.arguments) for item in last.output]
        assert got == [(item.name, item.arguments) for item in whole.output]  # type: ignore[union-attr]
        for place, item in enumerate(last.output):
            mine = [e for e in events if getattr(e, "output_index", None) == place]
            deltas = "".join(e.delta for e in mine if e.type == "response.function_call_arguments.delta")
            assert deltas == item.arguments
            assert mine[0].type == "response.output_item.added"
            assert (mine[-2].type, mine[-1].type) == (
                "response.function_call_arguments.done", "response.output_item.done")  # fmt: skip


def check_items(items: Any) -> None:
    """Each call has ids of its own and arguments as its schema says."""
    assert len({item.id for item in items} | {item.call_id for item in items}) == 2 * len(items)

    class Call:
        def __init__(self, item: Any) -> None:
            self.id, self.type, self.function = item.call_id, "function", item

    check_calls([Call(item) for item in items])


def test_a_conversation_with_calls(client: openai.OpenAI) -> None:
    """What came back goes in again: the prompt is that of chat completions with the same turns."""
    named: Any = {"type": "function", "name": "add"}
    first = client.responses.create(**ASK, tool_choice=named, extra_body={"seed": 0})
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "add")  # type: ignore[union-attr]
    assert first.tool_choice.name == "add"  # type: ignore[union-attr]
    assert [tool.name for tool in first.tools] == list(SCHEMAS)  # type: ignore[union-attr]
    back = [{"type": "input_text", "text": "4"}, {"type": "input_text", "text": "2"}]
    for output in ("42", back):
        items = [{"role": "user", "content": "hello"}, call.model_dump(),
                 {"type": "function_call_output", "call_id": call.call_id, "output": output}]  # type: ignore[union-attr] # fmt: skip
        again = client.responses.create(**{**ASK, "input": items, "max_output_tokens": 4}, temperature=0)
        function = {"name": call.name, "arguments": call.arguments}  # type: ignore[union-attr]
        chat = client.chat.completions.create(
            model="tiny", max_tokens=4, temperature=0,
            tools=[{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS],
            messages=[{"role": "user", "content": "hello"},
                      {"role": "assistant", "content": "", "tool_calls": [
                          {"id": call.call_id, "type": "function", "function": function}]},  # type: ignore
                      {"role": "tool", "tool_call_id": call.call_id, "content": "42"}],  # type: ignore[union-attr]
        )  # fmt: skip
        assert again.usage is not None
        assert chat.usage is not None
        assert again.usage.input_tokens == chat.usage.prompt_tokens
        assert again.output_text == chat.choices[0].message.content
    plain = client.responses.create(**{**ASK, "max_output_tokens": 4}, tool_choice="none")
    assert [item.type for item in plain.output] == ["message"]


def test_text_before_and_between_calls() -> None:
    """A message, then two calls, then text again: four items, each opened and closed once, in order."""
    items = Items(parser())
    events = [each for event in said(*PARTS, " Done.") for each in items.take(event)]
    events += items.end("completed")
    assert [item["type"] for item in items.items] == ["message", "function_call", "function_call", "message"]
    assert [item["status"] for item in items.items] == ["completed"] * 4
    assert items.items[0]["content"][0]["text"].strip() == "Let me see."
    assert json.loads(items.items[1]["arguments"]) == {"city": "Oslo", "days": 3}
    assert json.loads(items.items[2]["arguments"]) == {"x": True}
    kinds = [kind.removeprefix("response.") for kind, _ in events]
    assert [kind for kind in kinds if kind.startswith("output_item")] == ["output_item.added", "output_item.done"] * 4
    opened = [more["output_index"] for kind, more in events if kind.endswith("output_item.added")]
    assert opened == [0, 1, 2, 3]
    shown = [more["item"] for kind, more in events if kind.endswith("output_item.added")]
    assert [item.get("arguments", item.get("content")) for item in shown] == [[], "", "", []]


def test_an_answer_cut_short_or_empty() -> None:
    items = Items(parser())
    for event in said(*PARTS[:3]):
        items.take(event)
    items.end("incomplete")
    assert [item["status"] for item in items.items] == ["completed", "incomplete"]
    empty = Items(None)
    assert next(iter(empty.end("completed")))[0] == "response.output_item.added"
    assert empty.items[0]["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "only tools of type function"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools", "tools.0.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "same name"),
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice", "not among the tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "together with tools"),
        ({"input": [{"type": "function_call", "name": "add"}]}, "input", "a call_id, a name and arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input", "expected text"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "only messages"),
    ],
)
def test_what_is_refused(tools_url: str, changes: dict[str, Any], param: str, words: str) -> None:
    status, value = post(tools_url, "/v1/responses", {**ASK, **changes})
    assert (status, value["error"]["param"]) == (400, param)
    assert words in value["error"]["message"]
