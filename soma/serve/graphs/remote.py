"""Models that run elsewhere: behind another Open Inference Protocol server, or an OpenAI-like endpoint."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from soma.base.errors import UserError
from soma.serve.calls import Usage
from soma.serve.errors import ApiError
from soma.serve.graphs.trace import propagated
from soma.serve.v2 import datatypes
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import Job, Options, TensorSpec, V2Model

CONNECT = 5.0  # seconds to reach an endpoint
PASSED_ON = (400, 404, 413, 429, 503, 504)  # statuses that mean the same for our client; others are 502


class Endpoint:
    """An HTTP address with its key, and a session for as long as an event loop runs."""

    def __init__(self, url: str, key_env: str | None) -> None:
        """Raises UserError: no URL, no such variable."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is no http:// or https:// URL")
        if key_env is not None and key_env not in os.environ:
            raise UserError(f"the environment variable {key_env} with the key of {url} is not set")
        self.url, self.key = url.rstrip("/"), os.environ[key_env] if key_env else None
        self.session: aiohttp.ClientSession | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # that the session belongs to

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], timeout: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        """The answer to a request. Raises ApiError: 502 or 503 the endpoint is away, or what it says."""
        if self.session is None or self.loop is not asyncio.get_running_loop():
            self.loop = asyncio.get_running_loop()
            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
            self.session = aiohttp.ClientSession(timeout=limits, auto_decompress=True)
        more = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT)
        try:
            async with self.session.request(
                method, self.url + path, data=body, headers={**propagated(), **headers, **more}, timeout=limit,
                allow_redirects=False,
            ) as answer:  # fmt: skip
                if answer.status != 200:
                    raise await self.failed(answer)
                yield answer
        except TimeoutError:
            raise ApiError(504, "a node of the graph did not answer in time", code="deadline_exceeded") from None
        except aiohttp.ClientError as error:
            raise ApiError(503, f"a node of the graph is away ({type(error).__name__})", code="upstream_away",
                           retry_after=5) from error  # fmt: skip

    def close(self) -> None:
        """End the connections; inside the event loop."""
        if self.session is not None:
            self.closing = asyncio.ensure_future(self.session.close())

    async def failed(self, answer: aiohttp.ClientResponse) -> ApiError:
        """What an endpoint's error is for our client."""
        try:
            said = json.loads(await answer.content.read(65_536))["error"]
            words = said["message"] if isinstance(said, dict) else str(said)
        except (ValueError, KeyError, TypeError):
            words = f"status {answer.status}"
        after = answer.headers.get("Retry-After", "")
        status = answer.status if answer.status in PASSED_ON else 502
        return ApiError(status, f"a node of the graph: {words}", retry_after=int(after) if after.isdigit() else None)


class RemoteV2(V2Model):
    """A model of another server, asked over binary REST. Its tensors are what the other server says, asked for when
    they are first needed."""

    platform = "soma_remote_v2"

    def __init__(self, url: str, model: str, version: str = "", key_env: str | None = None) -> None:
        self.endpoint = Endpoint(url, key_env)
        self.path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()

    async def prepare(self) -> None:
        if self.inputs:
            return
        async with self.endpoint.ask("GET", self.path, b"", {}, CONNECT) as answer:
            try:
                described = await answer.json()
                self.inputs, self.outputs = (
                    tuple(TensorSpec(each["name"], each["datatype"], tuple(int(size) for size in each["shape"]), True)
                          for each in described[side]) for side in ("inputs", "outputs")
                )  # fmt: skip
            except (ValueError, KeyError, TypeError) as error:
                raise unreadable() from error

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The outputs."""
        return await self.ask(tensors, parameters, None)

    async def job(self, tensors: Tensors, options: Options) -> Job:
        return RemoteJob(self, tensors, options)

    async def ask(self, tensors: Tensors, parameters: Mapping[str, Any], timeout: float | None) -> Tensors:
        """One request."""
        kinds = {spec.name: spec.datatype for spec in self.inputs}
        described: list[dict[str, Any]] = []
        tail: list[bytes] = []
        for name, array in tensors.items():
            datatype = kinds[name]
            tail.append(datatypes.to_raw(array, datatype))
            described.append({
                "name": name, "datatype": datatype, "shape": list(array.shape),
                "parameters": {"binary_data_size": len(tail[-1])},
            })  # fmt: skip
        head = orjson.dumps({"inputs": described, "parameters": {**parameters, "binary_data_output": True}})
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        async with self.endpoint.ask("POST", f"{self.path}/infer", b"".join([head, *tail]), headers, timeout) as answer:
            return read_answer(await answer.read(), answer.headers.get("Inference-Header-Content-Length"))

    def close(self) -> None:
        self.endpoint.close()


def unreadable() -> ApiError:
    return ApiError(502, "a node of the graph gave an answer that cannot be read")


def read_answer(data: bytes, header: str | None) -> Tensors:
    """The outputs of an infer response. Raises ApiError 502 for one that is none."""
    try:
        length = len(data) if header is None else int(header)
        place, made = length, {}
        for output in orjson.loads(data[:length])["outputs"]:
            name, datatype, shape = output["name"], output["datatype"], tuple(output["shape"])
            size = (output.get("parameters") or {}).get("binary_data_size")
            if size is None:
                made[name] = datatypes.from_json(output["data"], datatype, shape, name)
            else:
                made[name] = datatypes.from_raw(data[place : place + size], datatype, shape, name)
                place += size
        return made
    except (ValueError, KeyError, TypeError, ApiError) as error:
        raise unreadable() from error


class RemoteJob(Job):
    """A request to a RemoteV2."""

    def __init__(self, model: RemoteV2, tensors: Tensors, options: Options) -> None:
        self.model, self.tensors, self.options = model, tensors, options

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        yield await self.model.ask(self.tensors, self.options.parameters, self.options.timeout)


class OpenAI(V2Model):
    """Text completions of an OpenAI-like endpoint: `text_input` (BYTES, [1]) to `text_output`, streamed where that is
    asked for. Parameters are the body's fields: max_tokens, temperature, …"""

    platform = "soma_remote_openai"
    decoupled = True
    inputs = (TensorSpec("text_input", "BYTES", (-1,)),)
    outputs = (TensorSpec("text_output", "BYTES", (-1,)),)

    def __init__(self, url: str, model: str, key_env: str | None = None) -> None:
        self.endpoint, self.model = Endpoint(url, key_env), model

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The whole text."""
        job = await self.job(tensors, Options(parameters))
        return await anext(job.answers())

    def close(self) -> None:
        self.endpoint.close()

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """Raises ApiError for what is not one text."""
        if tensors["text_input"].size != 1:
            raise ApiError(400, f"text_input has {tensors['text_input'].size} texts; this node takes one")
        try:
            prompt = tensors["text_input"].ravel()[0].decode()
        except UnicodeDecodeError:
            raise ApiError(400, "text_input is no UTF-8") from None
        return Completion(self, prompt, options)


class Completion(Job):
    """A request to an OpenAI-like endpoint. What it used is what the endpoint says."""

    def __init__(self, remote: OpenAI, prompt: str, options: Options) -> None:
        self.remote, self.prompt, self.options = remote, prompt, options
        given = options.parameters.get("max_tokens")
        self.max_tokens = given if isinstance(given, int) else 16  # OpenAI's default
        self.used: dict[str, int] | None = None
        self.pieces = 0

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        stream = self.options.stream
        body = {**self.options.parameters, "model": self.remote.model, "prompt": self.prompt}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"}
        asked = self.remote.endpoint.ask("POST", "/completions", orjson.dumps(body), headers, self.options.timeout)
        try:
            async with asked as answer:
                if stream:
                    async for piece in self.pieces_of(answer):
                        yield texts(piece)
                    return
                whole = await answer.json()
                self.used = whole.get("usage")
                yield texts(whole["choices"][0]["text"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise unreadable() from error

    async def pieces_of(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[str, None]:
        """The texts of a stream of server-sent events. Raises ApiError for one that fails or does not end."""
        async for line in answer.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = orjson.loads(data)
            if "error" in event:
                raise ApiError(502, f"a node of the graph: {event['error']['message']}")
            self.used = event.get("usage") or self.used
            for choice in event["choices"]:
                self.pieces += 1
                if choice.get("text"):
                    yield choice["text"]
        raise ApiError(502, "a node of the graph broke off its stream")

    def end(self, outcome: str) -> Usage:
        if self.used is None:  # it broke off: so many pieces came
            return Usage(0, self.pieces, outcome=outcome, estimated=True)
        return Usage(self.used["prompt_tokens"], self.used.get("completion_tokens", 0), outcome=outcome)


def texts(*values: str) -> Tensors:
    return {"text_output": datatypes.as_objects([value.encode() for value in values], (len(values),))}
