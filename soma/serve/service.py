"""What the routes of a model's service share."""

import time
from typing import TYPE_CHECKING, Any

from soma.engine.process import EngineProcess
from soma.engine.replicas import Replicas
from soma.model.tokenizer import Tokenizer
from soma.serve.calls import Gates
from soma.serve.errors import ApiError
from soma.serve.metrics import Metrics
from soma.serve.prompts import TokenNames
from soma.serve.templates.library import Library

if TYPE_CHECKING:
    from soma.engine.embed import Embedder
    from soma.engine.engine import Engine

    AnyEngine = Engine | EngineProcess | Replicas

MAX_BODY_BYTES = 4 << 20


class Service:
    """The engine, the model's name, and whether new requests are taken."""

    def __init__(
        self, engine: "AnyEngine", tokenizer: Tokenizer, model_name: str, max_body_bytes: int,
        embedder: "Embedder | None", gates: Gates | None = None,
    ) -> None:  # fmt: skip
        self.gates = gates or Gates()
        self.engine, self.tokenizer, self.model_name = engine, tokenizer, model_name
        self.max_body_bytes = max_body_bytes
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
