"""The data piece beside datatrove and trafilatura, on real text, one core each, in turns.

Cases: `filters` (Gopher's, C4's and FineWeb's, and whether the decisions agree), `near` (MinHash
deduplication end to end, signatures alone, the same survivors for any workers and order), `pages` (WARC to main
text, speed and F1), `memory` (peak of a whole `build_corpus` with 20 times the input), `tokenize` (a corpus folder to
token shards, beside `tokenizers` alone). Every document occurs once, so a memory of words helps neither side more than
in real use. The peers live in an environment of their own, which is made where it is missing (network, some minutes).

    python benchmarks/data.py --json                       all cases
    python benchmarks/data.py --cases filters --rounds 3   one of them

The real text is read from `../shared/data` or SOMA_TEST_DATA.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import RESULTS, ROOT, Case, compare, finish, make_case, parser

DATA = Path(os.environ.get("SOMA_TEST_DATA", ROOT.parent / "shared" / "data"))
PEERS = Path(__file__).resolve().parent / "peers"
PEER_PACKAGES = [
    "datatrove==0.10.1", "spacy==3.8.*", "nltk", "tldextract", "regex", "orjson", "trafilatura==2.3.1",
    "lxml_html_clean",
]  # fmt: skip
FILTERS = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
BATCH = 512  # documents that are measured together, as in a partition
FILTERS_BAR, AGREEMENT_BAR = 10.0, 0.995
MEMORY_BAR_GIB, FLAT_BAR = 2.0, 0.8
PAGES_BAR, F1_BAR = 2.0, 1.0


@dataclass
class Bench:
    """What the cases share, and what they leave behind."""

    options: argparse.Namespace
    folder: Path
    cases: list[Case] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def rounds(self) -> dict[str, int]:
        return {"rounds": self.options.rounds, "warmup": self.options.warmup}

    def peers(self) -> str:
        """Python of the peers' environment; makes it where it is missing."""
        if self.options.peers:
            return str(self.options.peers)
        home = Path(sys.prefix) / "peers-data"
        if not (home / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, *PEER_PACKAGES], check=True)
            (home / "installed").touch()
        return str(home / "bin" / "python")


class Peer:
    """A peer's script in a process of its own: one line of JSON asks, one answers."""

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        command = [python, str(PEERS / f"{script}.py"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask({})

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        """The answer; raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self.process.wait()}")
        answer: dict[str, object] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- Real text ---


def documents() -> Iterator[str]:
    """Web pages (C4, Dolma), Wikipedia articles (with headings, and one a line), chapters of books; each once."""
    web = DATA / "web_jsonl"
    for path in sorted(web.iterdir()):
        if ".json" in path.name:
            data = path.read_bytes()
            lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
            yield from (json.loads(line)["text"] for line in lines)
    yield from (line for line in (web / "wiki_demo.txt").read_text().splitlines() if line.strip())
    for name in ("test.txt", "valid.txt"):
        text = (DATA / "wikitext2" / name).read_text()
        yield from (part.strip() for part in re.split(r"\n(?= = [^=])", text) if part.strip())
    for path in sorted((DATA / "gutenberg").glob("*.txt")):
        paragraphs = path.read_text(errors="replace").replace("\r\n", "\n").split("\n\n")
        for start in range(0, len(paragraphs), 20):
            if text := "\n\n".join(paragraphs[start : start + 20]).strip():
                yield text


# --- Cases ---


def filters(bench: Bench) -> None:
    """Documents per second through four filters; every decision is compared with datatrove's."""
    import numpy as np

    from soma.data.signals.config import FiltersConfig
    from soma.data.signals.measure import Measurer, decide

    texts = [text for text in documents() if text.split()]
    path = bench.folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    each = {name: FiltersConfig.model_validate({name: {}}) for name in FILTERS}
    decisions: dict[str, list[str]] = {}

    def ours() -> float:
        measurer = Measurer(FILTERS)  # its memory of words is empty
        started = time.perf_counter()
        for name in FILTERS:
            decisions[name] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            found = measurer.measure(batch)
            for name, config in each.items():
                reason_D, names, details = decide(found, config, len(batch))
                decisions[name] += [
                    f"{names[number]}: {detail}" if number >= 0 else ""
                    for number, detail in zip(np.asarray(reason_D).tolist(), details, strict=True)
                ]
        return len(texts) / (time.perf_counter() - started)

    peer = Peer(bench.peers(), "datatrove_peer", path)
    answer: dict[str, dict[str, str | None]] = {}

    def theirs() -> float:
        reply = peer.ask({"filter": True})
        answer.update(reply["decisions"])  # type: ignore[call-overload]
        return len(texts) / float(str(reply["seconds"]))

    bench.cases += compare(
        "four quality filters", "documents/s", ours, {"datatrove": theirs}, bars={"datatrove": FILTERS_BAR},
        **bench.rounds,
    )  # fmt: skip
    peer.close()
    different = [
        {"filter": name, "text": texts[row][:200], "ours": own or "kept", "datatrove": answer[name][str(row)] or "kept"}
        for name in FILTERS
        for row, own in enumerate(decisions[name])
        if bool(own) != (answer[name][str(row)] is not None)
    ]
    agreeing = 1 - len({str(entry["text"]) for entry in different}) / len(texts)
    bench.cases.append(
        make_case("four quality filters, decisions agree", "share", [agreeing], "datatrove", [1.0], AGREEMENT_BAR)
    )
    dropped = {name: sum(map(bool, decisions[name])) for name in FILTERS}
    bench.notes["filters"] = {"documents": len(texts), "dropped": dropped, "disagreements": different}


def pages(bench: Bench) -> None:
    """WARC to main text on made and real pages, and how well the made pages' main text is found."""
    from soma.data.readers import Document, read_item
    from soma.data.sources import Item, list_items

    made, real = made_pages(600), real_pages()
    htmls = [html for html, _ in made] + real
    path, archive = bench.folder / "pages.jsonl", bench.folder / "pages.warc.gz"
    path.write_text("".join(json.dumps({"html": html}) + "\n" for html in htmls))
    archive.write_bytes(b"".join(gzip.compress(warc_record(i, html.encode())) for i, html in enumerate(htmls)))
    (item,) = list_items([str(archive)])
    assert isinstance(item, Item)
    texts: dict[str, list[str]] = {}

    def ours() -> float:
        started = time.perf_counter()
        found = [""] * len(htmls)
        for one in read_item(item, "text"):
            if isinstance(one, Document):
                found[int(one.meta["url"].rpartition("/")[2])] = one.text
        texts["ours"] = found
        return len(htmls) / (time.perf_counter() - started)

    peer = Peer(bench.peers(), "trafilatura_peer", path)

    def theirs() -> float:
        reply = peer.ask({"extract": True})
        texts["trafilatura"] = reply["texts"]  # type: ignore[assignment]
        return len(htmls) / float(str(reply["seconds"]))

    bench.cases += compare(
        "WARC to main text", "pages/s", ours, {"trafilatura": theirs}, bars={"trafilatura": PAGES_BAR}, **bench.rounds
    )
    peer.close()
    scores = {
        side: [word_f1(text, truth) for text, (_, truth) in zip(found, made, strict=False)]
        for side, found in texts.items()
    }
    means = {side: sum(values) / len(values) for side, values in scores.items()}
    bench.cases.append(
        make_case(
            "main text of made pages", "F1 of words", [means["ours"]], "trafilatura", [means["trafilatura"]], F1_BAR
        )
    )
    both = list(zip(texts["ours"], texts["trafilatura"], strict=True))[len(made) :]
    agreeing = [word_f1(one, other) for one, other in both]
    bench.notes["pages"] = {
        "made": len(made), "real": len(real), "agreement on real pages (F1)": sum(agreeing) / len(agreeing),
        "lowest of ours": sorted(scores["ours"])[:5], "lowest of theirs": sorted(scores["trafilatura"])[:5],
    }  # fmt: skip


def made_pages(count: int) -> list[tuple[str, str]]:
    """(html, main text) from paragraphs and headings of Wikipedia."""
    from pages import make_page

    lines = [line.strip() for line in (DATA / "wikitext2" / "test.txt").read_text().splitlines()]
    paragraphs = [line for line in lines if len(line) > 150 and "<unk>" not in line]
    titles = [line.strip("= ") for line in lines if line.startswith("= ") and "<unk>" not in line]
    generator = random.Random(11)
    return [make_page(generator, paragraphs, titles) for _ in range(count)]


def real_pages() -> list[str]:
    """The different HTML pages of the shared archives."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    found: dict[str, None] = {}
    for path in [*sorted((DATA / "warc").glob("*sample-*.warc.gz")), DATA / "warc" / "fastwarc_warcfile.warc.gz"]:
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response, auto_decode="all"):
                if "html" in (record.http_content_type or ""):
                    data = record.reader.read()
                    found[bytes_to_str(data, detect_encoding(data) or "utf-8")] = None
    return list(found)


def warc_record(number: int, html: bytes) -> bytes:
    """A page as a WARC record, answered with 200 by http://pages.example/NUMBER."""
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://pages.example/{number}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012d}>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def word_f1(text: str, truth: str) -> float:
    """F1 of the words, marks of Markdown apart."""
    one, other = (Counter(word for word in side.split() if word.strip("#-*|`")) for side in (text, truth))
    both = (one & other).total()
    return 2 * both / max(1, one.total() + other.total())


def memory(bench: Bench) -> None:
    """Peak memory of a whole corpus run in a process of its own, from 100 MB and from 2 GB of new text."""
    sizes = {"100 MB": 100, "2 GB": 2000}
    peaks = {}
    for name, megabytes in sizes.items():
        source = bench.folder / "memory"
        write_text(source, megabytes)
        run = subprocess.run(
            [sys.executable, str(PEERS / "corpus_run.py"), str(source), str(bench.folder / "corpus")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        facts = json.loads(run.stdout.splitlines()[-1])
        peaks[name] = facts["peak_bytes"] / 2**30
        bench.notes[f"memory {name}"] = facts
        print(f"  {name}: {facts}", file=sys.stderr, flush=True)
    large, small = peaks["2 GB"], peaks["100 MB"]
    bench.cases += [
        make_case("peak memory, 2 GB of text", "GiB", [large], "2 GiB", [MEMORY_BAR_GIB], 1.0, False),
        make_case("peak memory, 2 GB of text", "GiB", [large], "100 MB of text", [small], FLAT_BAR, False),
    ]


def write_text(folder: Path, megabytes: int) -> None:
    """JSONL files of new documents: the words of real ones in another order, so that none is another's duplicate."""
    import numpy as np

    generator = np.random.default_rng(7)
    real = [np.array(text.split(), dtype=object) for text in documents()]
    folder.mkdir(exist_ok=True)
    written, number = sum(path.stat().st_size for path in folder.iterdir()), len(list(folder.iterdir()))
    while written < megabytes * 10**6:
        with open(folder / f"{number:04d}.jsonl", "w") as file:
            while file.tell() < 20 * 10**6:
                words = generator.permutation(real[generator.integers(len(real))])
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
            written += file.tell()
        number += 1


def near(bench: Bench) -> None:
    """Near-duplicates (benchmarks/data_dedup.py)."""
    import data_dedup

    texts = [text for text in documents() if text.split()]
    data_dedup.near(bench, texts, lambda *arguments: Peer(bench.peers(), *arguments))


def tokenize(bench: Bench) -> None:
    """Token shards of a corpus (benchmarks/data_tokenize.py)."""
    import data_tokenize

    data_tokenize.tokenize(bench, [text for text in documents() if text.split()])


CASES: dict[str, Callable[[Bench], None]] = {
    "filters": filters, "near": near, "pages": pages, "memory": memory, "tokenize": tokenize
}  # fmt: skip


def main() -> None:
    command = parser("data", __doc__.splitlines()[0], rounds=3)
    command.add_argument("--peers", help="Python of an environment with the peers (made where this is not given)")
    command.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    command.set_defaults(threads=1)
    options = command.parse_args()
    if not DATA.exists():
        raise SystemExit(f"no real text in {DATA}; set SOMA_TEST_DATA")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.cases:
            began = time.monotonic()
            try:
                CASES[name](bench)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                bench.not_run[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finish(
        "data",
        options,
        bench.cases,
        ["datatrove", "spacy", "trafilatura", "daft", "pyarrow", "tokenizers"],
        bench.not_run,
    )
    if options.json:
        path = RESULTS / "data_notes.json"
        notes = (json.loads(path.read_text()) if path.exists() else {}) | bench.notes
        path.write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(bench.notes, indent=1, ensure_ascii=False)[:4000])


if __name__ == "__main__":
    main()
