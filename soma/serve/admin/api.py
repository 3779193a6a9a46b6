"""The admin API: keys, teams, budgets, the ledger, limits, graphs and what runs now, for keys that were made for it.

It has a listener of its own, in a thread with an event loop of its own: what it does never waits in line with answers
to clients, and a network that reaches the one need not reach the other.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from soma.base.errors import UserError
from soma.serve import errors
from soma.serve.admin import playground
from soma.serve.admin.beside import Beside
from soma.serve.admin.bodies import Empty, Expiry, NewBudget, NewKey, NewTeam, Rotation
from soma.serve.errors import ApiError
from soma.serve.gateway import Gateway
from soma.serve.http_server import http_config
from soma.serve.keys.door import Door, Guard
from soma.serve.keys.store import NANO, Budget, Key, KeyStore
from soma.serve.ledger import report as reports
from soma.serve.ledger.book import balances_of
from soma.serve.listener import base_url, listen
from soma.serve.tokens import read_as

MAX_BODY = 1 << 16
PUBLIC = frozenset(("/", "/health"))
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def shown_key(key: Key) -> dict[str, Any]:
    return {**vars(key), "state": key.state}


def shown_budget(budget: Budget, used: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """A budget and what of it is used and held in this period."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    row = used.get((budget.owner, today if budget.period == "day" else today[:7]))
    tokens, nano = (0, 0) if row is None else (row.tokens + row.held_tokens, row.nano + row.held_nano)
    return {
        "owner": budget.owner, "period": budget.period, "tokens": budget.tokens, "tokens_used": tokens,
        "money": None if budget.nano is None else f"{Decimal(budget.nano) / NANO:f}",
        "money_used": f"{Decimal(nano) / NANO:f}",
    }  # fmt: skip


def create_admin(gateway: Gateway, beside: Beside) -> FastAPI:
    """The application. beside: the service that it shows."""
    app = FastAPI(title="Soma admin", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.guard = Guard(gateway.keyring, role="admin")
    app.add_middleware(Door, guard=app.state.guard, public=PUBLIC)
    errors.install(app)
    store = KeyStore(gateway.database)
    install_keys(app, gateway, store)
    install_views(app, gateway, beside)
    playground.install(app, beside.chat_url)
    page = files("soma.serve.admin").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=POLICY)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def install_keys(app: FastAPI, gateway: Gateway, store: KeyStore) -> None:
    """Keys, teams, budgets."""

    async def change(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Change the database, off the event loop; the service of this process knows at once."""

        def run() -> Any:
            found = work(*arguments, **options)
            gateway.keyring.refresh()
            return found

        return await asyncio.to_thread(run)

    @app.get("/api/keys")
    async def keys() -> dict[str, Any]:
        return {"data": [shown_key(key) for key in await asyncio.to_thread(store.all)]}

    @app.post("/api/keys")
    async def create(request: Request) -> JSONResponse:
        body = await read_as(request, NewKey, MAX_BODY)
        key, secret = await change(store.create, **body.model_dump())
        return JSONResponse({"key": secret.text, **shown_key(key)}, 201, headers={"Cache-Control": "no-store"})

    @app.post("/api/keys/{key_id}/rotate")
    async def rotate(request: Request, key_id: str) -> JSONResponse:
        body = await read_as(request, Rotation, MAX_BODY)
        secret = await change(store.rotate, key_id, body.grace)
        return JSONResponse({"id": key_id, "key": secret.text}, headers={"Cache-Control": "no-store"})

    @app.post("/api/keys/{key_id}/expire")
    async def expire(request: Request, key_id: str) -> dict[str, Any]:
        body = await read_as(request, Expiry, MAX_BODY)
        await change(store.expire, key_id, body.days)
        return shown_key(await asyncio.to_thread(store.get, key_id))

    @app.post("/api/keys/{key_id}/revoke")
    async def revoke(request: Request, key_id: str) -> dict[str, Any]:
        await read_as(request, Empty, MAX_BODY)
        await change(store.revoke, key_id)
        return shown_key(await asyncio.to_thread(store.get, key_id))

    @app.get("/api/teams")
    async def teams() -> dict[str, Any]:
        return {"data": await asyncio.to_thread(store.teams)}

    @app.post("/api/teams")
    async def create_team(request: Request) -> JSONResponse:
        body = await read_as(request, NewTeam, MAX_BODY)
        await change(store.create_team, body.name)
        return JSONResponse({"name": body.name}, 201)

    @app.get("/api/budgets")
    async def budgets() -> dict[str, Any]:
        found, used = await asyncio.to_thread(lambda: (store.budgets(), balances_of(gateway.database)))
        return {"currency": gateway.currency, "data": [shown_budget(budget, used) for budget in found]}

    @app.put("/api/budgets")
    async def set_budget(request: Request) -> dict[str, Any]:
        body = await read_as(request, NewBudget, MAX_BODY)
        money = None
        if body.money is not None:
            try:
                money = Decimal(body.money)
            except ArithmeticError:
                raise ApiError(400, f"money: expected a number as text, got {body.money[:40]!r}", "money") from None
        made = await change(store.set_budget, body.owner, body.period, body.tokens, money)
        return shown_budget(made, await asyncio.to_thread(balances_of, gateway.database))


def install_views(app: FastAPI, gateway: Gateway, beside: Beside) -> None:
    """What the service has, the ledger, what runs, the limits, the graphs."""

    @app.get("/api/service")
    async def service() -> dict[str, bool]:
        return {"graphs": bool(beside.graphs), "chat": beside.chat_url is not None}

    @app.get("/api/graphs")
    async def graphs() -> dict[str, Any]:
        return {"data": [graph.described() for graph in beside.graphs.values()]}

    @app.get("/api/ledger")
    async def ledger(
        by: str = "key,model,day", since: str | None = None, until: str | None = None, format: str = "json"
    ) -> Response:
        columns = by.split(",")
        if format not in ("json", "csv"):
            raise ApiError(400, f"format {format[:40]!r}: expected json or csv", "format")
        lines = await asyncio.to_thread(reports.report, gateway.database, columns, since, until)
        if format == "csv":
            return PlainTextResponse(reports.as_csv(lines, columns), media_type="text/csv")
        return JSONResponse({"data": [reports.flat(line) for line in lines]})

    @app.get("/api/traffic")
    async def traffic() -> dict[str, Any]:
        now = time.time()
        running = [
            {"id": hold.call.id, "key": hold.call.caller and hold.call.caller.key_id,
             "team": hold.call.caller and hold.call.caller.team, "model": hold.call.model, "route": hold.call.route,
             "seconds": round(now - hold.started, 3), "prompt_tokens": hold.call.prompt_tokens,
             "completion_tokens": hold.slot.completion_tokens, "max_tokens": hold.call.max_tokens}
            for hold in list(gateway.ledger.running.values())
        ]  # fmt: skip
        kept = None if beside.request_log is None else beside.request_log.counts()
        return {"running": running, "refused_at_the_door": gateway.guard.counts(), "request_log": kept}

    @app.get("/api/limits")
    async def limits() -> dict[str, Any]:
        if (limiter := beside.limiter) is None:
            return {"data": []}
        rules = [rule.model_dump(mode="json", exclude_none=True) for rule in limiter.config.rules]
        counts = {sample.labels["rule"]: int(sample.value) for metric in limiter.refused.collect()
                  for sample in metric.samples if sample.name.endswith("_total")}  # fmt: skip
        return {"data": [{**rule, "refused": counts.get(rule["name"], 0)} for rule in rules]}


class AdminServer:
    """The admin API on its own port, until `close`. Raises UserError for a host or port that cannot be had."""

    def __init__(self, gateway: Gateway, host: str, port: int, beside: Beside) -> None:
        self.listener = listen(host, port)
        self.url = base_url(self.listener)
        self.server = uvicorn.Server(http_config(create_admin(gateway, beside)))
        self.thread = threading.Thread(
            target=self.server.run, args=([self.listener],), name="soma-admin", daemon=True
        )  # fmt: skip
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise UserError(f"the admin API does not start on {self.url}")
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()
