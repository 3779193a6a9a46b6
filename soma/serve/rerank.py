"""/v1/rerank (Jina's and Cohere's shape) and /v1/score (vLLM's): how near texts are to a query. A cross-encoder, which
reads both texts together, says so itself; of an embedding model it is the cosine of its vectors.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from soma.serve.embeddings import MAX_INPUTS, check_embeds, embed
from soma.serve.errors import ApiError
from soma.serve.pairs import encode_pairs
from soma.serve.tokens import read_as

if TYPE_CHECKING:
    from soma.serve.service import Service


class RerankRequest(BaseModel):
    """Body of POST /v1/rerank."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    model: str
    query: str = Field(min_length=1)
    documents: list[str | dict[str, Any]] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    user: str | None = None  # taken and left alone

    @property
    def texts(self) -> list[str]:
        """The documents' texts. Raises ApiError."""
        return [text_of(each, f"documents.{place}") for place, each in enumerate(self.documents)]


class ScoreRequest(BaseModel):
    """Body of POST /v1/score: one text with each of several, or pairs."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    user: str | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What to compare. Raises ApiError."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if not 0 < len(first) == len(second) <= MAX_INPUTS:
            raise ApiError(400, f"text_1 has {len(first)} texts and text_2 {len(second)}: give one and several, or as "
                           f"many of both, at most {MAX_INPUTS}", "text_2")  # fmt: skip
        checked = [(text_of(one, "text_1"), text_of(two, "text_2")) for one, two in zip(first, second, strict=True)]
        return checked


def text_of(given: str | dict[str, Any], where: str) -> str:
    """A text, or the `text` of an object. Raises ApiError for an empty one."""
    text = given.get("text") if isinstance(given, dict) else given
    if not isinstance(text, str) or not text:
        raise ApiError(400, f"{where}: expected a text that is not empty", where.partition(".")[0])
    return text


async def scores_of(
    service: "Service", request: Request, model: str, pairs: list[tuple[str, str]]
) -> tuple[list[float], int, dict[str, str]]:
    """How near the texts of each pair are; how many tokens were read; headers for the answer. Raises ApiError."""
    embedder = service.embedder
    if embedder is not None and embedder.labels and service.check_model(model) is None:
        if len(embedder.labels) > 1:
            raise ApiError(400, f"`{model}` has {len(embedder.labels)} classes; a model that scores pairs has one",
                           "model", "no_scores")  # fmt: skip
        prompts, firsts = await asyncio.to_thread(encode_pairs, service.tokenizer.inner, pairs, embedder.max_length)
        made, headers = await embed(service, request, model, prompts, firsts)
        return [float(each[0]) for each in made], sum(map(len, prompts)), headers
    check_embeds(service, model)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    prompts = await asyncio.to_thread(lambda: [service.tokenizer.inner.encode(text).ids for text in texts])
    vectors, headers = await embed(service, request, model, prompts)
    of = dict(zip(texts, vectors, strict=True))
    return [float(of[one] @ of[two]) for one, two in pairs], sum(map(len, prompts)), headers


def install(app: FastAPI, service: "Service") -> None:
    """Add the routes."""

    @app.post("/v1/rerank")
    async def rerank(request: Request) -> JSONResponse:
        service.check_open()
        body = await read_as(request, RerankRequest, service.max_body_bytes)
        texts = body.texts
        scores, used, headers = await scores_of(service, request, body.model, [(body.query, text) for text in texts])
        order = sorted(range(len(texts)), key=lambda place: -scores[place])[: body.top_n]
        results: list[dict[str, Any]] = [
            {"index": place, "relevance_score": scores[place],
             **({"document": {"text": texts[place]}} if body.return_documents else {})}
            for place in order
        ]  # fmt: skip
        usage = {"prompt_tokens": used, "total_tokens": used}
        return JSONResponse({"model": service.model_name, "results": results, "usage": usage}, headers=headers)

    @app.post("/v1/score")
    async def score(request: Request) -> JSONResponse:
        service.check_open()
        body = await read_as(request, ScoreRequest, service.max_body_bytes)
        scores, used, headers = await scores_of(service, request, body.model, body.pairs)
        data = [{"index": number, "object": "score", "score": score} for number, score in enumerate(scores)]
        usage = {"prompt_tokens": used, "total_tokens": used}
        whole = {"object": "list", "data": data, "model": service.model_name, "usage": usage}
        return JSONResponse(whole, headers=headers)
