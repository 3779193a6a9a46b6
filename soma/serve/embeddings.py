"""/v1/embeddings, in OpenAI's shape."""

import asyncio
import base64
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from soma.serve.calls import Usage, called
from soma.serve.errors import ApiError
from soma.serve.tokens import read_as

if TYPE_CHECKING:
    from soma.serve.service import Service

MAX_INPUTS = 2048  # OpenAI's


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None  # taken and left alone

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """One entry per vector, whatever form it came in. Raises ApiError."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise ApiError(400, "input is an empty list", "input")
        given = [self.input] if isinstance(self.input[0], int) else self.input
        if len(given) > MAX_INPUTS:
            raise ApiError(400, f"input has {len(given)} entries, at most {MAX_INPUTS} are possible", "input")
        return given


def encode(service: "Service", body: EmbeddingRequest) -> list[list[int]]:
    """Ids of every input; a text gets the special tokens that the tokenizer's own settings put around it."""
    made = []
    for given in body.inputs:
        if given == "":
            raise ApiError(400, "input has an empty text", "input")
        made.append(service.tokenizer.inner.encode(given).ids if isinstance(given, str) else given)
    return made


def vector(values: np.ndarray, form: str | None) -> list[float] | str:
    """A vector as JSON numbers, or as base64 of little-endian float32 (what the openai client asks for)."""
    if form == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return [float(value) for value in values]


def check_embeds(service: "Service", name: str) -> None:
    """Raises ApiError where the model of that name makes no embeddings."""
    if service.check_model(name) is not None:
        raise ApiError(400, f"`{name}` is an adapter; embeddings come from `{service.model_name}`", "model",
                       "no_embeddings")  # fmt: skip
    if service.embedder is None:
        raise ApiError(400, "this server makes no embeddings", "model", "no_embeddings")
    if service.embedder.labels:
        raise ApiError(400, f"`{service.model_name}` is a classifier: it makes no embeddings; use /v1/rerank, "
                       "/v1/score or the Open Inference Protocol", "model", "no_embeddings")  # fmt: skip


async def embed(
    service: "Service", request: Request, model: str, prompts: list[list[int]], firsts: list[int] | None = None
) -> tuple[list[np.ndarray], dict[str, str]]:
    """The vectors of prompts, or a classifier's scores, for a request that passes the gates with them, and the headers
    of its answer. firsts: how many tokens of each prompt are its first text; None: all."""
    assert service.embedder is not None
    used = sum(map(len, prompts))
    call = called(request, model, used)
    passage = await service.gates.enter(call)
    spent = Usage(outcome="error")
    if call.meter is not None:
        call.meter.sent()
    try:
        vectors = await asyncio.wrap_future(service.embedder.submit(prompts, firsts))
        spent = Usage(used)
    finally:
        await passage.leave(spent)
    return list(vectors), passage.headers


def install(app: FastAPI, service: "Service") -> None:
    """Add the route."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> JSONResponse:
        service.check_open()
        body = await read_as(request, EmbeddingRequest, service.max_body_bytes)
        check_embeds(service, body.model)
        assert service.embedder is not None
        size = service.embedder.dimensions
        if body.dimensions not in (None, size):
            raise ApiError(400, f"dimensions is {body.dimensions}; this model's vectors have {size} and cannot be cut",
                           "dimensions")  # fmt: skip
        prompts = await asyncio.to_thread(encode, service, body)
        vectors, headers = await embed(service, request, body.model, prompts)
        used = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": index, "embedding": vector(values, body.encoding_format)}
            for index, values in enumerate(vectors)
        ]
        usage: dict[str, Any] = {"prompt_tokens": used, "total_tokens": used}
        whole = {"object": "list", "data": data, "model": service.model_name, "usage": usage}
        return JSONResponse(whole, headers=headers)
