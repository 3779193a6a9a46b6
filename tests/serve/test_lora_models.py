"""Adapters as models of the service: chosen by name, listed, loaded and unloaded, there again after a crash."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from adapter_folders import greedy_alone, make_adapter
from http_tools import JSON, call, metric, post, wait_for
from test_replicas import engines_of

from soma.base.errors import UserError
from soma.model.lora_config import LoRAConfig
from soma.model.tokenizer import Tokenizer
from soma.serve.options import ServeOptions, parse_adapters
from soma.serve.running import running_service
from soma.serve.server import serve

PROMPT = [20, 30, 40, 50]


@pytest.fixture(scope="module")
def folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(base_folder, made / name, LoRAConfig(r=3 + seed), seed)
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def url(base_folder: Path, folders: dict[str, Path]) -> Iterator[str]:
    with running_service(
        base_folder, replicas=2, adapters={"one": str(folders["one"])}, allow_adapter_loading=True
    ) as url:  # fmt: skip
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def text_of(client: openai.OpenAI, model: str) -> str:
    done = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body={
        "ignore_eos": True})  # fmt: skip
    assert done.model == model
    return done.choices[0].text


@pytest.fixture(scope="module")
def texts(base_folder: Path, folders: dict[str, Path]) -> dict[str, str]:
    tokenizer = Tokenizer.load(base_folder)
    return {
        name: tokenizer.decode(greedy_alone(base_folder, folders.get(name), PROMPT, 8)) for name in ("tiny", *folders)
    }


def test_the_model_field_chooses(client: openai.OpenAI, texts: dict[str, str]) -> None:
    assert len(set(texts.values())) == 3
    for name in ("tiny", "one", "tiny"):
        assert text_of(client, name) == texts[name]
    with pytest.raises(openai.NotFoundError) as caught:
        text_of(client, "two")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="embeddings come from `tiny`"):
        client.embeddings.create(model="one", input="hello")


def test_models(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    base, adapter = client.models.list().data
    more: Any = adapter.model_extra
    assert (base.id, adapter.id) == ("tiny", "one")
    assert (more["parent"], more["root"]) == ("tiny", str(folders["one"]))
    assert base.model_extra is not None
    assert base.model_extra["parent"] is None
    assert client.models.retrieve("one") == adapter


def test_clients_load_and_unload(
    url: str, client: openai.OpenAI, folders: dict[str, Path], texts: dict[str, str], tmp_path: Path
) -> None:
    def ask(route: str, **body: Any) -> tuple[int, str]:
        status, _, data = call(url, "POST", f"/v1/{route}_lora_adapter", json.dumps(body), JSON)
        return status, data.decode()

    assert ask("load", lora_name="two", lora_path=str(folders["two"]))[0] == 200
    assert [model.id for model in client.models.list()] == ["tiny", "one", "two"]
    streamed = client.completions.create(
        model="two", prompt=PROMPT, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == texts["two"]
    for body, words in (
        ({"lora_name": "two", "lora_path": str(folders["two"])}, "loaded already"),
        ({"lora_name": "tiny", "lora_path": str(folders["two"])}, "name of the base model"),
        ({"lora_name": "three", "lora_path": str(tmp_path)}, "not an adapter's folder"),
        ({"lora_name": "three"}, "lora_path"),
        ({"lora_name": "three", "lora_path": 3}, "lora_path"),
    ):
        status, said = ask("load", **body)
        assert status == 400
        assert words in said
    assert ask("unload", lora_name="three")[0] == 404
    assert ask("unload", lora_name="two")[0] == 200
    with pytest.raises(openai.NotFoundError):
        text_of(client, "two")
    assert [model.id for model in client.models.list()] == ["tiny", "one"]


def test_off_unless_allowed(base_url: str, folders: dict[str, Path]) -> None:
    for route, body in (("load", {"lora_name": "one", "lora_path": str(folders["one"])}), ("unload", {})):
        status, value = post(base_url, f"/v1/{route}_lora_adapter", body)
        assert (status, value["error"]["code"]) == (403, "adapter_loading_off")


def test_after_a_crash_adapters_are_there_again(url: str, client: openai.OpenAI, texts: dict[str, str]) -> None:
    before: list[psutil.Process] = engines_of(url)
    for engine in before:
        engine.kill()
    assert wait_for(lambda: len(set(engines_of(url)) - set(before)) == 2 and call(url, "GET", "/health")[0] == 200)
    for _ in range(4):
        assert text_of(client, "one") == texts["one"]
    assert metric(url, "vllm:num_requests_running") == 0


def test_what_is_refused_at_the_start(base_folder: Path, folders: dict[str, Path]) -> None:
    assert parse_adapters(["a=b", "c=hf:x/y=z"]) == {"a": "b", "c": "hf:x/y=z"}
    for given, words in ((["a"], "NAME=FOLDER"), (["=b"], "NAME=FOLDER"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(UserError, match=words):
            parse_adapters(given)
    for adapters, words in (({"tiny": str(folders["one"])}, "name of the base"), ({"x": "/nowhere"}, "no such model")):
        with pytest.raises(UserError, match=words):
            serve(base_folder, ServeOptions(port=0, in_process=True, adapters=adapters))
