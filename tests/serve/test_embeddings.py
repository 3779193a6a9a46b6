"""/v1/embeddings, /tokenize and /detokenize, for a decoder and for a BERT folder; the openai client as the judge."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers
from http_tools import call, metric, post
from tokenizers import Tokenizer as Inner
from tokenizers import models, normalizers, pre_tokenizers, processors

from soma.engine.embed import Embedder
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.serve.running import running_service

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "hello", "world", "jump", "##s", "##ing"]
TEXTS = ["hello world", "the fox jumps", "jumping"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MiniLM: transformers' weights, a WordPiece tokenizer, sentence-transformers' pooling file."""
    folder = tmp_path_factory.mktemp("bert") / "minilm"
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    inner = Inner(models.WordPiece({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


@pytest.fixture(scope="module")
def bert_url(bert_folder: Path) -> Iterator[str]:
    with running_service(bert_folder) as url:
        yield url


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def test_bert_vectors_are_those_of_transformers(bert_url: str, bert_folder: Path) -> None:
    """Mean over the tokens, [CLS] and [SEP] among them, then to length 1: what sentence-transformers does."""
    oracle = transformers.BertModel.from_pretrained(bert_folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bert_folder / "tokenizer.json"))
    made = client(bert_url).embeddings.create(model="minilm", input=TEXTS)  # the client asks for base64
    used = 0
    for text, row in zip(TEXTS, made.data, strict=True):
        ids = tokenizer(text)["input_ids"]
        used += len(ids)
        with torch.no_grad():
            wanted = oracle(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(row.embedding, (wanted / wanted.norm()).numpy(), atol=1e-4)
    assert [row.index for row in made.data] == [0, 1, 2]
    assert (made.usage.prompt_tokens, made.usage.total_tokens) == (used, used)


def test_forms_of_input_and_output(bert_url: str) -> None:
    ids = post(bert_url, "/tokenize", {"prompt": TEXTS[0]})[1]["tokens"]
    assert ids == [2, 7, 8, 3]

    def vectors(**body: Any) -> list[Any]:
        status, value = post(bert_url, "/v1/embeddings", {"model": "minilm", **body})
        assert status == 200, value
        assert value["object"] == "list"
        return [row["embedding"] for row in value["data"]]

    text = vectors(input=TEXTS[0])[0]
    assert len(text) == 32
    assert vectors(input=ids) == vectors(input=[ids]) == [text]
    assert vectors(input=TEXTS[0], dimensions=32, user="me", encoding_format="float") == [text]
    assert np.allclose(vectors(input=[TEXTS[2], TEXTS[0]])[1], text, atol=1e-6)
    coded = np.frombuffer(base64.b64decode(vectors(input=ids, encoding_format="base64")[0]), "<f4")
    assert np.allclose(coded, text, atol=1e-7)


def test_a_decoder_embeds_by_its_last_token(service_url: str, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    made = client(service_url).embeddings.create(model="tiny", input=TEXTS)
    wanted = Embedder(load_model(tiny_folder), tiny_folder).embed([tokenizer.encode(text) for text in TEXTS])
    assert np.allclose([row.embedding for row in made.data], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input"), ({"input": 5}, "input"),
        ({"input": [[]]}, "input"), ({"input": [99999]}, "input"), ({"input": [-1]}, "input"),
        ({"input": ["a", 5]}, "input"), ({"input": ["a"] * 2049}, "input"), ({"input": "fox " * 40}, "input"),
        ({"dimensions": 16}, "dimensions"), ({"dimensions": "x"}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"), ({"colour": 1}, "colour"), ({"input": None}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_embedding_requests(bert_url: str, change: dict[str, Any], param: str) -> None:
    status, value = post(bert_url, "/v1/embeddings", {"model": "minilm", "input": "fox", **change})
    assert (status, value["error"]["param"]) == (400, param)


def test_an_encoder_makes_no_text(bert_url: str) -> None:
    status, value = post(bert_url, "/v1/completions", {"model": "minilm", "prompt": "fox"})
    assert (status, value["error"]["code"]) == (400, "model_makes_no_text")
    assert json.loads(call(bert_url, "GET", "/v1/models")[2])["data"][0]["makes_text"] is False
    assert metric(bert_url, "vllm:num_requests_running") == 0


def test_tokenize_and_back(service_url: str, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    text = "hello world, naïve 日本"
    status, value = post(service_url, "/tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True})
    ids = tokenizer.encode(text)
    assert status == 200
    assert value == {
        "count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": [tokenizer.token_text(id) for id in ids],
    }  # fmt: skip
    assert post(service_url, "/detokenize", {"tokens": ids}) == (200, {"prompt": text})
    messages = [{"role": "user", "content": "hello"}]
    value = post(service_url, "/tokenize", {"messages": messages})[1]
    assert (value["tokens"], value["token_strs"]) == (tokenizer.encode_chat(messages, True), None)
    value = post(service_url, "/tokenize", {"messages": messages, "add_generation_prompt": False})[1]
    assert value["tokens"] == tokenizer.encode_chat(messages, False)


def test_special_tokens_are_left_out_on_request(bert_url: str) -> None:
    body = {"prompt": TEXTS[0], "add_special_tokens": False}
    assert post(bert_url, "/tokenize", body)[1]["tokens"] == [7, 8]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "colour": 1}, 400, "colour"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
    ],
)
def test_bad_tokenize_requests(service_url: str, path: str, body: dict[str, Any], status: int, param: str) -> None:
    got, value = post(service_url, path, body)
    assert (got, value["error"]["param"]) == (status, param)


def test_messages_need_a_template(base_url: str) -> None:
    status, value = post(base_url, "/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert (status, value["error"]["code"]) == (400, "no_chat_template")


def test_the_data_room_asks_for_them(bert_url: str) -> None:
    """What semantic deduplication gets from a service of ours is what any client gets."""
    from soma.data.config import SemanticConfig
    from soma.data.dedup.semantic import Client

    found = Client(SemanticConfig(url=bert_url, model="minilm")).embed(TEXTS)
    answer = client(bert_url).embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    assert np.allclose(found, np.array([row.embedding for row in answer.data]), atol=1e-6)
