"""POST /v1/search, and chats that are answered from an index (`soma serve MODEL --index PATH`).

With an index, the last user message of a chat is asked with the passages that it finds, and what the answer cites is
read (`passages.Citations`). `"retrieval": false` in the request leaves the chat alone; an object says how to search.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import Counter

from soma.engine.request import Request as EngineRequest
from soma.engine.request import TokenEvent
from soma.serve.calls import Usage, called
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat
from soma.serve.prompts import TokenNames
from soma.serve.retrieval.form import MAX_QUESTION, Search, SearchRequest
from soma.serve.retrieval.passages import Citations, prompt
from soma.serve.retrieval.search import Retriever, open_retriever
from soma.serve.retrieval.serving import search
from soma.serve.tokens import read_as

if TYPE_CHECKING:
    from soma.serve.service import Service


class Knowledge:
    """The index that a service answers from, and what came of its citations."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self.cited = Counter(
            "soma_citations", "Citations in answers: of passages that were given, and of none, which are dropped",
            ["kind"], registry=None,
        )  # fmt: skip

    def count(self, citations: Citations) -> None:
        self.cited.labels("given").inc(len(citations.mentions))
        self.cited.labels("dropped").inc(citations.dropped)

    async def passages(self, question: str, how: Search) -> list[dict[str, Any]]:
        """Hits as JSON. Raises ApiError."""
        hits = await search(self.retriever, question, how.limit, how.mode, how.where)
        return [hit.as_json() for hit in hits]

    def close(self) -> None:
        self.retriever.close()


def install(app: FastAPI, service: "Service", knowledge: Knowledge | None) -> None:
    """Add the route."""
    if knowledge is not None:
        service.metrics.registry.register(knowledge.cited)

    @app.post("/v1/search")
    async def find(request: Request) -> JSONResponse:
        service.check_open()
        body = await read_as(request, SearchRequest, service.max_body_bytes)
        if knowledge is None:
            raise no_index()
        used = knowledge.retriever.encoder.count([body.query])[0]
        passage = await service.gates.enter(called(request, service.model_name, used))
        spent = Usage(outcome="error")
        try:
            data = await knowledge.passages(body.query, body)
            spent = Usage(used)
        finally:
            await passage.leave(spent)
        usage = {"prompt_tokens": used, "total_tokens": used}
        return JSONResponse({"object": "list", "data": data, "usage": usage}, headers=passage.headers)


def no_index() -> ApiError:
    return ApiError(400, "this service has no index; it was started without --index", "retrieval", "no_index")


async def with_passages(
    knowledge: Knowledge | None, how: Search | bool | None, messages: list[dict[str, Any]], *, tools: bool
) -> list[dict[str, Any]] | None:  # fmt: skip
    """The passages for a chat, whose last user message is put behind them; None: the chat goes as it is. Raises
    ApiError: no index, tools as well, no user message."""
    if how is False or (knowledge is None and not how):
        return None
    if knowledge is None:
        raise no_index()
    if tools:
        if how is None:
            return None
        raise ApiError(400, "a request has either tools or retrieval", "retrieval")
    asked = [message for message in messages if message["role"] == "user"]
    if not asked or not asked[-1]["content"].strip():
        if how is None:
            return None
        raise ApiError(400, "retrieval needs a user message to search for", "messages")
    question = asked[-1]["content"]
    found = await knowledge.passages(question[-MAX_QUESTION:], how if isinstance(how, Search) else Search())
    asked[-1]["content"] = prompt(question, found)
    return found


class CitedFormat(ChatFormat):
    """chat.completion and its chunks with `citations` and `citations_dropped`: in the message, streamed in the last
    delta of a choice."""

    def __init__(
        self, names: TokenNames, model: str, knowledge: Knowledge, passages: list[dict[str, Any]], *, logprobs: bool
    ) -> None:  # fmt: skip
        super().__init__(names, model, logprobs=logprobs)
        self.knowledge, self.passages = knowledge, passages
        self.read: dict[int, Citations] = {}  # of the choices that are streamed

    def chunk(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        logprobs = self.logprobs([event])
        text = self.read.setdefault(index, Citations(self.passages)).push(event.text)
        if not text and not (logprobs and logprobs["content"]):
            return None
        return self._chunk(index, {"content": text}, logprobs, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        citations = self.read.setdefault(index, Citations(self.passages))
        rest = citations.flush()
        return self._chunk(index, ({"content": rest} if rest else {}) | self.told(citations), None, reason)

    def choice(self, index: int, events: Sequence[TokenEvent], request: EngineRequest) -> dict[str, Any]:
        whole = super().choice(index, events, request)
        citations = Citations(self.passages)
        text = citations.push(whole["message"]["content"]) + citations.flush()
        whole["message"] |= {"content": text, **self.told(citations)}
        return whole

    def told(self, citations: Citations) -> dict[str, Any]:
        """The fields of a finished answer; it is counted."""
        self.knowledge.count(citations)
        return {"citations": citations.as_json(), "citations_dropped": citations.dropped}


def open_knowledge(index: str, rerank: str | None = None) -> Knowledge:
    """An index for a service, with the encoder that it was made with. Keys come from the environment (QDRANT_API_KEY,
    SOMA_ENCODER_KEY, SOMA_RERANK_KEY). Raises UserError."""
    return Knowledge(open_retriever(
        index, api_key=os.environ.get("QDRANT_API_KEY"), encoder_key=os.environ.get("SOMA_ENCODER_KEY"),
        rerank=rerank, rerank_key=os.environ.get("SOMA_RERANK_KEY"),
    ))  # fmt: skip
