"""One generation's way from a checked request to its answer, whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from soma.engine.params import SamplingParams
from soma.engine.request import TokenEvent
from soma.model.tokenizer import Tokenizer
from soma.serve import errors, responses
from soma.serve.calls import Passage, Usage, called
from soma.serve.disconnect import CLIENT_CLOSED_REQUEST, unless_disconnected
from soma.serve.formats import ChatFormat
from soma.serve.generation import Generation, check
from soma.serve.protocol import ChatRequest, CompletionRequest, Sampling
from soma.serve.response_request import ResponsesRequest
from soma.serve.service import Service


def asked(tokenizer: Tokenizer, body: Sampling) -> dict[str, Any]:
    """What a body asks, for the request log."""
    found: dict[str, Any] = {"n": body.n or 1, "stream": bool(body.stream)}
    if isinstance(body, CompletionRequest):
        texts = [each if isinstance(each, str) else tokenizer.decode(each) for each in body.prompts]
        return {**found, "prompts": texts}
    if isinstance(body, ChatRequest):
        return {**found, "messages": [message.for_template(place) for place, message in enumerate(body.messages)]}
    assert isinstance(body, ResponsesRequest)
    return {**found, "messages": body.messages}


async def answer(
    service: Service, request: Request, body: Sampling, prompts: list[list[int]], params: SamplingParams,
    shape: ChatFormat, adapter: str | None,
) -> Response:  # fmt: skip
    """Run the generation and answer it whole or as a stream; a client that leaves stops it."""
    service.check_open()
    engine: Any = service.engine  # either kind: both are asked in the same way
    if params.guided is not None:  # not on the event loop: a large grammar takes a while to compile
        await asyncio.to_thread(engine.guides.check, params.guided)
    n = body.n or 1
    most = n * sum(engine.check(prompt, params) for prompt in prompts)
    call = called(request, body.model, sum(map(len, prompts)), most)
    passage = await service.gates.enter(call)
    try:
        options = {**body.scheduling, "adapter": adapter}
        if call.record is not None:
            call.record.asked(**asked(service.tokenizer, body))
        generation = Generation(engine, service.metrics, prompts, params, n, call.meter, call.record, **options)
    except BaseException:
        await passage.leave(Usage(outcome="refused"))
        raise
    if body.stream:
        if isinstance(shape, responses.ResponsesFormat):
            chunks = responses.stream(service, generation, shape)
        else:
            chunks = stream(service, generation, shape, include_usage=body.include_usage)
        return EventStream(service, generation, chunks, passage)
    service.open += 1
    outcome = "error"
    try:
        whole = await unless_disconnected(request, collect(service, generation, shape))
        outcome = "abort" if whole is None else "ok"
    finally:
        service.open -= 1
        generation.cancel()
        service.metrics.observe_times(generation.requests)
        await passage.leave(generation.used(outcome))
    if whole is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(whole, headers=passage.headers)


async def collect(service: Service, generation: Generation, shape: ChatFormat) -> dict[str, Any]:
    """All choices in one answer."""
    events: dict[int, list[TokenEvent]] = {index: [] for index in range(len(generation.requests))}
    async for index, event in generation:
        check(service.engine, event)
        events[index].append(event)
    choices = [shape.choice(index, events[index], generation.requests[index]) for index in events]
    return shape.envelope(shape.whole_object, choices, usage=generation.usage)


async def stream(
    service: Service, generation: Generation, shape: ChatFormat, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: chunks, the usage if asked for, [DONE]; an error ends the stream with an error event."""
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    started: set[int] = set()
    try:
        async for index, event in generation:
            check(service.engine, event)
            chunks = [] if index in started else [shape.start(index, generation.requests[index])]
            started.add(index)
            chunks.append(shape.chunk(index, event))
            if event.finish_reason is not None:
                chunks.append(shape.end(index, event.finish_reason))
            if said := b"".join(sse({**chunk, **more}) for chunk in chunks if chunk is not None):
                yield said
        if include_usage:
            yield sse(shape.envelope(shape.chunk_object, [], usage=generation.usage))
    except Exception as error:  # noqa: BLE001  (the status line is gone: an event is all that can still be said)
        errors.log_unknown(error)
        yield errors.sse_error(error)
    yield b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream that cancels its generation however it ends: read whole, broken off, or failed."""

    def __init__(
        self, service: Service, generation: Generation, chunks: AsyncIterator[bytes], passage: Passage
    ) -> None:
        headers = {"Cache-Control": "no-cache", **passage.headers}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self.service, self.generation, self.passage = service, generation, passage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.open -= 1
            outcome = "error" if self.generation.failed else "abort" if self.generation.open else "ok"
            self.generation.cancel()
            self.service.metrics.observe_times(self.generation.requests)
            await self.passage.leave(self.generation.used(outcome))
