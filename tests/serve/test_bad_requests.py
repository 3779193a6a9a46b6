"""What the service refuses, in OpenAI's shape and with the field's name, before the engine sees it."""

import json
from typing import Any

import pytest
from http_tools import call, metric, post

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}

BAD_TEXT: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -3}, "top_k"),
    ({"min_p": 7}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"seed": "x"}, "seed"),
    ({"seed": 1 << 70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"stop_token_ids": [4000]}, "stop_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [[1, 4000]]}, "bad_words"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"suffix": "x"}, "suffix"),
    ({"colour": "blue"}, "colour"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [100000]}, "prompt"),
    ({"prompt": [5] * 4096}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"model": 3}, "model"),
    ({"priority": "high"}, "priority"),
    ({"priority": 101}, "priority"),
    ({"priority": 1.5}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": "5"}, "timeout"),
    ({"user": 7}, "user"),
    ({"user": "u" * 513}, "user"),
]
BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "hi " * 5000}]}, "prompt"),
]  # fmt: skip


def refused(url: str, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
    """The error object of a request that must be refused."""
    got, value = post(url, path, body, **headers)
    assert got == status, value
    assert set(value) == {"error"}
    error = value["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize(("change", "param"), BAD_TEXT, ids=lambda value: str(value)[:40])
def test_completions(service_url: str, change: dict[str, Any], param: str | None) -> None:
    assert refused(service_url, "/v1/completions", {**TEXT, **change})["param"] == param


@pytest.mark.parametrize(("change", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
def test_chat(service_url: str, change: dict[str, Any], param: str | None) -> None:
    assert refused(service_url, "/v1/chat/completions", {**CHAT, **change})["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "nonsense", "[]", '"text"', "null", "\xff\xfe", '{"a": 1,}', "[" * 100_000,
        json.dumps(TEXT)[:-1] + ', "temperature": NaN}', json.dumps(TEXT)[:-1] + ', "temperature": Infinity}',
        json.dumps(TEXT)[:-1] + ', "temperature": 1e999}', json.dumps({**TEXT, "prompt": "\ud800"}),
        json.dumps({**TEXT, "model": "\udfff"}),
    ],
    ids=lambda body: body[:30],
)  # fmt: skip
def test_bodies_that_are_no_request(service_url: str, body: str) -> None:
    refused(service_url, "/v1/completions", body.encode("latin-1"))


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_content_types(service_url: str, kind: str) -> None:
    status, _, data = call(service_url, "POST", "/v1/completions", json.dumps(TEXT), {"Content-Type": kind})
    assert status == 400
    assert json.loads(data)["error"]["code"] == "unsupported_content_type"


def test_content_type_with_charset_is_fine(service_url: str) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert call(service_url, "POST", "/v1/completions", json.dumps(TEXT), headers)[0] == 200


def test_missing_fields(service_url: str) -> None:
    for path, body, param in (
        ("/v1/completions", {"prompt": "x"}, "model"),
        ("/v1/completions", {"model": "tiny"}, "prompt"),
        ("/v1/chat/completions", {"model": "tiny"}, "messages"),
    ):
        assert refused(service_url, path, body)["param"] == param


def test_unknown_model(service_url: str) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        error = refused(service_url, path, {**body, "model": "other"}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_too_large_bodies(service_url: str) -> None:
    """Known to be too large by its length, or found to be so while it is read."""
    body = json.dumps({**TEXT, "prompt": "x" * (5 << 20)})
    assert refused(service_url, "/v1/completions", body, 413)["code"] == "body_too_large"
    chunked = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    parts = (f"{len(part):x}\r\n{part}\r\n" for part in ["x" * 500_000] * 10)
    status, _, data = call(service_url, "POST", "/v1/completions", "".join(parts) + "0\r\n\r\n", chunked)
    assert status == 413, data


def test_routes_that_are_not_there(service_url: str) -> None:
    for method, path, status in (
        ("GET", "/v3", 404), ("GET", "/redoc", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405),
    ):  # fmt: skip
        got, _, data = call(service_url, method, path)
        assert got == status
        assert json.loads(data)["error"]["message"]


def test_no_refused_request_reached_the_engine(service_url: str) -> None:
    before = metric(service_url, "vllm:prompt_tokens_total")
    for change, _ in BAD_TEXT:
        post(service_url, "/v1/completions", {**TEXT, **change})
    assert metric(service_url, "vllm:prompt_tokens_total") == before
    assert post(service_url, "/v1/completions", TEXT)[0] == 200
    assert metric(service_url, "vllm:prompt_tokens_total") > before
