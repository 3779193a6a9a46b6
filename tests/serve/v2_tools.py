"""A server of the Open Inference Protocol in a thread, over REST and gRPC, with models that the tests know well."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from http_tools import wait_for

from soma.serve import errors
from soma.serve.calls import Call, Gates, Usage
from soma.serve.errors import ApiError
from soma.serve.v2 import rest
from soma.serve.v2.callables import PythonModel
from soma.serve.v2.datatypes import DTYPES, Tensors
from soma.serve.v2.front import Alone, Front
from soma.serve.v2.grpc_server import GrpcServer
from soma.serve.v2.model import Job, Options, TensorSpec, V2Model
from soma.serve.v2.repository import Repository


class Record:
    """A gate that notes what passes, and refuses when told to."""

    def __init__(self) -> None:
        self.entered: list[Call] = []
        self.left: list[Usage] = []
        self.headers = {"x-ratelimit-remaining-requests": "7"}
        self.refuses = False

    async def enter(self, call: Call) -> "Record":
        if self.refuses:
            raise ApiError(429, "enough", code="rate_limited", retry_after=3)
        self.entered.append(call)
        return self

    async def leave(self, usage: Usage) -> None:
        self.left.append(usage)


class Counting(Job):
    """Counts up to a number, one answer each, slowly from 1000 upwards. `ended`: outcomes of all of them."""

    def __init__(self, until: int, ended: list[str]) -> None:
        self.until, self.ended, self.max_tokens = until, ended, until

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        for number in range(self.until):
            await asyncio.sleep(0.01 if self.until >= 1000 else 0)
            yield {"number": np.array([number], np.int32)}

    def end(self, outcome: str) -> Usage:
        self.ended.append(outcome)
        return Usage(0, 1, outcome=outcome)


class Counter(V2Model):
    """A decoupled model."""

    decoupled = True
    inputs = (TensorSpec("until", "INT32", (1,)),)
    outputs = (TensorSpec("number", "INT32", (1,)),)

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        return {"number": tensors["until"]}

    async def job(self, tensors: Tensors, options: Options) -> Job:
        return Counting(int(tensors["until"][0]), self.ended)


def echo(datatype: str) -> PythonModel:
    specs = [TensorSpec("x", datatype, (-1, -1))], [TensorSpec("y", datatype, (-1, -1))]
    return PythonModel(lambda x: x, *specs)


def add_sub() -> PythonModel:
    """Triton's `simple` example."""
    inputs = [TensorSpec(name, "INT32", (-1, 16)) for name in ("INPUT0", "INPUT1")]
    outputs = [TensorSpec(name, "INT32", (-1, 16)) for name in ("OUTPUT0", "OUTPUT1")]

    def function(INPUT0: np.ndarray, INPUT1: np.ndarray) -> dict[str, np.ndarray]:
        return {"OUTPUT0": INPUT0 + INPUT1, "OUTPUT1": INPUT0 - INPUT1}

    return PythonModel(function, inputs, outputs)


def scores() -> PythonModel:
    return PythonModel(
        lambda x: x, [TensorSpec("x", "FP32", (-1, 3))], [TensorSpec("y", "FP32", (-1, 3))], ("cat", "dog", "eel")
    )


def break_on_negative(x: np.ndarray) -> np.ndarray:
    if (x < 0).any():
        raise RuntimeError("secret text of a request")
    return x


async def sleep(seconds: np.ndarray) -> np.ndarray:
    await asyncio.sleep(float(seconds[0]))
    return seconds


@dataclass
class Served:
    """A server that runs, and what it is made of."""

    http: str  # host:port
    grpc: str
    front: Front
    record: Record
    counter: Counter
    grpc_server: GrpcServer
    loop: asyncio.AbstractEventLoop


def make_repository(counter: Counter) -> Repository:
    repository = Repository()
    for datatype in DTYPES:
        repository.add(f"echo_{datatype}", echo(datatype))
    repository.add("simple", add_sub())
    repository.add("simple", add_sub(), "3")
    repository.add("scores", scores())
    repository.add("counter", counter)
    specs = [TensorSpec("x", "FP32", (-1,))], [TensorSpec("y", "FP32", (-1,))]
    repository.add("breaks", PythonModel(break_on_negative, *specs))
    repository.add("liar", PythonModel(lambda x: {"z": x}, *specs))
    repository.add("loadable", lambda: PythonModel(lambda x: x, *specs))
    seconds = [TensorSpec("seconds", "FP32", (1,))], [TensorSpec("slept", "FP32", (1,))]
    repository.add("sleep", PythonModel(sleep, *seconds))
    return repository


@contextmanager
def v2_server(front: Front | None = None, counter: Counter | None = None, **grpc_options: Any) -> Iterator[Served]:
    """A server in a thread, until the end of the `with`."""
    record, counter = Record(), counter or Counter()
    front = front or Front(make_repository(counter), Alone(Gates([record])), allow_control=True)
    app = FastAPI()
    errors.install(app)
    rest.install(app, front)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        found["grpc"] = grpc_server = GrpcServer(front, "127.0.0.1", 0, **grpc_options)
        found["loop"] = asyncio.get_running_loop()
        await grpc_server.start()
        ready.set()
        try:
            await server.serve([listener])
        finally:
            await grpc_server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(120)
        port = listener.getsockname()[1]
        yield Served(
            f"127.0.0.1:{port}", f"127.0.0.1:{found['grpc'].port}", front, record, counter, found["grpc"], found["loop"]
        )
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a port of its own, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
