"""Wikipedia: dumps in MediaWiki's XML with their markup, and WikiText's files of tokens."""

import html
import re
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

from soma.data.readers import Document, Dropped
from soma.data.sources import Item

PAGE_CHARS = 8 << 20
ARTICLE = re.compile(r"^ ?= ([^=].*?) = *$")
WIKITEXT_HEADING = re.compile(r"^ ?((?:= )+)(.+?)(?: =)+ *$")
JOINED = re.compile(r" @(.)@ ")  # a mark that the tokens of WikiText keep apart
DROPPED_TAGS = re.compile(
    r"<(ref|gallery|math|score|timeline|imagemap|syntaxhighlight|source|style|templatestyles)\b"
    r"(?:[^<>]{0,300}/>|.{0,4000}?</\1\s*>)",  # bounded: a page of tags that never close must not take for ever
    re.DOTALL | re.IGNORECASE,
)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\]\[]{1,2000}(?: ([^\]\[\n]{0,1000}))?\]")
MAGIC_WORD = re.compile(r"__[A-Z]+__")
QUOTES = re.compile(r"'{2,5}")
HEADING = re.compile(r"^(={1,6})\s*(.+?)\s*\1\s*$")
MEDIA = re.compile(
    r"^(?:file|image|category|datei|bild|kategorie|fichier|catégorie|archivo|categoría)\s*:", re.IGNORECASE
)
OPEN_OR_CLOSE = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]")
PAIRS = {"}}": "{{", "|}": "{|", "]]": "[["}


def read_dump(item: Item, file: IO[bytes]) -> Iterator[Document | Dropped]:
    """The articles of a `…-pages-articles.xml` dump (main namespace, no redirects), in order, as Markdown."""
    title, namespace, redirect, number = "", "0", False, 0
    root = None
    try:
        for event, element in ElementTree.iterparse(file, ("start", "end")):
            root = element if root is None else root
            if event == "start":
                continue
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title, redirect, number = element.text or "", False, number + 1
            elif tag == "ns":
                namespace = element.text or "0"
            elif tag == "redirect":
                redirect = True
            elif tag == "text" and namespace == "0" and not redirect:
                yield _article(f"{item.name}#{number}", title, element.text or "")
            if tag == "page":
                root.clear()  # what has been read is let go: a dump has millions of pages
    except ElementTree.ParseError as error:
        yield Dropped(f"{item.name}#{number}", "corrupt", f"after page {number} ({title}): {error}")
    if number == 0:
        yield Dropped(item.name, "empty", "no page in the dump")


def _article(source: str, title: str, markup: str) -> Document | Dropped:
    if len(markup) > PAGE_CHARS:
        return Dropped(source, "too_large", f"{title}: a page of more than {PAGE_CHARS >> 20} Mi characters")
    text = markup_to_text(markup)
    if not text:
        return Dropped(source, "empty", title)
    return Document(f"# {title}\n\n{text}", source, "wikipedia", {"title": title})


def markup_to_text(markup: str) -> str:
    """MediaWiki markup to Markdown: templates, tables, references, media and categories go, links keep their text."""
    text = DROPPED_TAGS.sub("", _without_comments(markup))
    text = TAG.sub("", _without_nested(text))
    text = EXTERNAL.sub(lambda found: found.group(1) or "", text)
    text = QUOTES.sub("", MAGIC_WORD.sub("", text))
    lines = []
    for line in text.split("\n"):
        if heading := HEADING.match(line):
            lines.append(f"\n{'#' * len(heading.group(1))} {heading.group(2)}\n")
        elif line.startswith(("*", "#", ":", ";")):
            marks = re.match(r"[*#:;]+\s*", line)
            assert marks is not None
            depth = len(marks.group().strip()) - 1
            lines.append("  " * depth + ("- " if line[0] in "*#" else "") + line[marks.end() :])
        else:
            lines.append(line.rstrip())
    lines = html.unescape("\n".join(lines)).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_without_empty_sections(lines))).strip()


def _without_comments(markup: str) -> str:
    parts, start = [], 0
    while (begin := markup.find("<!--", start)) >= 0 and (end := markup.find("-->", begin)) >= 0:
        parts.append(markup[start:begin])
        start = end + 3
    return "".join([*parts, markup[start:]])


def _without_empty_sections(lines: list[str]) -> list[str]:
    """Without headings that nothing follows before the next heading of their level or a higher one."""
    kept: list[str] = []
    filled, below = False, 0  # whether there is text under the heading, or a heading below it that stays
    for line in reversed(lines):
        level = len(line) - len(line.lstrip("#")) if line.startswith("#") else 0
        if level and not filled and below <= level:
            continue
        kept.append(line)
        if level:
            filled, below = False, level
        elif line.strip():
            filled = True
    return kept[::-1]


def _without_nested(text: str) -> str:
    """Without `{{…}}` and `{|…|}`; `[[a|b]]` as b. One pass with a stack: no depth of nesting costs more."""
    parts: list[list[str]] = [[]]
    opened: list[str] = []
    start = 0
    for found in OPEN_OR_CLOSE.finditer(text):
        parts[-1].append(text[start : found.start()])
        start, mark = found.end(), found.group()
        if mark in PAIRS.values():
            opened.append(mark)
            parts.append([])
        elif opened and opened[-1] == PAIRS[mark]:
            inner = "".join(parts.pop())
            opened.pop()
            if mark == "]]":
                parts[-1].append(_link(inner))
    parts[-1].append(text[start:])
    # What was never closed keeps its text, as the reader of the page would see it.
    return "".join("".join(part) for part in parts)


def _link(inner: str) -> str:
    return "" if MEDIA.match(inner.lstrip(":")) else inner.rpartition("|")[2]


def read_wikitext(item: Item, file: IO[bytes]) -> Iterator[Document | Dropped]:
    """The articles of WikiText (Merity et al. 2016, arXiv 1609.07843), headings as Markdown, ` @-@ ` as `-`."""
    title, number, first = "", 0, 1
    lines: list[str] = []
    while data := file.readline(PAGE_CHARS):
        number += 1
        try:
            line = data.decode()
        except UnicodeDecodeError as error:
            yield Dropped(f"{item.name}#{number}", "undecodable", f"line {number}: not utf-8 ({error.reason})")
            continue
        line = line.rstrip("\n")
        if found := ARTICLE.match(line):
            yield from _wikitext_article(item, title, lines, first)
            title, lines, first = JOINED.sub(r"\1", found.group(1)), [], number
        heading = WIKITEXT_HEADING.match(line)
        lines.append(f"{'#' * heading.group(1).count('=')} {heading.group(2)}" if heading else line.strip())
    yield from _wikitext_article(item, title, lines, first)
    if number == 0:
        yield Dropped(item.name, "empty", "the file has no content")


def _wikitext_article(item: Item, title: str, lines: list[str], first: int) -> Iterator[Document]:
    text = JOINED.sub(r"\1", "\n".join(lines)).strip()
    if text:
        yield Document(text, f"{item.name}#{first}", "wikitext", {"title": title} if title else {})
