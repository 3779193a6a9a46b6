"""The HTTP application of a model's service: its routes, health, metrics, and the page."""

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from soma.model.tokenizer import Tokenizer
from soma.serve import adapters, embeddings, errors, health, openai_routes, openapi, rerank, tokens
from soma.serve.calls import Gates, check_allowed, may_use
from soma.serve.graphs.trace import Continued
from soma.serve.keys.routes import PUBLIC
from soma.serve.requestlog import feedback
from soma.serve.retrieval import routes as retrieval
from soma.serve.service import MAX_BODY_BYTES, Service
from soma.serve.templates.library import Library
from soma.serve.v2 import rest
from soma.serve.v2.classifier import Classifier
from soma.serve.v2.encoder import Encoder
from soma.serve.v2.front import Front
from soma.serve.v2.llm import LanguageModel
from soma.serve.v2.repository import Repository

if TYPE_CHECKING:
    from soma.engine.embed import Embedder
    from soma.serve.keys.door import Guard
    from soma.serve.requestlog.gate import RequestLog
    from soma.serve.service import AnyEngine

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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
    openai_routes.install(app, service, knowledge)
    page = files("soma.serve").joinpath("page.html").read_text(encoding="utf-8")
    if request_log is not None:
        page = page.replace('data-feedback="off"', 'data-feedback="on"')

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
