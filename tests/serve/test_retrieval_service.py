"""`soma serve MODEL --index`: search, and chats with citations, over a tiny model whose answer is prescribed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from plain_store import Letters, PlainStore
from v2_tools import Record

from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.load import load_weights
from soma.serve.app import create_app
from soma.serve.calls import Gates
from soma.serve.retrieval.index import Cutting, index
from soma.serve.retrieval.qdrant import QdrantStore
from soma.serve.retrieval.routes import Knowledge
from soma.serve.retrieval.search import Retriever
from soma.serve.running import running_service

ANSWER = "In the sea [1]. On the mat [7]."
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "guide" / "river.md").write_text("# River\n\nThe Danube ends in the Black Sea.\n")
    (folder / "cats.txt").write_text("Cats sit on mats.")
    return folder


@pytest.fixture(scope="module")
def knowledge(docs: Path) -> Knowledge:
    store = PlainStore()
    index(store, Letters(), [str(docs)], "idx", Cutting())
    return Knowledge(Retriever(store, Letters()))


@pytest.fixture(scope="module")
def record() -> Record:
    return Record()


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Any]:
    model, tokenizer = load_weights(tiny_folder, precision="fp32", device="cpu")
    made = Engine(model, tokenizer, max_running=4)
    yield made, tokenizer
    made.close()


@pytest.fixture(scope="module")
def client(engine: Any, knowledge: Knowledge, record: Record) -> Iterator[TestClient]:
    with TestClient(create_app(*engine, "tiny", knowledge=knowledge, gates=Gates([record]))) as made:
        yield made


def chat(client: TestClient, **changes: Any) -> Any:
    messages = [{"role": "user", "content": "Where does the Danube end?"}]
    body = {"model": "tiny", "messages": messages, "guided_choice": [ANSWER], "max_tokens": 200, **changes}
    return client.post("/v1/chat/completions", json=body)


def test_search(client: TestClient, docs: Path, record: Record) -> None:
    record.entered.clear()
    answer = client.post("/v1/search", json={"query": "where does the danube end", "limit": 1, "mode": "bm25"})
    assert answer.status_code == 200, answer.text
    (hit,) = answer.json()["data"]
    assert (hit["source"], hit["title"]) == ("guide/river.md", "River")
    assert (docs / hit["source"]).read_text()[hit["start"] : hit["end"]] == hit["text"]
    assert str(docs) not in answer.text
    assert [(call.route, call.model, call.prompt_tokens) for call in record.entered] == [("/v1/search", "tiny", 5)]
    assert answer.headers["x-ratelimit-remaining-requests"] == "7"
    found = client.post("/v1/search", json={"query": "cats", "where": {"source": "guide"}}).json()["data"]
    assert [each["source"] for each in found] == ["guide/river.md"]
    for wrong in (
        {"query": ""},
        {"query": "x", "mode": "best"},
        {"query": "x", "limit": 0},
        {"query": "x", "up": 1},
        {},
    ):
        assert client.post("/v1/search", json=wrong).status_code == 400, wrong


def test_a_chat_cites(client: TestClient) -> None:
    plain = chat(client, retrieval=False).json()
    message = chat(client).json()["choices"][0]["message"]
    assert plain["choices"][0]["message"]["content"] == ANSWER
    assert "citations" not in plain["choices"][0]["message"]
    assert message["content"] == "In the sea [1]. On the mat."
    assert message["citations_dropped"] == 1
    (cited,) = message["citations"]
    assert (cited["number"], cited["at"]) == (1, [11])
    assert cited["source"] in ("guide/river.md", "cats.txt")
    whole, one = (chat(client, retrieval=how).json()["usage"]["prompt_tokens"] for how in (True, {"limit": 1}))
    assert whole > one > plain["usage"]["prompt_tokens"], "passages are in the prompt"
    only = chat(client, retrieval={"where": {"source": "cats.txt"}}).json()["choices"][0]["message"]["citations"]
    assert [each["source"] for each in only] == ["cats.txt"]


def test_a_streamed_chat_cites_in_its_last_delta(client: TestClient) -> None:
    lines = chat(client, stream=True, n=2).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for choice in (0, 1):
        deltas = [each["choices"][0]["delta"] for each in events if each["choices"][0]["index"] == choice]
        assert "".join(delta.get("content") or "" for delta in deltas) == "In the sea [1]. On the mat."
        assert [place for place, delta in enumerate(deltas) if "citations" in delta] == [len(deltas) - 1]
        assert deltas[-1]["citations"][0]["number"] == deltas[-1]["citations_dropped"] == 1
    metrics = client.get("/metrics").text
    assert 'soma_citations_total{kind="dropped"}' in metrics


def test_what_does_not_go_together(client: TestClient, engine: Any) -> None:
    assert chat(client, retrieval={"mode": "best"}).status_code == 400
    assert chat(client, retrieval={"where": {"colour": 1}}).json()["error"]["message"].startswith("filter 'colour'")
    system = [{"role": "system", "content": "Be brief."}]
    assert chat(client, messages=system).status_code == 200, "nothing to search for: as without an index"
    assert chat(client, messages=system, retrieval=True).status_code == 400
    with TestClient(create_app(*engine, "tiny")) as without:
        assert chat(without).json()["choices"][0]["message"]["content"] == ANSWER
        for answer in (chat(without, retrieval=True), without.post("/v1/search", json={"query": "x"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_index")


@pytest.mark.slow
def test_the_command(tiny_folder: Path, docs: Path, tmp_path: Path) -> None:
    """The whole of it with an index on disk, the packaged encoder and the openai client."""
    pytest.importorskip("qdrant_client", reason="the extra [retrieval] is not installed")
    from soma.serve.retrieval.encoders import PACKAGED, load_encoder, packaged_folder

    if packaged_folder() is None:
        pytest.skip(f"{PACKAGED} is not installed (the extra [retrieval])")
    to = str(tmp_path / "idx")
    store = QdrantStore(to, make=True)
    encoder = load_encoder(PACKAGED)
    index(store, encoder, [str(docs)], to, Cutting())
    store.close()
    with running_service(tiny_folder, index=to) as url:
        made = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Where does the Danube end?"}], max_tokens=200,
            extra_body={"guided_choice": [ANSWER], "retrieval": {"limit": 1}},
        )  # fmt: skip
        assert made.choices[0].message.content == "In the sea [1]. On the mat."
        assert made.choices[0].message.citations[0]["source"] == "guide/river.md"  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="another process has this index open"):
            QdrantStore(to)
    QdrantStore(to).close()
