"""Conversion between schemas of instruction data: any way there and back, checked on generated and on real rows."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.config import InstructConfig
from soma.data.corpus import read_corpus
from soma.data.instruct import alpaca, build_instruct
from soma.data.instruct.checks import RowError
from soma.data.instruct.convert import check_file, convert_file
from soma.data.instruct.parts import join, split
from soma.data.instruct.patch import PatchError, apply, difference, same
from soma.data.instruct.samples import read_samples
from soma.data.instruct.schemas import KEPT, SCHEMAS, Row, Schema, convert, from_record, schema_of, to_record

SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | ANY,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ANY, inner, max_size=2),
    max_leaves=4,
)
MORE = st.dictionaries(st.sampled_from(["id", "source", "meta", "name", "label_by", "text"]), JSON, max_size=2)
FUNCTION = st.fixed_dictionaries(
    {"name": SAID}, optional={"description": ANY, "parameters": st.just({"type": "object"})}
)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), min_size=1, max_size=2)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": SAID})
    | st.just({"type": "image_url", "image_url": {"url": "u"}}),
    min_size=1,
    max_size=2,
)


def extended(row: st.SearchStrategy[Row]) -> st.SearchStrategy[Row]:
    """The row with fields that the schema does not know."""
    return st.builds(lambda more, own: more | own, MORE, row)


@st.composite
def talks(draw: st.DrawFn, answer: bool = True) -> list[dict[str, Any]]:
    """Messages in any order that OpenAI's API accepts, tool calls and their results among them."""
    found: list[dict[str, Any]] = []
    if draw(st.booleans()):
        found.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(SAID | PARTS)})
    for number in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["user", "assistant", "call"]))
        if kind != "call":
            more = draw(st.sampled_from([{}, {"name": "n"}, {"weight": 0}]))
            found.append({"role": kind, "content": draw(SAID | PARTS)} | more)
            continue
        arguments = draw(st.dictionaries(ANY, JSON, max_size=2))
        calls = [
            {"id": f"c{number}{each}", "type": "function",
             "function": {"name": draw(SAID), "arguments": json.dumps(arguments, indent=draw(st.none() | st.just(1)))}}
            for each in range(draw(st.integers(1, 2)))
        ]  # fmt: skip
        found.append({"role": "assistant", "content": draw(st.none() | ANY), "tool_calls": calls})
        found += [{"role": "tool", "tool_call_id": call["id"], "content": draw(ANY)} for call in calls]
    if answer:
        found.append({"role": "assistant", "content": draw(SAID)})
    return found


@st.composite
def shared_talks(draw: st.DrawFn) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for _ in range(draw(st.integers(1, 4))):
        speaker = draw(st.sampled_from(["human", "user", "gpt", "assistant", "system", "function_call"]))
        call = json.dumps({"name": draw(SAID), "arguments": draw(st.dictionaries(ANY, JSON, max_size=2))})
        turns.append({"from": speaker, "value": call if speaker == "function_call" else draw(SAID)})
        if speaker == "function_call" and draw(st.booleans()):
            turns.append({"from": draw(st.sampled_from(["observation", "tool"])), "value": draw(ANY)})
    return turns


@st.composite
def pairs(draw: st.DrawFn, sides: tuple[str, ...]) -> Row:
    prompt = draw(SAID | talks().filter(lambda talk: talk[0]["role"] != "assistant") | talks(answer=False).filter(bool))
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    form = draw(st.sampled_from(["text", "messages", "whole", "implicit" if len(sides) == 2 else "whole"]))
    row: Row = {} if form == "implicit" else {"prompt": prompt}
    for number, side in enumerate(sides):
        said = draw(SAID) + str(number)
        message = {"role": "assistant", "content": said}
        row[side] = said if form == "text" else [message] if form == "messages" else [*before, message]
    return row


ALPACA = st.fixed_dictionaries(
    {"instruction": SAID, "output": SAID},
    optional={"input": st.none() | ANY, "system": ANY, "history": st.lists(st.lists(SAID, min_size=2, max_size=2))},
)
ROWS: dict[Schema, st.SearchStrategy[Row]] = {
    "alpaca": extended(ALPACA),
    "alpaca_text": st.builds(
        lambda a, b, c, d: {"text": alpaca.render(a, b, c, d)}, SAID, ANY, SAID, ANY
    ).filter(lambda row: (alpaca.parse(row["text"]) or {}).get("instruction", "").strip() != ""),
    "messages": extended(st.fixed_dictionaries({"messages": talks()}, optional={"tools": TOOLS | st.none()})),
    "sharegpt": extended(st.fixed_dictionaries(
        {"conversations": shared_talks()},
        optional={"system": ANY, "tools": TOOLS | st.lists(FUNCTION).map(json.dumps)},
    )),
    "preference": extended(pairs(("chosen", "rejected"))),
    "kto": extended(st.builds(lambda row, label: row | {"label": label}, pairs(("completion",)), st.booleans())),
    "seeds": extended(st.fixed_dictionaries(
        {"instruction": SAID, "instances": st.lists(
            st.fixed_dictionaries({"output": SAID}, optional={"input": ANY, "note": ANY}), min_size=1, max_size=3)},
        optional={"is_classification": st.booleans()},
    )),
}  # fmt: skip


def through(rows: list[Row], source: Schema, target: Schema) -> list[Row]:
    """Rows as a file's rows are converted, parts apart and together."""
    records = join(to_record(row, source) for row in rows)
    return [from_record(part, target) for record in records for part in split(record, target)]


@pytest.mark.parametrize("source", SCHEMAS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_way_there_and_back(source: Schema, data: st.DataObject) -> None:
    rows = data.draw(st.lists(ROWS[source], min_size=1, max_size=2))
    before = copy.deepcopy(rows)
    for target in SCHEMAS:
        there = json.loads(json.dumps(through(rows, source, target)))
        assert same(through(there, target, source), before), target
        last = data.draw(st.sampled_from(SCHEMAS))
        assert same(through(through(there, target, last), last, source), before), (target, last)
        assert {schema_of(row) for row in there} == {target}
    assert rows == before


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(ANY, JSON, max_size=3), st.dictionaries(ANY, JSON, max_size=3))
def test_a_patch_makes_one_of_the_other(old: Row, new: Row) -> None:
    assert same(apply(difference(old, new), old), new)
    if not same(old, new):
        with pytest.raises(PatchError):  # applied twice it does not fit: an edit is never overwritten
            apply(difference(old, new), new)


# --- What the rows say ---

CALL = {"id": "c7", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TALK: Row = {
    "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c7", "content": "42"}, {"role": "assistant", "content": "It is 42."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
}  # fmt: skip
PAIR: Row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
TASK: Row = {
    "id": "t", "instruction": "Add.", "is_classification": False,
    "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "0"}],
}  # fmt: skip


def test_tools_in_sharegpt() -> None:
    row = convert(TOOL_TALK, "messages", "sharegpt")
    assert row["conversations"] == [
        {"from": "system", "value": "S"}, {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "42"}, {"from": "gpt", "value": "It is 42."},
    ]  # fmt: skip
    assert json.loads(row["tools"]) == [{"name": "add", "parameters": {}}]
    del row[KEPT]  # the name of the call is all that is lost
    back = convert(row, "sharegpt", "messages")
    assert json.loads(json.dumps(back).replace("call_0", "c7")) == TOOL_TALK


def test_alpaca_has_the_last_question_and_the_history() -> None:
    talk = [{"role": role, "content": said} for role, said in
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]  # fmt: skip
    row = convert({"messages": talk}, "messages", "alpaca")
    assert row == {"instruction": "c", "input": "", "output": "d", "system": "S", "history": [["a", "b"]]}
    row = convert(TOOL_TALK, "messages", "alpaca")
    assert (row["instruction"], row["output"]) == ("q", "It is 42.")


def test_the_published_prompt() -> None:
    row = convert({"instruction": "Add.", "input": "1 1", "output": "2"}, "alpaca", "alpaca_text")
    assert row == {
        "text": "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n"
        "### Response:\n2"
    }
    assert convert({"instruction": "Add.", "input": "", "output": "2"}, "alpaca", "alpaca_text")["text"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n2"
    )


def test_a_pair_is_two_judged_answers_and_a_task_has_a_row_an_instance() -> None:
    good, bad = through([PAIR], "preference", "kto")
    assert [(row["prompt"], row["completion"], row["label"]) for row in (good, bad)] == [
        ("Q", "a", True), ("Q", "b", False)
    ]  # fmt: skip
    rows = through([TASK], "seeds", "alpaca")
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == [
        ("Add.", "1 1", "2"), ("Add.", "", "0")
    ]  # fmt: skip
    assert through(rows, "alpaca", "seeds") == [TASK]
    # A part that is gone, or came between: the rest stay rows of their own.
    assert len(through(rows[:1], "alpaca", "seeds")) == 1
    assert len(through([rows[1], rows[0]], "alpaca", "seeds")) == 2
    rows[1]["instruction"] = "Subtract."
    assert [row["instruction"] for row in through(rows, "alpaca", "seeds")] == ["Add.", "Subtract."]


def test_an_edit_stays_and_is_never_overwritten() -> None:
    row = convert(TOOL_TALK, "messages", "sharegpt")
    row["conversations"][-1]["value"] = "Forty-two."
    assert convert(row, "sharegpt", "messages")["messages"][-1]["content"] == "Forty-two."
    row = convert(TOOL_TALK, "messages", "alpaca")
    row["output"] = "Forty-two."
    with pytest.raises(RowError, match="edited since it was converted \\(messages is not what it was\\)"):
        convert(row, "alpaca", "messages")
    row = convert(PAIR, "preference", "alpaca") | {KEPT: [{"path": 3}]}
    with pytest.raises(RowError, match="not what a conversion writes"):
        convert(row, "alpaca", "preference")


WRONG: list[tuple[Row, str]] = [
    ({"prompt": "a", "completion": "b", "label": 1}, "label: true or false expected, this is int"),
    ({"prompt": "a", "completion": "b"}, "label: missing"),
    ({"instruction": "a", "instances": []}, "instances: a list with at least one message expected"),
    ({"instruction": "a", "instances": [{"output": "b"}, {"input": "c"}]}, "instances[1].output: missing"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]: a list of a question and its answer"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value: a call as JSON"),
    ({"conversations": [{"from": "observation", "value": "1"}]}, "conversations[0].from: 'observation' answers no"),
    ({"conversations": [{"from": "gpt", "value": "1"}], "tools": "x"}, "tools: a list of tools, or its JSON"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: text expected, this is int"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]: an object with type"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]}, "messages[0].tool_call_id: 'x' answers no"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls: only the"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "1"}}]}]},
     "messages[0].tool_calls[0].function.arguments: the text of a JSON object expected"),
    ({"messages": TOOL_TALK["messages"], "tools": [{"name": "f"}]}, "tools[0]: an object with type and function"),
    ({"text": "### Instruction: x"}, "text: no known shape"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: an answer to reject expected"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_is_wrong_is_named(row: Row, message: str) -> None:
    with pytest.raises(RowError) as caught:
        read_samples(row, schema_of(row), None)
    assert str(caught.value).startswith(message)


# --- Files and the stage ---


def test_files(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [TOOL_TALK, {"messages": [{"role": "robot", "content": ""}]}, TOOL_TALK | {"id": 3}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = CliRunner().invoke(app, ["data", "convert", str(source), str(tmp_path / "out.json.gz"), "--to", "sharegpt"])
    assert run.exit_code != 0
    assert "in.jsonl, row 2: messages[0].role: 'robot' is not one of system" in str(run.output) + str(run.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    there, back = tmp_path / "out.json.gz", tmp_path / "back.jsonl"
    run = CliRunner().invoke(app, ["data", "convert", str(source), str(there), "--to", "sharegpt", "--skip-bad"])
    assert run.exit_code == 0, run.output
    assert len(json.loads(gzip.decompress(there.read_bytes()))) == 2
    run = CliRunner().invoke(app, ["data", "convert", str(there), str(back), "--to", "messages"])
    assert "2 rows of messages from 2 rows (sharegpt)" in run.output
    assert [json.loads(line) for line in back.read_text().splitlines()] == [rows[0], rows[2]]
    run = CliRunner().invoke(app, ["data", "check", str(source)])
    assert run.exit_code == 1
    assert "3 rows: 2 messages; 1 wrong" in run.output
    with pytest.raises(UserError, match="--to alpacca: no such schema"):
        CliRunner().invoke(app, ["data", "convert", "a", "b", "--to", "alpacca"], catch_exceptions=False)


def test_the_stage_takes_every_schema(tmp_path: Path) -> None:
    kto = [{"prompt": f"Q{i}", "completion": f"A{i}", "label": i % 2 == 0} for i in range(6)]
    for name, rows, count in (("kto", kto, 3), ("seeds", [TASK], 2), ("tools", [TOOL_TALK], 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / name
        out.mkdir()
        build_instruct(InstructConfig(sources=[str(tmp_path / f"{name}.jsonl")], validation_fraction=0), None, out)
        found = list(read_corpus(out, "train"))
        assert len(found) == count
    assert json.loads(found[0]["tools"]) == TOOL_TALK["tools"]
    call = json.loads(found[0]["messages"])[2]["tool_calls"][0]
    assert call["function"]["arguments"] == {"a": 1}  # an object, as templates take it


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "seed_tasks.jsonl", "user_oriented_instructions.jsonl"])
def test_real_files_there_and_back(shared_data, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    source = shared_data(f"alpaca/{name}")
    assert check_file(str(source)).wrong == []
    kind = "seeds" if name.endswith("l") else "alpaca"
    for target in ("sharegpt", "kto"):
        convert_file(str(source), tmp_path / "there.jsonl", target)  # type: ignore[arg-type]
        convert_file(str(tmp_path / "there.jsonl"), tmp_path / name, kind)  # type: ignore[arg-type]
        text = source.read_text()
        given = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
        text = (tmp_path / name).read_text()
        found = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
        assert found == given
