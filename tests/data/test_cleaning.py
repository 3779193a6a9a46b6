"""Personal data planted in real and made pages, masking, mojibake, lines taken out, scorers."""

import http.server
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from soma.base.errors import UserError
from soma.data.clean import clean_text
from soma.data.config import CleanConfig, DataConfig
from soma.data.corpus import build_corpus, read_corpus
from soma.data.signals.personal import KINDS, find, iban, luhn, mask
from soma.data.signals.scorers import open_scorer

FILLER = [
    "The ship left at 12:30 with 1,250 crates and came back on 2021-03-04.", "Version 3.11.7 of 2 programs.",
    "It costs $1,299.00, or 3.5 % less, says section 4.2.1 of RFC 2616.", "std::vector and a::b::c are C++ names.",
    "Rooms 101-104 are on floor 1; call number QA76.73 is at 0.5 km.", "In 1914-1918 about 20 000 000 people died.",
    "The scale is 1:250 000 and the ratio 16:9, at 10.5.2 in the list.", "ISBN 978-3-16-148410-0 is an example.",
    "Order 4111111111111112 was wrong, and 1234567890123456 is no card.", "See @somebody at the corner, or a@b.",
]  # fmt: skip


def luhn_digit(digits: str) -> str:
    return next(digit for digit in "0123456789" if luhn(digits + digit))


def planted(generator: random.Random) -> tuple[str, str]:
    """(kind, text) of a made piece of personal data."""

    def digits(count: int) -> str:
        return "".join(generator.choice("0123456789") for _ in range(count))

    kind = generator.choice(KINDS)
    if kind == "email":
        name, host = generator.choice(["jo.doe", "x_y+z", "info"]), generator.choice(["mail.example", "a-b.co"])
        return kind, f"{name}{digits(2)}@{host}.uk"
    if kind == "ip":
        four = ".".join(str(generator.randrange(1, 255)) for _ in range(4))
        return kind, generator.choice([four, f"2001:db8:85a3::8a2e:370:{generator.randrange(1000, 9999)}"])
    if kind == "phone":
        shapes = [
            "+44 20 7946 {0}",
            "+1-202-555-{0}",
            "(202) 555-{0}",
            "202-555-{0}",
            "+49 (0)30 1234{0}",
            "030/234{0}",
        ]
        return kind, generator.choice(shapes).format(f"{digits(3)}7")
    if kind == "card":
        number = generator.choice(["4", "51", "34", "6011"])
        number += digits((14 if number == "34" else 15) - len(number))
        number += luhn_digit(number)
        grouped = " ".join(number[i : i + 4] for i in range(0, len(number), 4))
        return kind, number if generator.random() < 0.5 else grouped
    if kind == "iban":
        return kind, generator.choice(
            ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "NL91 ABNA 0417 1643 00"]
        )
    letters = "".join(generator.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(36))
    return kind, generator.choice(["AKIA" + letters[:16], "ghp_" + letters, "sk-" + letters, "hf_" + letters])


def pages(generator: random.Random, filler: Sequence[str]) -> Iterator[tuple[str, Counter[tuple[str, str]]]]:
    for _ in range(120):
        parts, truth = [], Counter[tuple[str, str]]()
        for _ in range(generator.randrange(4, 20)):
            parts.append(generator.choice(filler))
            if generator.random() < 0.4:
                kind, text = planted(generator)
                truth[kind, text] += 1
                parts.append(
                    generator.choice(["Write to {}.", "({})", "{}, please", "it is {} now", "“{}”"]).format(text)
                )
        yield " ".join(parts), truth


def quality(found: Counter[tuple[str, str]], truth: Counter[tuple[str, str]]) -> tuple[float, float]:
    hits = (found & truth).total()
    return hits / max(1, found.total()), hits / truth.total()


def test_planted_personal_data_is_found() -> None:
    generator = random.Random(4)
    found, truth = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for text, planted_here in pages(generator, FILLER):
        found.update((one.kind, text[one.start : one.end]) for one in find(text))
        truth += planted_here
        masked, counts = mask(text)
        assert not any(piece in masked for _, piece in planted_here)
        assert counts.total() == len(find(text))
    precision, recall = quality(found, truth)
    assert recall > 0.99, (truth - found).most_common(8)
    assert precision > 0.99, (found - truth).most_common(8)
    assert {kind for kind, _ in found} == set(KINDS)
    # Negative control: with the check digits wrong, no card is a card.
    assert not [one for one in find("4111 1111 1111 1112 and 5500000000000005") if one.kind == "card"]


def test_personal_data_planted_in_real_pages(shared_data) -> None:  # type: ignore[no-untyped-def]
    lines = shared_data("web_jsonl/wiki_demo.txt").read_text().splitlines()[:40]
    filler = [part for line in lines for part in line[:4000].split(". ") if part and not find(part)]
    found, truth = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for text, planted_here in pages(random.Random(8), filler):
        found.update((one.kind, text[one.start : one.end]) for one in find(text))
        truth += planted_here
    precision, recall = quality(found, truth)
    assert recall > 0.98
    assert precision > 0.98


def test_checks() -> None:
    assert luhn("4111111111111111")
    assert not luhn("4111111111111112")
    assert iban("GB82 WEST 1234 5698 7654 32")
    assert not iban("GB82 WEST 1234 5698 7654 33")
    assert not iban("GB82 WEST 1234")
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"
    assert mask(f"a {key} b") == ("a <secret> b", Counter(secret=1))
    assert mask("at 127.0.0.1 and 0.0.0.0, 1.2.3.4.5, 300.1.1.1") == (
        "at 127.0.0.1 and 0.0.0.0, 1.2.3.4.5, 300.1.1.1",
        Counter(),
    )


def test_masked_in_the_corpus(tmp_path: Path) -> None:
    texts = [
        f"Document number {i}: write to user{i}@mail.example.org or call 202-555-{i}17 today." for i in range(10, 60)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def build(name: str, **clean: object) -> list[dict[str, object]]:
        (tmp_path / name).mkdir()
        config = DataConfig(
            sources=str(tmp_path / "x.jsonl"), clean=clean, attributes=["personal"], dedup={"near": False}
        )  # type: ignore[arg-type]
        build_corpus(config, tmp_path / name)
        assert len(pq.read_table(tmp_path / name / "attributes-train-00000.parquet")) > 30
        return list(read_corpus(tmp_path / name, "train"))

    plain = build("plain")
    assert "@mail" in str(plain[0]["text"])
    first = pq.read_table(tmp_path / "plain" / "attributes-train-00000.parquet").to_pylist()[0]
    assert (first["personal_email"], first["personal_phone"], first["personal_card"]) == (1, 1, 0)
    masked = build("masked", mask_personal=True)
    assert "write to <email> or call <phone> today" in str(masked[0]["text"])
    assert json.loads(str(masked[0]["meta"]))["masked"] == {"email": 1, "phone": 1}


# --- Cleaning ---


def test_mojibake_is_repaired_when_asked_for() -> None:
    broken = "Das ist ein schÃ¶ner Tag fÃ¼r Ã„pfel â€“ und nichts anderes."
    assert clean_text(broken, CleanConfig())[0] == broken
    assert (
        clean_text(broken, CleanConfig(mojibake=True))[0] == "Das ist ein schöner Tag für Äpfel – und nichts anderes."
    )
    right = "Das ist ein schöner Tag – “so” war es, señor, 日本."
    assert clean_text(right, CleanConfig(mojibake=True))[0] == right


def test_lines_are_taken_out_when_asked_for() -> None:
    text = "Home\nThis sentence is one that stays.\nSHARE THIS PAGE NOW\nno end here at all"
    assert clean_text(text, CleanConfig())[0] == text
    assert clean_text(text, CleanConfig(remove_lines=["c4"]))[0] == "This sentence is one that stays."
    any_end = "This sentence is one that stays.\nSHARE THIS PAGE NOW\nno end here at all"
    assert clean_text(text, CleanConfig(remove_lines=["c4_any"]))[0] == any_end
    both = "This sentence is one that stays.\nno end here at all"
    assert clean_text(text, CleanConfig(remove_lines=["c4_any", "refinedweb"]))[0] == both
    assert clean_text("Home\nNews", CleanConfig(remove_lines=["c4"]))[1] == "empty"


# --- Scorers ---


def test_words_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# ours\nbad\nvery bad\n")
    scorer = open_scorer(f"words:{tmp_path / 'list.txt'}")
    assert scorer.score(["A bad day.", "A very bad day, badly.", "good", ""]) == [1 / 3, 2 / 5, 0, 0]
    for address, problem in (("words:nowhere.txt", "cannot be read"), ("model.bin", "neither")):
        with pytest.raises(UserError, match=problem):
            open_scorer(address)
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    with pytest.raises(UserError, match="holds no word"):
        open_scorer(f"words:{tmp_path / 'list.txt'}")


class Answers(http.server.BaseHTTPRequestHandler):
    """Scores a text by its length; one text is too much for it."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        scores = [len(text) for text in texts if text != "short"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": scores}).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/score"
        server.shutdown()


def test_scores_of_a_service_decide(tmp_path: Path, service: str) -> None:
    texts = [f"Text number {i} " + "word " * i for i in range(20, 60)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "out").mkdir()
    config = DataConfig(
        sources=str(tmp_path / "x.jsonl"),
        filters={"quality": {"scorer": service, "max_score": 250}},
        workers=2,  # type: ignore[arg-type]
    )
    build_corpus(config, tmp_path / "out")
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    reasons = [row for row in dropped if row["reason"] == "quality.max_score"]
    assert len(reasons) == sum(len(text.strip()) > 250 for text in texts)
    assert reasons[0]["detail"].endswith(", at most 250")
    with pytest.raises(UserError, match="2 scores for 3 texts"):
        open_scorer(service).score(["short", "a", "b"])
    with pytest.raises(UserError, match="gave no scores"):
        open_scorer("http://127.0.0.1:9/").score(["a"])
    unnamed = config.model_copy(
        update={"filters": config.filters.model_copy(update={"quality": type(config.filters.quality)(min_score=1)})}
    )  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"data\.filters\.quality: no scorer was given"):
        build_corpus(unnamed, tmp_path / "out")


def test_a_scorer_of_the_run_itself(tmp_path: Path) -> None:
    class Spaces:
        name = "spaces"

        def score(self, texts: Sequence[str]) -> list[float]:
            return [text.count(" ") for text in texts]

    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"word {'x ' * i}end{i}"}) for i in range(10, 60)))
    (tmp_path / "out").mkdir()
    config = DataConfig(
        sources=str(tmp_path / "x.jsonl"), filters={"quality": {"min_score": 30}}, dedup={"near": False}
    )  # type: ignore[arg-type]
    build_corpus(config, tmp_path / "out", scorer=Spaces())
    rows = [row["text"].count(" ") for split in ("train", "validation") for row in read_corpus(tmp_path / "out", split)]
    assert min(rows) == 30
