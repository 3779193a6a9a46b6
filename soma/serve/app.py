"""The HTTP application: OpenAI's routes over one engine, health, metrics, and the page."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from soma.engine.params import SamplingParams
from soma.engine.process import EngineProcess
from soma.engine.prompts import encode_prompt
from soma.engine.replicas import Replicas
from soma.engine.request import TokenEvent
from soma.model.tokenizer import Tokenizer
from soma.serve import adapters, embeddings, errors, health, openapi, rerank, responses, tokens
from soma.serve.calls import Gates, Passage, Usage, called, check_allowed, may_use
from soma.serve.disconnect import CLIENT_CLOSED_REQUEST, unless_disconnected
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat, CompletionFormat
from soma.serve.generation import Generation, check
from soma.serve.graphs.trace import Continued
from soma.serve.keys.routes import PUBLIC
from soma.serve.metrics import Metrics
from soma.serve.prompts import TokenNames
from soma.serve.protocol import ChatRequest, CompletionRequest, Sampling, read_body
from soma.serve.requestlog import feedback
from soma.serve.response_request import ResponsesRequest
from soma.serve.retrieval import routes as retrieval
from soma.serve.templates.library import Library
from soma.serve.tool_calls import ToolChatFormat, with_calls
from soma.serve.tools import read_tools
from soma.serve.v2 import rest
from soma.serve.v2.classifier import Classifier
from soma.serve.v2.encoder import Encoder
from soma.serve.v2.front import Front
from soma.serve.v2.llm import LanguageModel
from soma.serve.v2.repository import Repository

if TYPE_CHECKING:
    from soma.engine.embed import Embedder
    from soma.engine.engine import Engine
    from soma.serve.keys.door import Guard
    from soma.serve.requestlog.gate import RequestLog

    AnyEngine = Engine | EngineProcess | Replicas

MAX_BODY_BYTES = 4 << 20
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """What the routes share: the engine, the model's name, and whether new requests are taken."""

    def __init__(
        self, engine: "AnyEngine", tokenizer: Tokenizer, model_name: str, max_body_bytes: int,
        embedder: "Embedder | None", gates: Gates | None = None,
    ) -> None:  # fmt: skip
        self.gates = gates or Gates()
        self.engine, self.tokenizer, self.model_name, self.max_body_bytes = (
            engine, tokenizer, model_name, max_body_bytes,
        )  # fmt: skip
        if isinstance(engine, EngineProcess | Replicas):
            embedder = engine.embedder if engine.embeds else None  # type: ignore[assignment]
        self.embedder = embedder
        self.makes_text = not isinstance(engine, EngineProcess | Replicas) or engine.makes_text
        if self.makes_text:
            engine.guides.prepare()
        self.metrics = Metrics(engine, model_name)
        self.names = TokenNames(tokenizer)
        self.prompts: Library | None = None  # that requests may name
        self.created = int(time.time())
        self.draining = False
        self.open = 0  # requests being answered

    def check_open(self) -> None:
        """Raises ApiError 503 while the service shuts down or its engine is not there."""
        if self.draining:
            raise ApiError(503, "the service is shutting down; try again soon", code="shutting_down", retry_after=5)
        if self.engine.alive:
            return
        if isinstance(self.engine, EngineProcess | Replicas):
            raise ApiError(503, "the engine is being restarted; try again soon", code="engine_restarting",
                           retry_after=self.engine.retry_after)  # fmt: skip
        raise ApiError(503, "the engine has stopped; the service must be restarted", code="engine_stopped",
                       retry_after=30)  # fmt: skip

    def check_model(self, name: str) -> str | None:
        """The adapter of that name, None for the base model. Raises ApiError 404 for what is not served here."""
        if name == self.model_name:
            return None
        adapters = self.engine.adapter_folders
        if name in adapters:
            return name
        have = ", ".join(f"`{each}`" for each in (self.model_name, *adapters))
        raise ApiError(404, f"The model `{name}` does not exist; this server has {have}", "model", "model_not_found")

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists: the base model and its adapters."""
        adapters = self.engine.adapter_folders
        return [self.model(self.model_name), *(self.model(name, adapters[name]) for name in adapters)]

    def model(self, name: str, folder: str | None = None) -> dict[str, Any]:
        """An entry in /v1/models, of an adapter if it has a folder. root and parent as vLLM's; the last three fields
        are ours."""
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "soma",
            "root": folder or self.model_name, "parent": None if folder is None else self.model_name,
            "max_model_len": self.engine.max_length, "chat_template": self.tokenizer.has_chat_template,
            "makes_text": self.makes_text,
        }  # fmt: skip


def create_app(
    engine: "AnyEngine", tokenizer: Tokenizer, model_name: str, *, max_body_bytes: int = MAX_BODY_BYTES,
    embedder: "Embedder | None" = None, allow_adapter_loading: bool = False, gates: Gates | None = None,
    guard: "Guard | None" = None, repository: Repository | None = None, allow_model_control: bool = False,
    prompts: Library | None = None, request_log: "RequestLog | None" = None,
    knowledge: retrieval.Knowledge | None = None,
) -> FastAPI:  # fmt: skip
    """The application. `app.state.service` is its `Service`; who runs it closes the engine afterwards.

    `embedder` makes the embeddings beside an engine in this process; an engine process has its own.
    `allow_adapter_loading`: clients may load adapters from folders of this machine, and unload them. `gates`: what
    every request that uses the model passes. `guard`: who asks for keys at the door of every route.
    `repository`: further models for the Open Inference Protocol; `allow_model_control`: clients may load and unload
    those. `app.state.v2` is that protocol's front. `prompts`: what requests may name. `request_log`: one of the gates,
    which takes feedback too. `knowledge`: the index that chats are answered from.
    """
    app = FastAPI(title="Soma", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service = Service(engine, tokenizer, model_name, max_body_bytes, embedder, gates)
    service.prompts = prompts
    if guard is not None:
        from soma.serve.keys.door import Door

        app.add_middleware(Door, guard=guard)
        service.metrics.registry.register(guard.refused)
    app.add_middleware(Continued)
    errors.install(app)
    embeddings.install(app, service)
    rerank.install(app, service)
    retrieval.install(app, service, knowledge)
    tokens.install(app, service)
    adapters.install(app, service, allowed=allow_adapter_loading)
    app.state.v2 = v2 = v2_front(service, repository or Repository(), allow_control=allow_model_control)
    rest.install(app, v2)
    feedback.install(app, request_log)
    if request_log is not None:
        request_log.register(service.metrics.registry)
    health.install(app, service.check_open, service.metrics.registry)
    openapi.install(app, asks_for_keys=guard is not None, public=PUBLIC)
    page = files("soma.serve").joinpath("page.html").read_text(encoding="utf-8")
    if request_log is not None:
        page = page.replace('data-feedback="off"', 'data-feedback="on"')

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        service.check_open()
        body = await read_body(request, ChatRequest, service.max_body_bytes)
        adapter = service.check_model(body.model)
        params = body.params()
        if not tokenizer.has_chat_template:
            raise ApiError(400, f"the model `{model_name}` has no chat template; use /v1/completions", "messages",
                           "no_chat_template")  # fmt: skip
        messages = [message.for_template(place) for place, message in enumerate(body.messages)]
        parallel = body.parallel_tool_calls is not False
        use = await asyncio.to_thread(read_tools, body.tools, body.tool_choice, parallel, tokenizer)
        params = with_calls(params, use)
        shown = None if use is None else use.for_template
        passages = await retrieval.with_passages(knowledge, body.retrieval, messages, tools=use is not None)
        prompt = await asyncio.to_thread(tokenizer.encode_chat, messages, True, shown)
        known = params.logprobs is not None
        shape: ChatFormat
        if passages is not None and knowledge is not None:
            shape = retrieval.CitedFormat(service.names, body.model, knowledge, passages, logprobs=known)
        elif use is None:
            shape = ChatFormat(service.names, body.model, logprobs=known)
        else:
            shape = ToolChatFormat(service.names, body.model, use, logprobs=known)
        return await answer(service, request, body, [prompt], params, shape, adapter)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        service.check_open()
        body = await read_body(request, CompletionRequest, service.max_body_bytes)
        adapter = service.check_model(body.model)
        params = body.params()
        prompts = await asyncio.to_thread(encode_all, tokenizer, body.prompts)
        shape = CompletionFormat(service.names, body.model, logprobs=params.logprobs is not None)
        if body.echo:
            n = body.n or 1
            for index in range(len(prompts) * n):
                given = body.prompts[index // n]
                text = given if isinstance(given, str) else tokenizer.decode(given)
                shape.echo(index, text)
        return await answer(service, request, body, prompts, params, shape, adapter)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        service.check_open()
        body = await read_body(request, ResponsesRequest, service.max_body_bytes)
        adapter = service.check_model(body.model)
        params = body.params()
        if not tokenizer.has_chat_template:
            raise ApiError(400, f"the model `{model_name}` has no chat template; use /v1/completions", "input",
                           "no_chat_template")  # fmt: skip
        parallel = body.parallel_tool_calls is not False
        use = await asyncio.to_thread(read_tools, body.functions, body.chosen, parallel, tokenizer)
        params = with_calls(params, use)
        shown = None if use is None else use.for_template
        prompt = await asyncio.to_thread(tokenizer.encode_chat, body.messages, True, shown)
        shape = responses.ResponsesFormat(service.names, body.model, body, use)
        return await answer(service, request, body, [prompt], params, shape, adapter)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        found = [each for each in service.models() if may_use(request, each["id"])]
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        adapter = service.check_model(name)
        check_allowed(request, name)
        return service.model(name, service.engine.adapter_folders.get(name) if adapter else None)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    return app


def v2_front(service: Service, repository: Repository, *, allow_control: bool) -> Front:
    """The Open Inference Protocol over the engine's model, its adapters, its embeddings and what the repository has.
    Embeddings are a model of the engine's name; beside a model that makes text they are `NAME-embeddings`."""
    engine, name = service.engine, service.model_name
    if service.makes_text:
        repository.add(name, LanguageModel(service))
        repository.find = lambda wanted: LanguageModel(service, wanted) if wanted in engine.adapter_folders else None
    if service.embedder is not None:
        kind = Classifier if service.embedder.labels else Encoder
        encoder = kind(service.embedder, service.tokenizer, lambda: engine.alive, own=False)
        encoder.known_as = name
        repository.add(f"{name}-embeddings" if service.makes_text else name, encoder)
    return Front(repository, service, allow_control=allow_control)


def encode_all(tokenizer: Tokenizer, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    """Ids of every prompt; those given as ids stay as they are."""
    return [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


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
