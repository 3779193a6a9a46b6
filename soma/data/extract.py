"""The main text of a web page, with its structure: headings, lists, code and tables as Markdown.

The page is cut into blocks at block elements. Elements that name themselves navigation and the like are passed over.
A block is judged by its words and by the share of its text that lies in links, as boilerpipe does (Kohlschütter et
al. 2010, "Boilerplate detection using shallow text features"), short ones by what stands around them, as jusText does
(Pomikálek 2011). In a page's only `main` or `article` all is kept that is not made of links. resiliparse (lexbor)
parses; it reads broken markup as browsers do.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 400  # elements nested deeper are not entered: no page needs them, some bombs are made of them
SKIP = frozenset(
    [
        "script", "style", "noscript", "template", "svg", "head", "iframe", "object", "embed", "select", "button",
        "form", "input", "textarea", "nav", "canvas", "audio", "video", "map", "dialog", "menu", "math", "label",
        "figcaption",
    ]
)  # fmt: skip
OUTSIDE = frozenset(["header", "footer", "aside"])  # passed over unless most of the page is in them
BLOCK = frozenset(
    [
        "p", "div", "section", "article", "main", "header", "footer", "aside", "blockquote", "ul", "ol", "dl", "li",
        "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "tr", "td", "th", "tbody", "thead", "figure",
        "body", "hr", "address", "details", "summary", "center", "fieldset", "caption",
    ]
)  # fmt: skip
HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### ", "h5": "##### ", "h6": "###### "}
NAMED = re.compile(
    r"(?:^|[-_\s])(?:nav|navbar|navigation|menu|submenu|side-?bar|footer|foot|masthead|breadcrumbs?|comments?|disqus|"
    r"cookies?|consent|gdpr|banner|share|sharing|social|related|recommend(?:ed|ations)?|adverts?|advertisement|ads?|promo|"
    r"sponsor(?:ed)?|subscribe|newsletter|popup|modal|pagination|pager|widgets?|login|signup|toolbar|skip|copyright|"
    r"legal|hidden|sr-only|infobox|navbox|toc|mw-editsection|reflist|catlinks)(?:$|[-_\s\d])",
    re.IGNORECASE,
)
LANDMARKS = frozenset(("navigation", "banner", "contentinfo", "search", "complementary", "menu", "dialog"))
SPACES = re.compile(r"\s+")
TERMINAL = (".", "!", "?", ":", '"', "”", "。", "！", "？", "…", ")")
GOOD_WORDS, NEAR_WORDS = 10, 4
MAX_LINKS = 0.33  # share of a block's characters in links …
MAX_LINKS_LONG, LONG_WORDS = 0.5, 25  # … and of a long one's
MOST = 0.4  # of the page's text: an element with more is not passed over for its name
REACH = 3  # blocks: a short block stays when good ones are so near on both sides


@dataclass(slots=True)
class Block:
    """A piece of the page: `kind` is p, li, pre, table or a heading; `links` counts characters in links."""

    kind: str
    text: str
    links: int
    indent: int = 0
    marker: str = ""

    @property
    def words(self) -> int:
        return len(self.text.split())

    @property
    def link_share(self) -> float:
        return self.links / max(1, len(self.text))


def main_text(html: bytes | str, encoding: str | None = None) -> str:
    """The main text of a page, empty where there is none. `encoding`: what the server said; else it is detected."""
    from resiliparse.parse.encoding import detect_encoding
    from resiliparse.parse.html import HTMLTree

    if isinstance(html, bytes):
        tree = HTMLTree.parse_from_bytes(
            html, _known(encoding) or detect_encoding(html, html5_compatible=True) or "utf-8"
        )
    else:
        tree = HTMLTree.parse(html)
    body = tree.body
    if body is None:
        return ""
    root = _root(body)
    blocks = _Walker(root).blocks()
    return _render(_chosen(blocks) if root == body else _unlinked(blocks))


def _known(encoding: str | None) -> str | None:
    import codecs

    try:
        return codecs.lookup(encoding).name if encoding else None
    except LookupError:
        return None


def _root(body: Any) -> Any:
    """`main`, or the only large `article`, where the page has one with a fair share of its text; else the body."""
    total = len(body.text)
    for candidates in (body.get_elements_by_tag_name("main"), body.get_elements_by_tag_name("article")):
        sizes = sorted(((len(node.text), number) for number, node in enumerate(candidates)), reverse=True)
        if sizes and sizes[0][0] > 0.25 * total and (len(sizes) == 1 or sizes[0][0] > 2 * sizes[1][0]):
            return candidates[sizes[0][1]]
    return body


class _Walker:
    """Goes through the elements in order, without recursion, and collects blocks."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.total = max(1, len(root.text))
        self.found: list[Block] = []
        self.parts: list[str] = []
        self.links, self.in_link = 0, 0
        self.kind, self.lists = "p", [("ul", 0)]

    def blocks(self) -> list[Block]:
        """All blocks of the root, in order."""
        from resiliparse.parse.html import NodeType

        text_type, element_type = NodeType.TEXT, NodeType.ELEMENT
        node, depth = self.root.first_child, 1
        while node is not None:
            kind = node.type
            entered = False
            if kind == text_type:
                self._text(node.value)
            elif kind == element_type and depth < MAX_DEPTH:
                entered = self._enter(node)
            if entered and (child := node.first_child) is not None:
                node, depth = child, depth + 1
                continue
            if entered:
                self._leave(node.tag)
            while node is not None and node.next is None:
                node, depth = node.parent, depth - 1
                if node is None or node == self.root:
                    node = None
                    break
                self._leave(node.tag)
            node = node.next if node is not None else None
        self._end()
        return self.found

    def _text(self, value: str) -> None:
        if self.in_link:
            self.links += len(value.strip())
        self.parts.append(value)

    def _enter(self, node: Any) -> bool:
        """Whether what is in the element is looked at."""
        tag = node.tag
        if tag in SKIP or self._unwanted(node, tag):
            return False
        if tag in BLOCK:
            self._end()
            if tag in ("pre", "table") and (block := _whole(node, tag)):
                self.found.append(block)
                return False
            if tag in ("ul", "ol"):
                self.lists.append((tag, 0))
            elif tag == "li":
                listing, count = self.lists[-1]
                self.lists[-1] = (listing, count + 1)
            self.kind = tag if tag in HEADINGS or tag in ("li", "dt", "dd") else self.kind
        elif tag == "a":
            self.in_link += 1
        elif tag == "br":
            self.parts.append("\n")
        return True

    def _leave(self, tag: str) -> None:
        if tag in BLOCK:
            self._end()
            if tag in ("ul", "ol") and len(self.lists) > 1:
                self.lists.pop()
            if tag in HEADINGS or tag in ("li", "dt", "dd"):
                self.kind = "p"
        elif tag == "a":
            self.in_link = max(0, self.in_link - 1)

    def _unwanted(self, node: Any, tag: str) -> bool:
        if tag in OUTSIDE and node.query_selector("h1") is None and len(node.text) < MOST * self.total:
            return True
        names = node.attrs
        if not names:
            return False
        if "hidden" in names or node.getattr("aria-hidden") == "true":
            return True
        style = node.getattr("style") if "style" in names else None
        if style and "display:none" in style.replace(" ", "").lower():
            return True
        if "role" in names and node.getattr("role") in LANDMARKS:
            return True
        if tag == "body" or not ("class" in names or "id" in names):
            return False
        label = f"{node.getattr('class') or ''} {node.getattr('id') or ''}"
        return NAMED.search(label) is not None and len(node.text) < MOST * self.total

    def _end(self) -> None:
        """Close the block that is open."""
        if self.parts:
            lines = [SPACES.sub(" ", line).strip() for line in "".join(self.parts).split("\n\n")]
            text = SPACES.sub(" ", " ".join(lines)).strip()
            if text:
                kind = {"dt": "li", "dd": "li"}.get(self.kind, self.kind)
                listing, count = self.lists[-1]
                marker = (f"{count}. " if listing == "ol" else "- ") if kind == "li" else ""
                self.found.append(Block(kind, text, self.links, max(0, len(self.lists) - 2), marker))
            self.parts, self.links = [], 0


def _whole(node: Any, tag: str) -> Block | None:
    """Code, or a table of data, as one block; None for a table that only lays out the page."""
    if tag == "pre":
        text = node.text.strip("\n")
        return Block("pre", text, 0) if text.strip() else None
    if node.query_selector("table, p, div, ul, ol, h1, h2, h3, form, pre, blockquote") is not None:
        return None
    rows = [
        [SPACES.sub(" ", cell.text).strip().replace("|", "\\|") for cell in row.children if cell.tag in ("td", "th")]
        for row in node.get_elements_by_tag_name("tr")
    ]
    rows = [row for row in rows if any(row)]
    width = max(map(len, rows), default=0)
    if len(rows) < 2 or width < 2:
        return None
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * width)
    links = sum(len(link.text) for link in node.get_elements_by_tag_name("a"))
    return Block("table", "\n".join(lines), links)


# --- Which blocks stay ---


def _chosen(blocks: list[Block]) -> list[Block]:
    """Good blocks, and short ones, headings, lists, code and tables between or beside good ones."""
    good = [_good(block) for block in blocks]
    if not any(good):  # a page without running text: what is no link
        return [block for block in blocks if block.words >= NEAR_WORDS and block.link_share < MAX_LINKS]
    places = [number for number, is_good in enumerate(good) if is_good]
    first, last = places[0], places[-1]
    after, before = _distances(good)
    kept = []
    for number, block in enumerate(blocks):
        if good[number]:
            kept.append(block)
        elif block.link_share <= MAX_LINKS_LONG:
            inside = first < number < last and min(before[number], after[number]) <= REACH
            behind = block.words >= NEAR_WORDS and before[number] <= REACH
            ends = block.kind in ("pre", "table", "li") or block.text.endswith(TERMINAL)
            if after[number] <= REACH if block.kind in HEADINGS else inside or (behind and ends):
                kept.append(block)
    while kept and kept[-1].kind in HEADINGS:
        kept.pop()
    return kept


def _unlinked(blocks: list[Block]) -> list[Block]:
    """All blocks but those that are made of links, without headings at the end."""
    kept = [block for block in blocks if block.link_share <= MAX_LINKS_LONG]
    while kept and kept[-1].kind in HEADINGS:
        kept.pop()
    return kept


def _good(block: Block) -> bool:
    words = block.words if not _dense(block.text) else len(block.text) // 2
    if block.kind in HEADINGS or block.kind in ("pre", "table"):
        return False
    if block.link_share > (MAX_LINKS_LONG if words >= LONG_WORDS else MAX_LINKS):
        return False
    return words >= GOOD_WORDS if block.kind == "p" else words >= 2 * GOOD_WORDS


def _dense(text: str) -> bool:
    """Whether the text is in a script without spaces between words."""
    return not text.isascii() and len(text) > 8 * (text.count(" ") + 1)


def _distances(good: list[bool]) -> tuple[list[int], list[int]]:
    """For each block how far the next and the last good one are."""
    far = len(good) + REACH
    after, before = [far] * len(good), [far] * len(good)
    for number in range(len(good)):
        before[number] = 0 if good[number] else before[number - 1] + 1 if number else far
    for number in reversed(range(len(good))):
        after[number] = 0 if good[number] else after[number + 1] + 1 if number + 1 < len(good) else far
    return after, before


def _render(blocks: list[Block]) -> str:
    return "".join(_rendered(blocks)).strip("\n")


def _rendered(blocks: list[Block]) -> Iterator[str]:
    last = ""
    for block in blocks:
        yield "\n" if block.kind == last == "li" else "\n\n"
        if block.kind == "pre":
            yield f"```\n{block.text}\n```"
        else:
            yield "  " * block.indent * (block.kind == "li") + HEADINGS.get(block.kind, block.marker) + block.text
        last = block.kind
