"""LangChain as a client, OpenAI's responses, rerank and score."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from http_tools import call, post
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr
from tiny import make_model

from soma.serve.running import running_service

NO_KEY = SecretStr("none")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = make_model(tmp_path_factory.mktemp("clients"))
    with running_service(folder, in_process=True, name="tiny") as made:
        yield made


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def test_langchain_chat(url: str, client: openai.OpenAI) -> None:
    """The same text as the openai client's, whole, as a stream and in a batch, with its usage."""
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        max_tokens=8, temperature=0,
    ).choices[0].message.content  # fmt: skip
    model = ChatOpenAI(model="tiny", base_url=url + "/v1", api_key=NO_KEY, temperature=0, max_completion_tokens=8,
                       stream_usage=True)  # fmt: skip
    prompt = [SystemMessage("be kind"), HumanMessage("hello")]
    answer = model.invoke(prompt)
    assert answer.content == said
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 8
    whole: Any = None
    for chunk in model.stream(prompt):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == said
    assert whole.usage_metadata == answer.usage_metadata
    assert [each.content for each in model.batch([prompt, prompt])] == [said, said]


def test_langchain_embeddings(url: str, client: openai.OpenAI) -> None:
    """Texts as they are (its default counts with tiktoken, which wants the network)."""
    texts = ["hello world", "the lazy dog"]
    direct = [each.embedding for each in client.embeddings.create(model="tiny", input=texts).data]
    model = OpenAIEmbeddings(model="tiny", base_url=url + "/v1", api_key=NO_KEY, check_embedding_ctx_length=False)
    np.testing.assert_allclose(model.embed_documents(texts), direct, atol=1e-6)
    np.testing.assert_allclose(model.embed_query(texts[1]), direct[1], atol=1e-6)


RESPONSE: dict[str, Any] = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 8}


def test_responses(client: openai.OpenAI) -> None:
    """The same tokens as chat completions make of the same turns."""
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        max_tokens=8, temperature=0,
    )  # fmt: skip
    whole = client.responses.create(**RESPONSE, instructions="be kind")
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    is_cut = chat.choices[0].finish_reason == "length"
    assert whole.status == ("incomplete" if is_cut else "completed")
    parts = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
    items: Any = [{"role": "system", "content": "be kind"}, {"type": "message", "role": "user", "content": parts}]
    assert client.responses.create(**{**RESPONSE, "input": items}).output_text == whole.output_text


def test_a_stream_of_a_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(**RESPONSE)
    events = list(client.responses.create(**RESPONSE, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    assert last.response.status == whole.status


def test_a_response_of_a_form(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}  # fmt: skip
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    text = client.responses.create(**{**RESPONSE, "max_output_tokens": 40}, text=form).output_text
    assert json.loads(text) in ({"yes": True}, {"yes": False})


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"previous_response_id": "resp_1"}, "previous_response_id"), ({"tools": [{"type": "web_search"}]}, "tools"),
     ({"input": []}, "input"), ({"input": [{"type": "function_call_output"}]}, "input"),
     ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"), ({"n": 2}, "n"),
     ({"text": {"format": {"type": "xml"}}}, "text"), ({"messages": []}, "messages")],
)  # fmt: skip
def test_what_responses_refuse(url: str, changes: dict[str, Any], param: str) -> None:
    status, value = post(url, "/v1/responses", {**RESPONSE, **changes})
    assert status == 400
    assert value["error"]["param"] == param


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live"])
def test_health(url: str, path: str) -> None:
    assert call(url, "GET", path)[0] == 200


DOCUMENTS = ["the quick brown fox", "hello world!", "naïve and 日本"]


def test_rerank_is_the_cosine(url: str, client: openai.OpenAI) -> None:
    vectors = np.array([e.embedding for e in client.embeddings.create(model="tiny", input=["hello", *DOCUMENTS]).data])
    cosine = vectors[1:] @ vectors[0]
    documents: list[Any] = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]
    status, value = post(url, "/v1/rerank", {"model": "tiny", "query": "hello", "documents": documents})
    assert status == 200
    assert [each["index"] for each in value["results"]] == list(np.argsort(-cosine))
    for each in value["results"]:
        assert abs(each["relevance_score"] - cosine[each["index"]]) < 1e-5
        assert each["document"]["text"] == DOCUMENTS[each["index"]]
    _, best = post(url, "/v1/rerank", {"model": "tiny", "query": "hello", "documents": documents, "top_n": 1,
                                       "return_documents": False})  # fmt: skip
    assert best["results"] == [{key: value["results"][0][key] for key in ("index", "relevance_score")}]


def test_score(url: str) -> None:
    status, value = post(url, "/v1/score", {"model": "tiny", "text_1": "hello", "text_2": ["hello", *DOCUMENTS]})
    assert status == 200
    assert abs(value["data"][0]["score"] - 1) < 1e-5
    pairs = {"model": "tiny", "text_1": ["hello", DOCUMENTS[0]], "text_2": [DOCUMENTS[1], "hello"]}
    _, paired = post(url, "/v1/score", pairs)
    assert abs(paired["data"][0]["score"] - value["data"][2]["score"]) < 1e-5
    assert abs(paired["data"][1]["score"] - value["data"][1]["score"]) < 1e-5


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/rerank", {"query": "", "documents": ["a"]}), ("/v1/rerank", {"query": "a", "documents": []}),
     ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}), ("/v1/score", {"text_1": [], "text_2": []}),
     ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}), ("/v1/score", {"text_1": "a", "text_2": ""})],
)  # fmt: skip
def test_what_rerank_and_score_refuse(url: str, path: str, body: dict[str, Any]) -> None:
    assert post(url, path, {"model": "tiny", **body})[0] == 400
