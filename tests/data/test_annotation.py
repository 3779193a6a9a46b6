"""Annotation files: nothing is lost on the way through doccano, Prodigy, Praat and the tables."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.annotation import doccano, prodigy
from soma.data.annotation.files import Problem, format_of, read_records, write_records, written
from soma.data.annotation.offsets import boundaries, from_codepoints, to_codepoints
from soma.data.annotation.record import Record, Relation, Span
from soma.data.annotation.textgrid import grid_of, parse_textgrid, read_textgrid, records_of, write_textgrid

SMILE = "a😀é ne"  # 1, 2 and 4 bytes; the emoji is two units of UTF-16
TASK = {"seq2seq": "seq2seq", "sequence": "spans", "relation": "relations", "intent": "intent", "text": None}

# A task of each of Prodigy's text interfaces, in the shapes of its documentation.
PRODIGY = {
    "textcat": {"text": "You 😀", "label": "INSULT", "score": 0.7, "_input_hash": -7, "_task_hash": 8,
                "answer": "reject"},
    "choice": {
        "text": "Pick", "options": [{"id": 1, "text": "one"}, {"id": "b", "text": "two", "style": {"color": "red"}}],
        "accept": [1, "b"], "config": {"choice_style": "multiple"}, "answer": "accept", "_annotator_id": "ann",
    },
    "choice, nothing chosen": {"text": "Pick", "options": [{"id": 1, "text": "one"}], "accept": [], "answer": "ignore"},
    "spans, overlapping": {
        "text": "New York City Council",
        "tokens": [{"text": "New", "start": 0, "end": 3, "id": 0, "ws": True}],
        "spans": [
            {"start": 0, "end": 13, "token_start": 0, "token_end": 2, "label": "GPE"},
            {"start": 0, "end": 21, "token_start": 0, "token_end": 3, "label": "ORG", "score": 0.5},
            {"start": 4, "end": 8, "text": "York", "label": None},
        ],
        "answer": "accept", "_view_id": "spans_manual", "_is_binary": False, "_timestamp": 1700000000,
    },
    "rel": {
        "text": "My mother likes tea",
        "spans": [{"start": 0, "end": 9, "token_start": 0, "token_end": 1, "label": "PERSON"}],
        "relations": [
            {
                "head": 1, "child": 3, "label": "LIKES", "color": "#ffd882",
                "head_span": {"start": 0, "end": 9, "token_start": 0, "token_end": 1, "label": "PERSON"},
                "child_span": {"start": 16, "end": 19, "token_start": 3, "token_end": 3, "label": None},
            }
        ],
        "answer": "accept",
    },
    "text_input": {"text": "translate", "field_id": "german", "german": "übersetze", "answer": "accept"},
    "compare": {
        "id": 3, "input": {"text": "FedEx from Tokyo", "lang": "en"}, "accept": {"text": "one"},
        "reject": {"text": "two"}, "mapping": {"A": "accept", "B": "reject"}, "answer": "accept",
    },
    "half an emoji": {"text": "a\ud83d", "spans": [{"start": 1, "end": 2, "label": "HALF"}], "answer": "accept"},
    "raw": {"text": "only text", "meta": {"source": "x"}, "of my own": [1, {"two": None}]},
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


# --- doccano and Prodigy ---


@pytest.mark.parametrize("name", PRODIGY)
def test_prodigy_tasks_come_back_as_they_were(name: str) -> None:
    task = PRODIGY[name]
    record = prodigy.read_task(task)
    assert record.check() == ""
    again = prodigy.write_task(record)
    assert again == task
    assert list(again) == list(task)  # and in their order
    row = json.loads(json.dumps(doccano.write_row(record)))
    through = doccano.read_row(row, doccano.task_of_record(record))  # classes and target texts look alike there
    assert through.content() == record.content()


def test_what_the_record_says_of_prodigy_tasks() -> None:
    found = {name: prodigy.read_task(task) for name, task in PRODIGY.items()}
    assert (found["textcat"].labels, found["textcat"].classes(), found["textcat"].identity()) == (
        ["INSULT"],
        [],
        "_input_hash:-7",
    )
    assert found["choice"].labels == [1, "b"]
    assert found["choice, nothing chosen"].classes() is None
    assert [(span.start, span.end, span.label) for span in found["spans, overlapping"].spans][1] == (0, 21, "ORG")
    relation, spans = found["rel"].relations[0], {span.id: span for span in found["rel"].spans}
    ends = [found["rel"].text[spans[end].start : spans[end].end] for end in (relation.head, relation.child)]
    assert ends == ["My mother", "tea"]
    assert found["text_input"].targets == ["übersetze"]
    assert found["compare"].text == "FedEx from Tokyo"
    assert found["compare"].comparison is not None
    assert found["compare"].comparison.accept == {"text": "one"}


def test_shared_files_come_back_as_they_were(shared_data: Any) -> None:
    folders = [shared_data("doccano"), shared_data("prodigy")]
    seen = 0
    for path in sorted(path for folder in folders for path in folder.glob("*.json*")):
        raw, task = rows_of(path), TASK.get(path.name.split("_")[0])
        records = read_records(path, task=task)
        form = format_of(raw[0])
        again = [written(record, form) for record in records]
        assert again == raw, path.name
        assert [list(row) for row in again] == [list(row) for row in raw], path.name
        other, read = ("prodigy", prodigy.read_task) if form == "doccano" else ("doccano", doccano.read_row)
        for record in records:
            through = read(json.loads(json.dumps(written(record, other))))  # type: ignore[arg-type, operator]
            # Prodigy cannot show classes without the list of all: it is made up of those that are there
            ours = record if record.options else record.model_copy(update={"options": through.options})
            assert through.content() == ours.content(), path.name
        seen += len(records)
    assert seen > 2800


def test_doccano_rows_of_every_task(tmp_path: Path) -> None:
    rows = {
        None: {"id": 4, "text": "fine", "label": ["a", "b"], "Comments": ["hm"], "meta": "no object"},
        "spans": {"text": SMILE, "label": [[0, 2, "X"], [1, 3, "Y"], [1, 3, "Y"]], "other": None},
        "seq2seq": {"text": "q", "label": ["one", "two"]},
        "intent": {"text": SMILE, "cats": ["hello"], "entities": [[0, 1, "L"]]},
        "relations": {
            "text": SMILE,
            "entities": [
                {"id": 5, "label": "A", "start_offset": 0, "end_offset": 1},
                {"id": 9, "label": "B", "start_offset": 1, "end_offset": 2, "x": 1},
            ],
            "relations": [{"id": 2, "from_id": 9, "to_id": 5, "type": "of"}],
        },
    }  # fmt: skip
    for task, row in rows.items():
        path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (record,) = read_records(path, "doccano", task)  # type: ignore[arg-type]
        write_records(out, [record], "doccano")
        assert rows_of(out) == [row]
        write_records(out, [record], "prodigy")
        (again,) = read_records(out, "prodigy")
        assert again.model_copy(update={"options": []}).content() == record.content()
        write_records(out, [again], "doccano", task)  # type: ignore[arg-type]
        (third,) = read_records(out, "doccano", task)  # type: ignore[arg-type]
        assert third.content() == again.content()


NAMES = st.text("ab😀é ", min_size=1, max_size=4)


@st.composite
def made_records(draw: st.DrawFn) -> Record:
    """Records with any mix of classes, overlapping spans, relations and targets."""
    text = draw(st.text(max_size=12).filter(lambda text: text.isprintable()))
    place = st.integers(0, len(text))
    spans = []
    for number in range(draw(st.integers(0, 4))):
        start, end = sorted((draw(place), draw(place)))
        spans.append(Span(start=start, end=end, label=draw(NAMES), id=number))
    relations = []
    if spans:
        ends = st.sampled_from([span.id for span in spans])
        for _ in range(draw(st.integers(0, 3))):
            relations.append(Relation(head=draw(ends), child=draw(ends), label=draw(NAMES)))
    options = [{"id": "a", "text": "A"}]
    return Record(
        text=text, labels=draw(st.lists(NAMES, max_size=3)), spans=spans, relations=relations, options=options,
        targets=draw(st.lists(NAMES, max_size=3)), answer=draw(st.sampled_from([None, "accept", "reject", "ignore"])),
        meta=draw(st.dictionaries(NAMES, st.integers(), max_size=2)),
    )  # fmt: skip


@given(made_records(), st.sampled_from(["classification", "spans", "relations", "seq2seq", "intent"]))
@settings(max_examples=60, deadline=None)
def test_any_record_goes_through_both_formats(record: Record, task: Any) -> None:
    def copy(row: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(row))

    first = prodigy.read_task(copy(prodigy.write_task(record)))
    assert first.content() == record.content()
    second = doccano.read_row(copy(doccano.write_row(first, task)), task)
    assert second.content() == record.content()
    assert prodigy.read_task(copy(prodigy.write_task(second))).content() == record.content()


def test_bad_rows_are_set_aside_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"text": "good", "label": ["a"]}', "{", "[1]", '{"text": 3}', '{"text": "ab", "label": [[0, 5, "X"]]}',
        '{"text": "ab", "label": [[0, 1]]}', '{"text": "ab", "entities": [{"id": 1, "label": "x"}]}',
        '{"text": "a", "entities": [], "relations": [{"from_id": 1, "to_id": 2, "type": "t"}]}',
        '{"text": "a", "spans": [], "answer": "yes"}',
    ]  # fmt: skip
    path.write_text("\n".join(rows))
    problems: list[Problem] = []
    assert [record.text for record in read_records(path, problems=problems)] == ["good"]
    assert [int(problem.place.rpartition(" ")[2]) for problem in problems] == list(range(2, 10))
    reasons = " | ".join(problem.reason for problem in problems)
    for words in ("not valid JSON", "no object", "text: ", "lies outside of the text", "is not [start, end, label]",
                  "'start_offset' is missing", "which is not there"):  # fmt: skip
        assert words in reasons
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: not valid JSON"):
        read_records(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no row in it"):
        read_records(path)


# --- Offsets ---


def test_offsets_of_an_emoji() -> None:
    assert boundaries(SMILE, "codepoints") == [0, 1, 2, 3, 4, 5, 6]
    assert boundaries(SMILE, "utf16") == [0, 1, 3, 4, 5, 6, 7]
    assert boundaries(SMILE, "utf8") == [0, 1, 5, 7, 8, 9, 10]
    whole = Record(text=SMILE, spans=[Span(start=1, end=3, label="X")])
    assert SMILE.encode()[1:7].decode() == SMILE[1:3] == "😀é"
    moved = from_codepoints(whole, "utf8")
    assert (moved.spans[0].start, moved.spans[0].end) == (1, 7)
    with pytest.raises(ValueError, match="inside of a character"):
        to_codepoints(Record(text=SMILE, spans=[Span(start=2, end=3, label="X")]), "utf16")


@given(st.text(max_size=20), st.data(), st.sampled_from(["utf8", "utf16"]))
@settings(max_examples=100, deadline=None)
def test_offsets_agree_with_python_encodings(text: str, data: st.DataObject, unit: Any) -> None:
    text = text.encode("utf-8", "ignore").decode()
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    record = from_codepoints(Record(text=text, spans=[Span(start=start, end=end)]), unit)
    span = record.spans[0]
    encoded = text.encode("utf-8") if unit == "utf8" else text.encode("utf-16-le")
    width = 1 if unit == "utf8" else 2
    cut = encoded[span.start * width : span.end * width].decode("utf-8" if unit == "utf8" else "utf-16-le")
    assert cut == text[start:end]
    back = to_codepoints(record, unit).spans[0]
    assert (back.start, back.end) == (start, end)


# --- Tables, CoNLL, fastText ---


def test_tables_and_lines_of_doccano(shared_data: Any, tmp_path: Path) -> None:
    folder = shared_data("doccano")
    for name, task in (("text_classification__example.csv", None), ("seq2seq__example.csv", "seq2seq"),
                       ("text_classification__example_out_of_order_columns.csv", None),
                       ("text_classification__example_fasttext.txt", None), ("example.txt", None),
                       ("sequence_labeling__example.conll", None)):  # fmt: skip
        records, out = read_records(folder / name, task=task), tmp_path / name
        write_records(out, records, "doccano", task=task)
        assert [one.content() for one in read_records(out, task=task)] == [one.content() for one in records], name
        lines = (folder / name).read_text().split("\n")
        if not name.startswith("example"):  # an empty line between texts says nothing
            assert out.read_text().rstrip("\n").split("\n") == [*lines[: len(out.read_text().rstrip().split("\n"))]], (
                name
            )
    assert [record.text for record in read_records(folder / "example.utf16.csv")] == [
        record.text for record in read_records(folder / "example.utf16.csv", "doccano")
    ]
    excel = read_records(folder / "text_classification__example.xlsx")
    assert [(record.text, record.labels) for record in excel][:1] == [("exampleA", ["positive"])]
    conll = read_records(folder / "sequence_labeling__example.conll")
    assert [(one.text, [(s.start, s.end, s.label) for s in one.spans]) for one in conll] == [
        ("JAPAN GET", [(0, 5, "LOC")]), ("Nadim Ladki", [(0, 11, "PER")]),
    ]  # fmt: skip
    problems: list[Problem] = []
    read_records(folder / "sequence_labeling__labeling.invalid.conll", problems=problems)
    assert [problem.reason for problem in problems] == ["line 1: 3 columns, expected a token and its tag"]
    with pytest.raises(UserError, match="`text` is none of them"):
        read_records(folder / "text_classification__example_one_column_no_header.xlsx")


def test_tables_refuse_what_they_cannot_say(tmp_path: Path) -> None:
    several = Record(text="a", labels=["x", "y"])
    with pytest.raises(UserError, match="more than a cell"):
        write_records(tmp_path / "a.csv", [several], "doccano")
    overlapping = Record(text="a b c", spans=[Span(start=0, end=3, label="X"), Span(start=2, end=5, label="Y")])
    for record in (overlapping, Record(text="abc", spans=[Span(start=1, end=2, label="X")])):
        with pytest.raises(UserError, match="overlap or cut a token"):
            write_records(tmp_path / "a.conll", [record], "doccano")
    with pytest.raises(UserError, match="no space"):
        write_records(tmp_path / "a.txt", [Record(text="a", labels=["x y"])], "doccano")
    with pytest.raises(UserError, match="is not written as"):
        write_records(tmp_path / "a.csv", [several], "prodigy")
    with zipfile.ZipFile(tmp_path / "bad.xlsx", "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", "<not closed")
    with pytest.raises(UserError, match="no Excel workbook"):
        read_records(tmp_path / "bad.xlsx")
    table = tmp_path / "wide.csv"
    table.write_bytes('text,label\n"a, ""b""\nc",x\nb,y,z\n'.encode("utf-16"))
    problems: list[Problem] = []
    assert [(one.text, one.labels) for one in read_records(table, problems=problems)] == [('a, "b"\nc', ["x"])]
    assert [problem.reason for problem in problems] == ["3 cells, the header has 2"]


# --- TextGrid ---

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.3   ! seconds
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Mary ""M"" 1"
        xmin = 0
        xmax = 2.3
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.9123456789012345
            text = "she said ""no 1""
and left 😀"
        intervals [2]:
            xmin = 0.9123456789012345
            xmax = 2.3
            text = ""
    item [2]:
        class = "TextTier"
        name = "bell"
        xmin = 0
        xmax = 2.3
        points: size = 1
        points [1]:
            number = 1.5
            mark = "ding!"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
2.3
<exists>
2
"IntervalTier"
"Mary ""M"" 1"
0
2.3
2
0
0.9123456789012345
"she said ""no 1""
and left 😀"
0.9123456789012345
2.3
""
"TextTier"
"bell"
0
2.3
1
1.5
"ding!"
"""


def test_textgrid_long_short_and_utf16(tmp_path: Path) -> None:
    grid = parse_textgrid(LONG)
    assert grid == parse_textgrid(SHORT)
    assert write_textgrid(grid, short=True) == SHORT
    assert [line.strip() for line in write_textgrid(grid).splitlines()] == [
        line.partition("!  seconds")[0].strip() for line in LONG.replace("   ! seconds", "").splitlines()
    ]
    assert [(mark.xmin, mark.xmax, mark.text) for mark in grid.tiers[0].marks] == [
        (0, 0.9123456789012345, 'she said "no 1"\nand left 😀'), (0.9123456789012345, 2.3, ""),
    ]  # fmt: skip
    assert [(mark.xmin, mark.text) for mark in grid.tiers[1].marks] == [(1.5, "ding!")]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be"):
        path = tmp_path / f"{encoding}.TextGrid"
        data = SHORT.encode(encoding)
        path.write_bytes(b"\xfe\xff" + data if encoding == "utf-16-be" else data)
        assert read_textgrid(path) == grid
    path.write_bytes('"ooTextFile" "TextGrid" 0 1 <exists> 1 "TextTier" "é" 0 1 0'.encode("latin-1"))
    assert read_textgrid(path).tiers[0].name == "é"


def test_textgrid_records_and_classes(tmp_path: Path) -> None:
    grid = parse_textgrid(LONG)
    records = records_of(grid)
    assert [record.text for record in records] == ['she said "no 1"\nand left 😀', "", "ding!"]
    random.Random(3).shuffle(records)
    assert grid_of(records) == grid
    next(record for record in records if record.text.startswith("she")).labels.append("assertive")
    tiers = grid_of(records).tiers
    assert [tier.name for tier in tiers] == ['Mary "M" 1', "bell", 'Mary "M" 1:labels']
    assert [mark.text for mark in tiers[2].marks] == ["assertive", ""]
    out = tmp_path / "out.jsonl"
    write_records(out, records, "prodigy")
    assert {record.meta["tier"] for record in read_records(out)} == {'Mary "M" 1', "bell"}
    records[0].targets.append("x")
    with pytest.raises(UserError, match="no spans"):
        grid_of(records)
    with pytest.raises(UserError, match="came from one"):
        grid_of([Record(text="a")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"ooTextFile" "Pitch"', "not a TextGrid"),
        ('"ooTextFile" "TextGrid" 0 1 <exists> 1 "TextTier" "a" 0 1 2 0.5 "x"', "ends before a time"),
        ('"ooTextFile" "TextGrid" 0 1 <exists> 1 "Sound" "a"', "class 'Sound'"),
        ('"ooTextFile" "TextGrid" 0 "b"', "expected a number"),
        ('"ooTextFile" "TextGrid" 0 1 <exists> -1', "is no count"),
    ],
)
def test_textgrid_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.TextGrid"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_textgrid(path)


# --- The command ---


def test_the_command_converts_and_sets_aside(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": SMILE, "label": [[1, 4, "X"]]}, {"text": SMILE, "label": [[2, 4, "X"]]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "annotations", str(source), "--to", "prodigy", "--out", str(out), "--offsets", "utf16"]
    result = CliRunner().invoke(app, [*command, "--out-offsets", "utf8"])
    assert result.exit_code == 0, result.output
    assert "1 records, 1 set aside" in result.output
    assert "line 2: offset 2 of utf16 lies inside of a character" in result.output
    assert rows_of(out) == [{"text": SMILE, "spans": [{"start": 1, "end": 7, "label": "X"}]}]
    bad = CliRunner().invoke(app, ["data", "annotations", str(source), "--to", "word", "--out", str(out)])
    assert isinstance(bad.exception, UserError)
