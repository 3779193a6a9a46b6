"""`soma tokenizer compare` and `convert`: the figures of a plain count, the cuts, the page in a browser."""

from pathlib import Path

import pytest
from browser import open_browser
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.config import TokenizerConfig
from soma.data.tokenizer import build
from soma.data.tokenizer_compare import Text, compare, cut, load, page, picture, read_texts, table
from soma.model.tokenizer import Tokenizer

WORDS = ["the", "cat", "sat", "."]
ENGLISH = "the cat sat. the dog sat on the mat. " * 8


def word_tokenizer() -> Tokenizer:
    inner = Inner(models.WordLevel({"<unk>": 0, **{word: place for place, word in enumerate(WORDS, 1)}}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(inner)


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(build(TokenizerConfig(type="byte"), iter(["x"])))


def test_figures_of_a_plain_count() -> None:
    texts = [Text("the cat sat.", "a", "en"), Text("the dog é", "a", "en"), Text("日本", "b", "ja")]
    found = compare({"words": word_tokenizer(), "bytes": byte_tokenizer()}, texts)
    assert list(found.scores) == ["all", "domain a", "domain b", "language en", "language ja"]
    words, plain = found.scores["domain a"]["words"], found.scores["domain a"]["bytes"]
    assert (words.tokens, words.unknown, words.words, words.bytes) == (7, 2, 6, 22)
    assert words.figures[:3] == (7 / 6, 22 / 7, 2 / 7)
    assert (plain.tokens, plain.unknown, plain.figures[1]) == (22, 0, 1.0)
    assert found.scores["all"]["words"].tokens == 7 + 1
    assert found.scores["language ja"]["bytes"].tokens == 6
    assert all(score.seconds > 0 for group in found.scores.values() for score in group.values())
    assert found.vocabulary == {"words": 5, "bytes": 260}
    assert "domain b (6 bytes)" in table(found)


def test_cuts_show_parts_of_characters_and_what_is_unknown() -> None:
    pieces = cut(byte_tokenizer(), "aé🦙<|endoftext|>")
    assert [(piece.text, piece.part) for piece in pieces[:7]] == [
        ("a", False), ("é", False), ("", True), ("🦙", False), ("", True), ("", True), ("", True)
    ]  # fmt: skip
    assert "".join(piece.text for piece in pieces) == "aé🦙<|endoftext|>", "a special token's name is characters here"
    assert [piece.unknown for piece in cut(word_tokenizer(), "the dog sat")] == [False, True, False]
    found = compare({"words": word_tokenizer(), "bytes": byte_tokenizer()}, [Text("the", "a", "en")], ["the\ndog é"])
    plain = picture(found, colour=False).splitlines()
    assert plain[0] == "words    3  the|dog|é"
    assert plain[1] == "bytes   10  t|h|e|⏎|d|o|g| |é|·"
    coloured = picture(found, colour=True)
    assert "\x1b[30;41mthe\x1b[0m\x1b[7mdog\x1b[0m" in coloured


def test_domains_languages_and_mistakes(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(ENGLISH)
    (tmp_path / "two.jsonl").write_text('{"body": "der Hund und die Katze sitzen auf der Matte und schlafen heute"}\n')
    texts = read_texts([str(tmp_path / "one.txt"), f"german={tmp_path / 'two.jsonl'}"], text_field="body")
    assert [(text.domain, text.language) for text in texts] == [("one.txt", "en"), ("german", "de")]
    with pytest.raises(UserError, match="no text in there"):
        read_texts([str(tmp_path / "two.jsonl")], text_field="absent")
    for name in ("a", "b"):
        (tmp_path / name / "t").mkdir(parents=True)
        build(TokenizerConfig(type="byte"), iter("x")).save(str(tmp_path / name / "t" / "tokenizer.json"))
    assert list(load([str(tmp_path / "a" / "t"), str(tmp_path / "b" / "t")])) == ["a/t", "b/t"]
    with pytest.raises(UserError, match="named twice"):
        load([str(tmp_path / "a" / "t")] * 2)


def test_commands_and_page(tmp_path: Path) -> None:
    source = tmp_path / "bytes.json"
    build(TokenizerConfig(type="byte"), iter("x")).save(str(source))
    runner = CliRunner()
    assert runner.invoke(app, ["tokenizer", "convert", str(source), str(tmp_path / "made")]).exit_code == 0
    assert Tokenizer.load(tmp_path / "made").has_chat_template
    (tmp_path / "text.txt").write_text(ENGLISH)
    options = ["--on", str(tmp_path / "text.txt"), "--sentence", "the <b>cat", "--html", str(tmp_path / "page.html")]
    shown = runner.invoke(app, ["tokenizer", "compare", str(source), str(tmp_path / "made"), *options])
    assert shown.exit_code == 0, shown.output
    assert "t|h|e| |<|b|>|c|a|t" in shown.output
    assert "language en" in shown.output
    content = (tmp_path / "page.html").read_text()
    assert "<b>cat" not in content, "what is compared is escaped"
    assert "http" not in content.replace("http-equiv", ""), "the page needs nothing from elsewhere"


@pytest.mark.page
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    texts = [Text(ENGLISH, "prose", "en"), Text("日本語", "other", "ja")]
    found = compare({"words": word_tokenizer(), "bytes": byte_tokenizer()}, texts, ["the dog sat on é"])
    (tmp_path / "page.html").write_text(page(found))
    for width, dark in ((1280, False), (390, True)):
        with open_browser(width, dark=dark) as driver:
            driver.get((tmp_path / "page.html").as_uri())
            assert driver.get_log("browser") == []
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            cuts = "[...document.querySelectorAll('.cut')].map(cut => [...cut.children].map(one => one.textContent))"
            words, plain = driver.execute_script(f"return {cuts}")
            assert words == ["the", "dog", "sat", "on", "é"]
            assert "".join(plain) == "the dog sat on é·"
            first = "[...document.querySelectorAll('.cut span')].slice(0, 5)"
            colours = driver.execute_script(f"return {first}.map(one => getComputedStyle(one).backgroundColor)")
            assert len(set(colours)) == 5
            assert driver.execute_script("return document.querySelectorAll('.unknown').length") == 3
            assert driver.execute_script("return document.querySelectorAll('table').length") == 5
