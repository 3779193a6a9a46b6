"""/openapi.json, and /docs: Swagger UI from an installed package, nothing from elsewhere.

The routes read their bodies themselves, so what a body is stands here, from the same classes that check it.
"""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.routing import Route

import soma
from soma.serve.adapters import LoadRequest, UnloadRequest
from soma.serve.embeddings import EmbeddingRequest
from soma.serve.protocol import ChatRequest, CompletionRequest
from soma.serve.requestlog.feedback import FeedbackRequest
from soma.serve.rerank import RerankRequest, ScoreRequest
from soma.serve.response_request import ResponsesRequest
from soma.serve.retrieval.form import SearchRequest
from soma.serve.tokens import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest, "/v1/rerank": RerankRequest, "/v1/score": ScoreRequest,
    "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest, "/v1/load_lora_adapter": LoadRequest,
    "/v1/unload_lora_adapter": UnloadRequest, "/v1/feedback": FeedbackRequest,
    "/v1/search": SearchRequest,
}  # fmt: skip
STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
TEXTS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics")
PAGES = ("/", "/docs", "/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json")
ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"},
                       "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}},
    }},
}  # fmt: skip
V2_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
ERRORS = {
    "400": "The request is not as it should be; `param` names the field.", "401": "No key, or one that is not valid.",
    "403": "The key may not do this.", "404": "There is no such model.",
    "408": "The body did not come.", "413": "The body is too large.",
    "429": "A limit or a budget is reached, or the queue is full; see Retry-After.",
    "500": "The service failed; its log says why.", "503": "Not at the moment; see Retry-After.",
    "504": "The request's own deadline has passed.",
}  # fmt: skip
UPSTREAM_ERRORS = {"502": "The upstream broke off."}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
START = """SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});\n"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Soma API</title><link rel="icon" href="data:,">{head}</head><body><div id="docs">{body}</div>{tail}</body></html>
"""
WITHOUT = (
    "<p>The interactive page needs one more package: <code>pip install 'somacube[gateway]'</code>. "
    'The API is described in <a href="/openapi.json">/openapi.json</a>.</p>'
)


def document(app: FastAPI, *, asks_for_keys: bool, public: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application. public: paths that need no key."""
    made = get_openapi(title=app.title, version=soma.__version__, routes=app.routes)
    schemas: dict[str, Any] = {"Error": ERROR, "V2Error": V2_ERROR}
    for path in PAGES:
        made["paths"].pop(path, None)
    forwarded = [route.path for route in app.routes if type(route) is Route and route.path in BODIES]
    made["paths"] = {path: {"post": forward(path)} for path in forwarded} | made["paths"]
    for path, methods in made["paths"].items():
        for operation in methods.values():
            asks = asks_for_keys and path not in public
            operation["responses"] = responses(path, asks_for_keys=asks, is_forwarded=path in forwarded)
            if path in public:
                operation["security"] = []
            if path in BODIES:
                schema = schema_of(BODIES[path], schemas, is_open=path in forwarded)
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    made["components"] = {"schemas": schemas, "securitySchemes": SCHEMES}
    made["security"] = [{name: []} for name in SCHEMES] if asks_for_keys else []
    return made


def forward(path: str) -> dict[str, Any]:
    """The operation of a route that goes to upstreams, which FastAPI does not know of."""
    name = path.removeprefix("/v1/").replace("/", " ")
    return {
        "summary": name.capitalize(), "operationId": name.replace(" ", "_"),
        "description": "Passed on to an upstream, with what it takes beyond these fields.",
    }  # fmt: skip


def responses(path: str, *, asks_for_keys: bool, is_forwarded: bool = False) -> dict[str, Any]:
    """What may come back."""
    kinds = ["text/plain"] if path in TEXTS else ["application/json"]
    kinds += ["text/event-stream"] if path in STREAMS or path.endswith("generate_stream") else []
    kinds += ["application/octet-stream"] if path.endswith("/infer") else []
    fine = {"description": "Done.", "content": {kind: {} for kind in kinds}}
    name = "V2Error" if path.startswith("/v2") else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    found: dict[str, Any] = {"200": fine}
    for status, words in (ERRORS | (UPSTREAM_ERRORS if is_forwarded else {})).items():
        if status != "401" or asks_for_keys:
            found[status] = {"description": words, "content": error}
    return found


def schema_of(kind: type[BaseModel], schemas: dict[str, Any], *, is_open: bool = False) -> dict[str, str]:
    """A reference to a class's schema, which is put among `schemas` with what it is made of. is_open: it may have
    fields beyond those of the class."""
    made = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= made.pop("$defs", {})
    if is_open:
        made.pop("additionalProperties", None)
    schemas[kind.__name__] = made
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def install(app: FastAPI, *, asks_for_keys: bool, public: frozenset[str]) -> None:
    """Add the document and its page, after all other routes."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(document(app, asks_for_keys=asks_for_keys, public=public))

    assets = {name: asset(name) for name in ASSETS}
    is_there = None not in assets.values()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        head = '<link rel="stylesheet" href="/docs/swagger-ui.css">' if is_there else ""
        tail = '<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>'
        page = PAGE.format(head=head, body="" if is_there else WITHOUT, tail=tail if is_there else "")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript")

    for name, data in assets.items():
        if data is not None:
            add_asset(app, name, data)


def add_asset(app: FastAPI, name: str, data: bytes) -> None:
    """One file of Swagger UI."""

    @app.get(f"/docs/{name}", include_in_schema=False)
    async def serve() -> Response:
        return Response(data, media_type=ASSETS[name], headers={"Cache-Control": "max-age=3600"})


def asset(name: str) -> bytes | None:
    """A file that the package fastapi-swagger carries (Swagger UI, Apache-2.0); None where it is not installed."""
    try:
        return files("fastapi_swagger.resources").joinpath(name).read_bytes()
    except ModuleNotFoundError:
        return None
