"""The application of the gateway: `soma serve`'s door, gates and errors, with upstreams in place of an engine."""

import asyncio
import json
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiohttp
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from soma.serve import errors, health, openapi
from soma.serve.addresses import Addresses, TrustedProxies
from soma.serve.admission import AdmissionGate
from soma.serve.calls import Call, Gate, Gates, called, check_allowed, may_use
from soma.serve.errors import ApiError
from soma.serve.graphs.trace import Continued
from soma.serve.keys.routes import PUBLIC
from soma.serve.limits.gate import LimitsGate
from soma.serve.protocol import read_json
from soma.serve.requestlog import feedback
from soma.serve.requestlog.gate import RequestLog
from soma.serve.requestlog.record import asked_of
from soma.serve.templates import request as prompts
from soma.serve.upstreams.config import GatewayConfig
from soma.serve.upstreams.pool import Pool
from soma.serve.upstreams.proxy import Exchange

if TYPE_CHECKING:
    from soma.serve.gateway import Gateway

log = logging.getLogger("soma.serve")

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/v1/score")
WITHOUT_ANSWER = ("/v1/embeddings", "/v1/rerank", "/v1/score")  # routes that make no tokens
BYTES_PER_TOKEN = 4  # of a request, to reserve before the upstream has counted
POLL = 0.5  # seconds between looks at a model that wakes


class FrontMetrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.tries = Counter("soma:upstream_tries", "Requests sent to upstreams, repeated ones too.", ["model"], **more)
        self.calls = Counter("soma:gateway_calls", "Calls that passed the gates.", ["model", "outcome"], **more)
        self.running = Gauge("soma:gateway_running", "Calls being answered.", **more)
        self.seconds = Histogram("soma:gateway_seconds", "From a call's arrival to its end.", ["model"], **more)


class Front:
    """What the routes share. `draining` and `open` are what `server.Server` asks for."""

    def __init__(self, config: GatewayConfig, gateway: "Gateway | None" = None) -> None:
        self.config, self.draining, self.open, self.created = config, False, 0, int(time.time())
        self.metrics = FrontMetrics()
        self.prompts = prompts.load(config.prompts)
        self.limits = LimitsGate(config.limits)
        self.admission = AdmissionGate({name: model.admission for name, model in config.models.items()})
        others: list[Gate] = [self.admission, self.limits]
        self.request_log = None if config.request_log is None else RequestLog(config.request_log)
        last = [] if self.request_log is None else [self.request_log]
        self.gates = Gates([*(gateway.gates(others) if gateway else others), *last])
        self.pools = {name: Pool(name, model) for name, model in config.models.items()}
        self.limits.register(self.metrics.registry)
        self.metrics.registry.register(self.admission.refused)
        if self.request_log is not None:
            self.request_log.register(self.metrics.registry)
        self.waking: dict[str, asyncio.Task[None]] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Inside the event loop: the connections to upstreams, and their checks."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15, use_dns_cache=True), trust_env=False,
            auto_decompress=True, skip_auto_headers=("User-Agent",),
        )  # fmt: skip
        self._watch()

    async def close(self) -> None:
        """End what runs in the background."""
        for task in (*self.tasks.values(), *self.waking.values()):
            task.cancel()
        await self.limits.close()
        await self.session.close()
        if self.request_log is not None:
            await asyncio.to_thread(self.request_log.close)

    async def replace(self, config: GatewayConfig) -> None:
        """Other models, prompts and limits from now on. Requests that run go on with what they have."""
        library = await asyncio.to_thread(prompts.load, config.prompts)  # what may fail first
        await self.limits.replace(config.limits)
        self.prompts = library
        self.admission.replace({name: model.admission for name, model in config.models.items()})
        self.pools = {name: Pool(name, model, self.pools.get(name)) for name, model in config.models.items()}
        self.config = config
        self._watch()

    def check_open(self) -> None:
        """Raises ApiError 503 while the gateway shuts down."""
        if self.draining:
            raise ApiError(503, "the service is shutting down; try again soon", code="shutting_down", retry_after=1)

    def pool(self, name: Any) -> Pool:
        """Raises ApiError 400, 404."""
        if not isinstance(name, str):
            raise ApiError(400, "you must provide model", "model", "missing_required_parameter")
        if name not in self.pools:
            raise ApiError(404, f"The model `{name}` does not exist; see /v1/models", "model", "model_not_found")
        return self.pools[name]

    # ------------------------------------------------------------------------------------------------------ health

    def _watch(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        self.tasks = {
            name: asyncio.create_task(self._check_all(pool)) for name, pool in self.pools.items() if pool.config.health
        }

    async def _check_all(self, pool: Pool) -> None:
        health = pool.config.health
        assert health is not None
        while True:
            found = await asyncio.gather(*(self.is_well(pool, place) for place in range(len(pool.upstreams))))
            for upstream, well in zip(pool.upstreams, found, strict=True):
                upstream.checked(well)
            await asyncio.sleep(health.every / 1000)

    async def is_well(self, pool: Pool, place: int) -> bool:
        """Whether an upstream answers its check with anything that is no error of its own."""
        upstream, health = pool.upstreams[place], pool.config.health
        path, limit = (health.path, health.timeout) if health else ("/models", 2_000)
        timeout = aiohttp.ClientTimeout(total=limit / 1000)
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self.session.get(
                upstream.config.url + path, headers=upstream.headers, timeout=timeout
            ) as answer:
                return answer.status < 500
        return False

    def awake(self, pool: Pool) -> asyncio.Task[None]:
        """The one task that wakes a model; done when an upstream is there, or in vain."""
        task = self.waking.get(pool.name)
        if task is None or task.done():
            task = self.waking[pool.name] = asyncio.create_task(self._wake(pool))
        return task

    async def _wake(self, pool: Pool) -> None:
        wake = pool.config.wake
        assert wake is not None
        if wake.url is not None:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self.session.post(wake.url, timeout=aiohttp.ClientTimeout(total=wake.timeout / 1000)):
                    pass
        deadline = time.monotonic() + wake.timeout / 1000
        while time.monotonic() < deadline:
            for place, upstream in enumerate(pool.upstreams):
                if await self.is_well(pool, place):
                    upstream.reset()
                    return
            await asyncio.sleep(POLL)


class Forward:
    """The ASGI endpoint of all routes that go to upstreams."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        front = self.front
        request = Request(scope, receive)
        front.check_open()
        value, raw = await read_json(request, front.config.max_body_bytes)
        if await prompts.fill(request, value):
            raw = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        pool = front.pool(value.get("model"))
        call = call_of(request, pool, value, raw)
        exchange = Exchange(front, call, value, raw, send)
        front.open += 1
        front.metrics.running.inc()
        try:
            await unless_left(self._pass(exchange, pool), receive, exchange)
        finally:
            front.open -= 1
            front.metrics.running.dec()

    async def _pass(self, exchange: Exchange, pool: Pool) -> None:
        front, begun = self.front, time.monotonic()
        passage = await front.gates.enter(exchange.call)
        if exchange.call.record is not None:
            exchange.call.record.asked(**asked_of(exchange.value))
        exchange.tell(passage.headers)
        try:
            await exchange.run(pool)
        except asyncio.CancelledError:
            exchange.outcome = "abort"
            raise
        finally:
            await passage.leave(exchange.usage)
            front.metrics.calls.labels(pool.name, exchange.outcome).inc()
            front.metrics.seconds.labels(pool.name).observe(time.monotonic() - begun)


async def unless_left(work: Coroutine[Any, Any, None], receive: Receive, exchange: Exchange) -> None:
    """Do `work` in this task; cancel it if the client leaves before its answer has ended."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        if not exchange.ended:
            left = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
    finally:
        watcher.cancel()


def call_of(request: Request, pool: Pool, value: dict[str, Any], raw: bytes) -> Call:
    """The call, for the gates. Tokens are counted by the upstream; until then a prompt has one for four bytes, and the
    answer what was asked for. Raises ApiError for numbers that are none."""
    made = 0
    if request.scope["path"] not in WITHOUT_ANSWER:
        given = [value.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        most = next((each for each in given if each is not None), pool.config.max_tokens)
        made = whole("max_tokens", most) * whole("n", 1 if value.get("n") is None else value["n"])
    call = called(request, pool.name, max(1, len(raw) // BYTES_PER_TOKEN), made)
    timeout = value.get("timeout")
    call.is_foreign = True
    call.timeout = timeout if isinstance(timeout, int | float) and timeout > 0 else None
    return call


def whole(name: str, number: Any) -> int:
    """The number. Raises ApiError."""
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
        raise ApiError(400, f"{name}: expected a whole number", name, "invalid_value")
    return number


def create_gateway_app(config: GatewayConfig, gateway: "Gateway | None" = None) -> FastAPI:
    """The application. `app.state.service` is its `Front`, which is to be started inside the event loop."""
    app = FastAPI(title="Soma gateway", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = front = Front(config, gateway)
    if gateway is not None:
        from soma.serve.keys.door import Door

        app.add_middleware(Door, guard=gateway.guard)
        front.metrics.registry.register(gateway.guard.refused)
    app.add_middleware(Addresses, proxies=TrustedProxies(config.trusted_proxies))
    app.add_middleware(Continued)
    errors.install(app)
    forward = Forward(front)
    app.router.routes += [Route(path, forward, methods=["POST"]) for path in ROUTES]
    feedback.install(app, front.request_log)
    health.install(app, front.check_open, front.metrics.registry)
    openapi.install(app, asks_for_keys=gateway is not None, public=PUBLIC)

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": front.created, "owned_by": "soma"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in front.pools if may_use(request, name)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_allowed(request, front.pool(name).name)
        return entry(name)

    return app
