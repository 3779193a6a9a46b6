"""/health, /health/ready, /health/live, and /metrics for Prometheus."""

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


def install(app: FastAPI, check_open: Callable[[], None], registry: CollectorRegistry) -> None:
    """Add the routes. check_open: raises ApiError 503 while no request is taken."""

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        check_open()
        return {"status": "ok"}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
