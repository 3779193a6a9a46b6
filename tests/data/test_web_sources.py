"""Web archives, main text of pages, Wikipedia, PDF, JSONL of known corpora, and what tries to break their readers."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from soma.data import compression
from soma.data.archives import MAGICS
from soma.data.extract import main_text
from soma.data.readers import Document, Dropped, read_item
from soma.data.sources import Item, list_items
from soma.data.wikipedia import markup_to_text

SENTENCE = "The lighthouse keeper wrote down the weather every evening, and nobody ever read what he had written."


def page(body: str, title: str = "A page") -> str:
    return f"<!doctype html><html><head><title>{title}</title></head><body>{body}</body></html>"


def article(number: int = 0) -> str:
    return page(
        f"""<nav><a href="/">Home</a> <a href="/x">News</a></nav>
        <div class="sidebar"><ul><li><a href="/1">One more story</a></li><li><a>Two</a></li></ul></div>
        <div class="content"><h1>Title {number}</h1><p>{SENTENCE} Page {number}.</p>
        <h2>Numbers</h2><p>Here <b>follow</b> some <a href="/n">numbers</a> that were counted on the way here.</p>
        <table><tr><th>year</th><th>ships</th></tr><tr><td>1901</td><td>12</td></tr></table>
        <ul><li>first of the <i>points</i></li><li>second of the points</li></ul><pre>for x in y:
    print(x)</pre><p>{SENTENCE}</p></div>
        <div id="comments"><p>Great post, thank you so much for all of these words about the sea, really!</p></div>
        <footer><p>© 2020 Somebody. All rights reserved, in all the countries of the whole wide world.</p></footer>"""
    )


def found_in(path: Path, text_field: str = "text", main_only: bool = False) -> tuple[list[Document], list[Dropped]]:
    (item,) = list_items([str(path)])
    assert isinstance(item, Item)
    found = list(read_item(item, text_field, main_only))
    documents = [one for one in found if isinstance(one, Document)]
    return documents, [one for one in found if isinstance(one, Dropped)]


# --- Main text ---


def test_main_text_keeps_structure_and_leaves_the_rest() -> None:
    assert main_text(article()) == (
        f"# Title 0\n\n{SENTENCE} Page 0.\n\n## Numbers\n\nHere follow some numbers that were counted on the way here."
        "\n\n| year | ships |\n| --- | --- |\n| 1901 | 12 |\n\n- first of the points\n- second of the points\n\n"
        f"```\nfor x in y:\n    print(x)\n```\n\n{SENTENCE}"
    )
    nested = "<ol><li>one of the many points<ul><li>below the first one</li></ul></li><li>two of the many</li></ol>"
    assert main_text(page(f"<main><p>{SENTENCE}</p>{nested}<p>{SENTENCE}</p></main>")).split("\n\n")[1] == (
        "1. one of the many points\n  - below the first one\n2. two of the many"
    )
    only = page(f"<p>{SENTENCE}</p><main><h1>Main</h1><p>{SENTENCE} In main.</p><p>Short.</p></main><p>{SENTENCE}</p>")
    assert main_text(only) == f"# Main\n\n{SENTENCE} In main.\n\nShort."


def test_main_text_of_odd_pages() -> None:
    assert main_text("") == ""
    assert main_text(page("<nav><a>only</a><a>links</a></nav>")) == ""
    assert main_text(page(f"<p>{SENTENCE}<p>{SENTENCE} Not closed.")) == f"{SENTENCE}\n\n{SENTENCE} Not closed."
    russian = "Смотритель маяка каждый вечер записывал погоду, и никто никогда не читал того, что он там написал."
    assert main_text(page(f"<p>{russian}</p>").encode("windows-1251"), "windows-1251") == russian
    meta = f'<html><head><meta charset="koi8-r"></head><body><p>{russian}</p></body></html>'
    assert main_text(meta.encode("koi8-r")) == russian
    assert main_text(page(f"<p>{russian}</p>").encode(), "no-such-charset") == russian
    chinese = "灯塔看守人每天晚上都会记下当天的天气情况，但从来没有人读过他写下的那些文字，直到很多年以后。"
    assert main_text(page(f"<p>{chinese}</p>").encode()) == chinese


@pytest.mark.parametrize("inner", ["<div>", "<table><tr><td>", "<ul><li>", "<b>", "<blockquote>", "<span><p>"])
def test_a_page_of_nested_elements_is_no_danger(inner: str) -> None:
    bomb = page(f"<p>{SENTENCE}</p>" + inner * 20_000 + SENTENCE)
    code = "import sys\nfrom soma.data.extract import main_text\nprint(len(main_text(sys.stdin.read())))"
    run = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= len(SENTENCE)


# --- Web archives ---


def record(kind: str, url: str, body: bytes, content: str, http: bytes = b"") -> bytes:
    block = http + body
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
    head += f"WARC-Record-ID: <urn:uuid:{abs(hash((url, kind)))}>\r\nContent-Type: {content}\r\n"
    return head.encode() + f"Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


def response(number: int, body: bytes | None = None, status: str = "200 OK", kind: str = "text/html") -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode()
    body = article(number).encode() if body is None else body
    return record("response", f"http://a.org/{number}", body, "application/http; msgtype=response", http)


def test_pages_of_an_archive(tmp_path: Path) -> None:
    records = [
        record("request", "http://a.org/0", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        response(0), response(1, status="404 Not Found"), response(2, b"%PDF", kind="application/pdf"), response(3),
        response(4, page("<nav><a>links</a></nav>").encode()), response(5, b"\xff\xd8", kind=""),
    ]  # fmt: skip
    for name, data in (("a.warc", b"".join(records)), ("b.warc.gz", b"".join(map(gzip.compress, records)))):
        (tmp_path / name).write_bytes(data)
        documents, dropped = found_in(tmp_path / name)
        assert [document.meta["url"] for document in documents] == ["http://a.org/0", "http://a.org/3"]
        assert documents[1].text == main_text(article(3))
        reasons = [one.reason for one in dropped]
        assert reasons == ["http_status", "not_a_page", "no_main_text", "not_a_page"]
        assert dropped[0].detail == "404 http://a.org/1"


@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_record_costs_itself_alone(tmp_path: Path, packed: bool) -> None:
    pack = gzip.compress if packed else bytes
    good = [pack(response(number)) for number in range(6)]
    noise = b"\x1f\x8b\x08" + b"\x99" * 300
    if not packed:
        noise = b"WARC/1.9 nonsense\r\nno header here" + b"x" * 300 + b"\r\n\r\n"
    assert any(magic in noise for magic in MAGICS)
    path = tmp_path / ("x.warc.gz" if packed else "x.warc")
    path.write_bytes(b"".join([*good[:3], noise, *good[3:5], good[5][: len(good[5]) // 2]]))
    documents, dropped = found_in(path)
    urls = [document.meta["url"][-1] for document in documents]
    assert urls[:5] == list("01234")
    assert {one.reason for one in dropped} <= {"broken_record", "no_main_text"}  # the last one is cut off
    assert dropped
    assert "after record 3" in dropped[0].detail


def test_texts_of_a_wet_file(tmp_path: Path) -> None:
    records = [record("conversion", f"http://a.org/{i}", f"{SENTENCE} {i}".encode(), "text/plain") for i in range(2)]
    (tmp_path / "x.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, records)))
    documents, dropped = found_in(tmp_path / "x.warc.wet.gz")
    assert [document.text for document in documents] == [f"{SENTENCE} 0", f"{SENTENCE} 1"]
    assert not dropped


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("dolma_sample-0000.warc.gz", 20), ("fastwarc_warcfile.warc.lz4", 12), ("fastwarc_clipped.warc.gz", 1),
        ("warcio_example-trunc.warc", 1), ("ccnet_sample.warc.wet", 2),
    ],
)  # fmt: skip
def test_real_archives(shared_data, name: str, pages: int) -> None:  # type: ignore[no-untyped-def]
    documents, _ = found_in(shared_data(f"warc/{name}"))
    assert len(documents) >= pages
    assert all(document.text and document.meta["url"] for document in documents)


# --- Wikipedia ---

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<page><title>Sea</title><ns>0</ns><text>{{Box|{{b|c}}}}'''Sea''' is [[salt water|water]] with salt.&lt;ref>x&lt;/ref>

== Life ==
{| class="wikitable"
| a || b
|}
* [[Fish]] swim
** small ones
[[File:x.jpg|thumb|A [[boat]] here]]See [http://x.org the page].

== Empty ==
=== Also ===
[[Category:Water]]</text></page>
<page><title>Ocean</title><ns>0</ns><redirect title="Sea"/><revision><text>#REDIRECT</text></revision></page>
<page><title>Talk:Sea</title><ns>1</ns><revision><text>What?</text></revision></page>
<page><title>Land</title><ns>0</ns><revision><text>Land is &amp;amp; stays dry.</text></revision></page>
</mediawiki>"""


def test_articles_of_a_dump(tmp_path: Path) -> None:
    (tmp_path / "x-pages-articles.xml.bz2").write_bytes(bz2.compress(DUMP.encode()))
    documents, dropped = found_in(tmp_path / "x-pages-articles.xml.bz2")
    assert [document.text for document in documents] == [
        "# Sea\n\nSea is water with salt.\n\n## Life\n\n- Fish swim\n  - small ones\nSee the page.",
        "# Land\n\nLand is & stays dry.",
    ]
    assert documents[0].meta == {"title": "Sea"}
    assert not dropped
    (tmp_path / "cut.xml").write_text(DUMP[:-300])
    documents, dropped = found_in(tmp_path / "cut.xml")
    assert [document.meta["title"] for document in documents] == ["Sea"]
    assert [one.reason for one in dropped] == ["corrupt"]


@pytest.mark.parametrize("mark", ["{{", "[[", "{|", "<ref>", "<ref name=", "''", "}}", "<!--", "==", "[http://a "])
def test_markup_that_never_closes(mark: str) -> None:
    assert isinstance(markup_to_text("Text. " + mark * 20_000), str)  # and in seconds: the suite has a time limit
    assert markup_to_text("a {{b}} c [[d") == "a  c d"


def test_entities_that_swell_are_refused(tmp_path: Path) -> None:
    names = [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)]
    bomb = f'<!DOCTYPE m [<!ENTITY a0 "ha">{"".join(names)}]>'
    bomb += "<m><page><title>x</title><ns>0</ns><text>&a11;</text></page></m>"
    (tmp_path / "x.xml").write_text(bomb)
    documents, dropped = found_in(tmp_path / "x.xml")
    assert not documents
    assert dropped[0].reason == "corrupt"


def test_articles_of_wikitext(tmp_path: Path) -> None:
    text = "\n = Sea = \n \n A well @-@ known sea , 1 @,@ 000 m deep . \n \n = = Life = = \n \n Fish . \n"
    text += " = Land = \n \n Dry . \n"
    (tmp_path / "wiki.test.tokens").write_text(text)
    documents, _ = found_in(tmp_path / "wiki.test.tokens")
    assert documents[0].text == "# Sea\n\nA well-known sea , 1,000 m deep .\n\n## Life\n\nFish ."
    assert [document.meta for document in documents] == [{"title": "Sea"}, {"title": "Land"}]


def test_real_wikitext(shared_data) -> None:  # type: ignore[no-untyped-def]
    documents, dropped = found_in(shared_data("wikitext2/wiki.test.raw"))
    assert len(documents) == 62  # as counted by its makers, and two with a heading of their own
    assert not dropped


# --- PDF ---


def pdf(*pages: str) -> bytes:
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        kids.append(len(objects) + 1)
        contents = f"/Contents {len(objects)} 0 R /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {contents} >>")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(f'{kid} 0 R' for kid in kids)}] /Count {len(kids)} >>"
    out, places = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010d} 00000 n \n" for place in places).encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def test_text_of_pdf_files(tmp_path: Path) -> None:
    (tmp_path / "good.pdf").write_bytes(pdf("Hello from page one", "And from page two"))
    documents, dropped = found_in(tmp_path / "good.pdf")
    assert [(one.text, one.meta) for one in documents] == [("Hello from page one\n\nAnd from page two", {"pages": 2})]
    assert not dropped
    for name, data, reason in (
        ("scan.pdf", pdf("", ""), "no_text"), ("no.pdf", b"%PDF-1.4 no more", "corrupt"), ("e.pdf", b"", "corrupt"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        documents, dropped = found_in(tmp_path / name)
        assert not documents
        assert [one.reason for one in dropped] == [reason]


# --- JSONL of known corpora, compressed files ---

ROWS = {
    "c4": ({"text": SENTENCE, "url": "http://a.org", "when": "2019"}, {"url": "http://a.org", "when": "2019"}),
    "dolma": (
        {"id": "7", "text": SENTENCE, "source": "cc", "metadata": {"lang": "en", "spans": [1]}},
        {"id": "7", "source": "cc", "metadata.lang": "en"},
    ),
    "pile": ({"text": SENTENCE, "meta": {"pile_set_name": "Books3"}}, {"meta.pile_set_name": "Books3"}),
    "oscar": (
        {"content": SENTENCE, "warc_headers": {"warc-target-uri": "http://a.org"}, "metadata": {"harmful_pp": 12.5}},
        {"warc_headers.warc-target-uri": "http://a.org", "metadata.harmful_pp": 12.5},
    ),
    "redpajama2": ({"raw_content": SENTENCE, "doc_id": "x"}, {"doc_id": "x"}),
}  # fmt: skip
PACK = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("packed", PACK)
def test_rows_of_known_corpora(tmp_path: Path, shape: str, packed: str) -> None:
    row, meta = ROWS[shape]
    path = tmp_path / f"x.jsonl{packed}"
    path.write_bytes(PACK[packed](json.dumps(row).encode() + b"\n"))
    documents, dropped = found_in(path)
    assert [(one.text, one.meta) for one in documents] == [(SENTENCE, meta)]
    assert not dropped


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_swells_without_end_is_left(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "BOMB_BYTES", 1 << 20)
    good = json.dumps({"text": SENTENCE}) + "\n"
    path = tmp_path / f"x.jsonl{packed}"
    path.write_bytes(PACK[packed](good.encode() + b" " * (64 << 20)))
    documents, dropped = found_in(path)
    assert [one.text for one in documents] in ([SENTENCE], [])
    assert [one.reason for one in dropped] == ["bomb"]
    assert "swell" in dropped[0].detail


@pytest.mark.parametrize("packed", [".bz2", ".xz"])
def test_truncated_and_corrupt_files_keep_what_came_before(tmp_path: Path, packed: str) -> None:
    import random

    generator = random.Random(3)
    rows = "".join(json.dumps({"text": f"{SENTENCE} {generator.random()}"}) + "\n" for _ in range(20_000))
    path = tmp_path / f"x.jsonl{packed}"
    data = PACK[packed](rows.encode())
    path.write_bytes(data[: len(data) * 3 // 4])
    documents, dropped = found_in(path)
    assert len(documents) > 5_000
    assert {one.reason for one in dropped} == {"truncated"}
    path.write_bytes(b"this was never compressed")
    documents, dropped = found_in(path)
    assert not documents
    assert [one.reason for one in dropped] == ["corrupt"]


def test_schema_drift_between_files_is_told_file_by_file(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from soma.data.config import DataConfig
    from soma.data.corpus import build_corpus

    (tmp_path / "in").mkdir()
    texts = [f"{SENTENCE} Number {i}." for i in range(4)]
    pq.write_table(pa.table({"text": texts[:2], "n": [1, 2]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"body": texts[2:], "n": ["x", "y"]}), tmp_path / "in" / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([1.5, 2.5])}), tmp_path / "in" / "c.parquet")
    (tmp_path / "in" / "d.jsonl").write_text(json.dumps({"text": texts[3]}) + "\n" + json.dumps({"text": ["a"]}))
    (tmp_path / "out").mkdir()
    config = DataConfig(sources=str(tmp_path / "in"), dedup={"near": False}, validation_fraction=0)  # type: ignore[arg-type]
    build_corpus(config, tmp_path / "out")
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert {(row["source"], row["reason"]) for row in dropped} >= {
        ("b.parquet", "no_text_field"), ("c.parquet#1", "text_not_string"), ("d.jsonl#2", "text_not_string"),
    }  # fmt: skip


LONG_LINE = """
import resource
import sys
from soma.data.readers import Document, read_item
from soma.data.sources import list_items
(item,) = list_items([sys.argv[1]])
kinds = [type(found).__name__ for found in read_item(item, "text")]
print(kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_line_of_a_gigabyte_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps({"text": SENTENCE}).encode() + b"\n" + b'{"text": "')
        file.truncate(1 << 30)  # a sparse file: the line goes on with NULs, which takes no disk
        file.seek(0, 2)
        file.write(b'"}\n' + json.dumps({"text": SENTENCE + " End."}).encode())
    run = subprocess.run([sys.executable, "-c", LONG_LINE, str(path)], capture_output=True, text=True, check=True)
    kinds, _, peak = run.stdout.strip().rpartition(" ")
    assert kinds == "['Document', 'Dropped', 'Document']"
    assert int(peak) * 1024 < 500 << 20
