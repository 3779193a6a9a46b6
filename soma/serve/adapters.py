"""vLLM's routes to load and unload adapters. They read folders of this machine, so they are off unless allowed."""

import asyncio
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from soma.serve.errors import ApiError
from soma.serve.tokens import read_as

if TYPE_CHECKING:
    from soma.serve.service import Service


class LoadRequest(BaseModel):
    """Body of POST /v1/load_lora_adapter."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str
    lora_path: str


class UnloadRequest(BaseModel):
    """Body of POST /v1/unload_lora_adapter. The number that vLLM's clients may send is not needed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: str
    lora_int_id: int | None = None


def install(app: FastAPI, service: "Service", *, allowed: bool) -> None:
    """Add the routes."""

    def check_allowed() -> None:
        service.check_open()
        if not allowed:
            raise ApiError(403, "adapters cannot be loaded or unloaded here: the service was started without "
                           "--allow-adapter-loading", code="adapter_loading_off")  # fmt: skip

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        check_allowed()
        body = await read_as(request, LoadRequest, service.max_body_bytes)
        if body.lora_name == service.model_name:
            raise ApiError(400, f"`{body.lora_name}` is the name of the base model", "lora_name")
        await asyncio.to_thread(service.engine.load_adapter, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """Answers when the last request of the adapter is over."""
        check_allowed()
        body = await read_as(request, UnloadRequest, service.max_body_bytes)
        await asyncio.to_thread(service.engine.unload_adapter, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
