"""The file of `soma gateway`."""

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from soma.base.errors import UserError
from soma.serve.admission import AdmissionConfig
from soma.serve.limits.config import LimitsConfig, Span, Strict
from soma.serve.requestlog.config import RequestLogConfig
from soma.serve.yaml_file import read_as


class UpstreamConfig(Strict):
    """A service that speaks OpenAI's API."""

    url: str = Field(description="Up to and with /v1.")
    model: str | None = Field(None, description="The model's name there; left out, the one that clients use.")
    key_env: str | None = Field(None, description="The environment variable that holds the key for it.")
    weight: float = Field(1.0, gt=0, le=1000, description="Its share of the load.")
    cost: float = Field(0.0, ge=0, description="For routing by cost, in any unit.")

    @field_validator("url")
    @classmethod
    def is_http(cls, url: str) -> str:
        """An address to send requests to, without secrets in it."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("expected as http://host:8000/v1, without user, password or parameters; a key is key_env")
        return url.rstrip("/")

    @property
    def key(self) -> str | None:
        """The key. Raises UserError where the variable is not set."""
        if self.key_env is None:
            return None
        if not (value := os.environ.get(self.key_env)):
            raise UserError(f"upstream {self.url}: the environment variable {self.key_env} is not set")
        return value


class Timeouts(Strict):
    """How long an upstream may take."""

    connect: Span = Field(2_000, ge=1)
    first_token: Span = Field(120_000, ge=1, description="Until a stream says something.")
    between_tokens: Span = Field(60_000, ge=1)
    whole: Span = Field(600_000, ge=1, description="The longest answer, streamed or not.")


class Retry(Strict):
    """Requests of which the client has seen nothing yet are sent again."""

    attempts: int = Field(3, ge=1, le=10, description="In all, over all replicas and fallbacks.")
    budget: float = Field(0.2, ge=0, le=1, description="Retries for each request, on average (and ten to begin with).")


class Breaker(Strict):
    """An upstream that fails is left alone for a while, then tried with one request."""

    failures: int = Field(5, ge=1, description="In a row.")
    pause: Span = Field(5_000, ge=1, description="Doubles with every trial that fails, up to a minute.")


class Health(Strict):
    """Asked of every upstream, whether there are requests or not."""

    path: str = Field("/models", pattern="^/", description="Behind the upstream's url.")
    every: Span = Field(5_000, ge=10)
    timeout: Span = Field(2_000, ge=1)


class Wake(Strict):
    """A model that may sleep: requests wait until an upstream is there."""

    url: str | None = Field(None, description="Gets a POST when the first request waits.")
    timeout: Span = Field(300_000, ge=1)
    waiting: int = Field(100, ge=1, description="Requests that may wait; more get 503.")
    heartbeat: Span = Field(5_000, ge=10, description="Between comments in streams that wait.")


class ModelConfig(Strict):
    """One name for clients, and who stands behind it."""

    upstreams: list[UpstreamConfig] = Field(min_length=1)
    routing: Literal["least_load", "prefix", "cost"] = "least_load"
    fallback: list[str] = Field([], description="Models that answer when no upstream of this one does.")
    max_tokens: int = Field(4096, ge=1, description="Reserved for a request that does not say its max_tokens.")
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    breaker: Breaker = Breaker()
    health: Health | None = Health()
    wake: Wake | None = None
    admission: AdmissionConfig | None = None


class GatewayConfig(Strict):
    """The file. Everything but `keys`, `prices`, `durability`, `request_log` and the admin's place is taken anew at
    SIGHUP."""

    models: dict[str, ModelConfig] = Field(min_length=1)
    limits: LimitsConfig = LimitsConfig()
    keys: str | None = Field(None, description="The database of keys and ledger (`soma keys`).")
    prices: str | None = None
    prompts: str | None = Field(None, description="Folder of prompts that requests may name.")
    durability: Literal["process", "power"] = Field(
        "process", description="What the ledger's row of a call outlives from the call's start."
    )
    admin_port: int | None = Field(None, ge=0, le=65535, description="Admin API and page; with `keys`.")
    admin_host: str = "127.0.0.1"
    trusted_proxies: list[str] = Field([])
    request_log: RequestLogConfig | None = Field(None, description="What was asked and answered, in Parquet.")
    max_body_bytes: int = Field(4 << 20, ge=1)
    grace: Span | None = Field(None, description="For running answers after SIGTERM; left out, the longest `whole`.")

    @model_validator(mode="after")
    def fallbacks_exist(self) -> "GatewayConfig":
        """Fallbacks are models of this file."""
        for name, model in self.models.items():
            for other in model.fallback:
                if other not in self.models or other == name:
                    raise ValueError(f"models.{name}.fallback: {other!r} is no other model of this file")
        return self

    @property
    def drain(self) -> float:
        """Seconds that running answers get at the end."""
        return (self.grace or max(model.timeouts.whole for model in self.models.values())) / 1000


def read_config(path: Path) -> GatewayConfig:
    """The file, checked, with every key of an upstream there. Raises UserError that names file and place."""
    config = read_as(GatewayConfig, path)
    for model in config.models.values():
        for upstream in model.upstreams:
            _ = upstream.key
    return config
