"""`soma data show`: tokens coloured by the loss mask, and the sequences that rows share."""

import json
import re
from pathlib import Path

import pytest
from tiny import make_tokenizer
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.instruct.show import Shown, page, show, terminal, token_texts
from soma.model.tokenizer import Tokenizer

ROWS = [
    {"instruction": "Say hi <now>", "input": "", "output": "hi 🦙"},
    {"instruction": "Again", "input": "", "output": "hi"},
    {"instruction": "Long", "input": "", "output": "word " * 60},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    make_tokenizer(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_what_is_learned_is_marked(model: Path, rows: str) -> None:
    runtime = Tokenizer.load(model)
    parts = show(rows, model, 1)
    (one,) = parts
    assert isinstance(one, Shown)
    talk = [{"role": "user", "content": "Say hi <now>"}, {"role": "assistant", "content": "hi 🦙"}]
    ids, mask = runtime.encode_chat_masked(talk)
    assert one.mask == mask
    assert "".join(one.texts) == runtime.decode(ids, skip_special=False) == "".join(token_texts(runtime, ids))
    plain = terminal(parts, colour=False)
    learned = "".join(text for text, kept in zip(one.texts, mask, strict=True) if kept)
    assert learned.startswith("hi 🦙")
    assert f"«{learned}»" in plain
    assert re.sub(r"\033\[[\d;]*m", "", terminal(parts)) == plain
    text = page(parts, "a<b")
    greens = "".join(re.findall(r'<b(?: class="o")? title="\d+">(.*?)</b>', text, re.DOTALL))
    assert greens.replace("&lt;", "<").replace("&gt;", ">") == learned
    assert "<now>" not in text
    assert "a&lt;b" in text


def test_rows_that_share_a_sequence(model: Path, rows: str) -> None:
    sizes = [len(part.mask) for part in show(rows, model, None) if isinstance(part, Shown)]
    length = sizes[0] + sizes[1]
    parts = show(rows, model, 2, length)
    assert [part if isinstance(part, str) else part.name for part in parts] == [
        f"sequence 1 of 1: {length} tokens, 2 conversations", "from token 0:", "row 1", f"from token {sizes[0] - 1}:",
        "row 2", "2 tokens stay empty",
    ]  # fmt: skip
    assert show(rows, model, 3, length) == [
        f"row 3: {sizes[2]} tokens are more than {length}, it is not in any sequence"
    ]


def test_the_command(model: Path, rows: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["data", "show", rows, "--model", str(model), "--row", "2"])
    assert run.exit_code == 0, run.output
    assert "row 2: " in run.output
    assert "«hi" in run.output
    out = tmp_path / "page.html"
    run = CliRunner().invoke(app, ["data", "show", rows, "--model", str(model), "--html", str(out)])
    assert "3 conversations" in run.output
    assert out.read_text().count("<h2>") == 3
    pair = tmp_path / "pair.jsonl"
    pair.write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}))
    assert [part.name for part in show(str(pair), model, 1) if isinstance(part, Shown)] == [
        "row 1 chosen", "row 1 rejected"
    ]  # fmt: skip
    with pytest.raises(UserError, match="there is no row 9"):
        show(rows, model, 9)
    pair.write_text('{"prompt": "q", "chosen": "yes", "rejected": "yes"}')
    with pytest.raises(UserError, match=r"pair.jsonl, row 1: rejected: the same as chosen"):
        show(str(pair), model, 1)
