"""What `soma serve` can be told. The command line's options have the same names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soma.base.errors import UserError
from soma.serve.http_server import GRACE


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a service listens, what its engine is like, who may ask, and what stands around the model.

    Raises UserError for fewer than one replica or rank, and for several of them in one process.
    """

    # Where it listens.
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    allow_public: bool = False  # other machines may reach `host` without keys: whoever does so uses the model
    trusted_proxies: Sequence[str] = ()  # addresses and networks whose X-Forwarded-For is believed
    grace: float = GRACE  # seconds that running answers get at the end

    # The engine.
    name: str | None = None  # that clients ask for; None: the folder's
    precision: str = "auto"
    device: str = "auto"
    max_length: int | None = None  # tokens, prompt and answer together
    max_running: int = 64  # requests
    max_waiting: int = 256
    weights: str | None = None  # int8, int4
    cache_dtype: str = "auto"  # these three: see `Engine`
    speculate: str | None = None
    draft_tokens: int | None = None
    replicas: int = 1  # engine processes with a copy of the model each, behind one front
    tensor_parallel: int = 1  # ranks that split each layer of a copy (`soma.engine.parallel`)
    pipeline_parallel: int = 1  # stages of its layers
    in_process: bool = False  # no process for the engine: one to debug, and a crash of the engine ends the service
    adapters: Mapping[str, str] = field(default_factory=dict)  # names and PEFT folders, chosen as models by their names
    allow_adapter_loading: bool = False  # clients may load adapters from folders of this machine, and unload them

    # Who may ask, and for how much.
    keys: str | None = None  # the database of keys (`soma keys`), which requests are then asked for, and of the ledger
    prices: str | None = None  # a file of what tokens cost (`soma.serve.ledger.prices`)
    durability: str = "process"  # what the ledger's row of a call outlives from its start, or "power"
    admin_port: int | None = None  # of the admin API and page, which ask for keys of their own
    admin_host: str = "127.0.0.1"
    limits: Path | None = None  # a file of rate limits (`soma.serve.limits`)

    # The Open Inference Protocol.
    grpc_port: int | None = None  # over gRPC as well, on the same host
    grpc_compression: str = "none"  # of its answers
    models: str | Path | None = None  # a file with further models (`soma.serve.v2.config`)
    allow_model_control: bool = False  # clients may load and unload those

    # What requests are made of, and what is kept of them.
    prompts: str | None = None  # a folder of prompts that requests may name (`soma.serve.templates`)
    index: str | None = None  # of `soma index`, a folder or a Qdrant server's URL: chats are answered from it
    rerank: str | None = None  # URL#MODEL of a route that sorts what the index finds
    request_log: str | Path | None = None  # a folder for what is asked and answered (`soma.serve.requestlog`)
    request_log_sample: float = 1.0  # the share of it that is kept
    request_log_redact: bool = True  # personal data masked
    request_log_seconds: float = 60.0  # what one file of it holds at most

    def __post_init__(self) -> None:
        for option in ("replicas", "tensor_parallel", "pipeline_parallel"):
            size = getattr(self, option)
            if size < 1 or (self.in_process and size > 1):
                raise UserError(f"{option} {size}: expected 1 or more, and with in_process 1")

    @property
    def world(self) -> int:
        """Ranks of one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    def for_engine(self) -> dict[str, Any]:
        """What `start_engine` takes; an engine that is not parallel knows nothing of ranks."""
        names = ["precision", "device", "max_length", "max_running", "max_waiting", "weights", "cache_dtype",
                 "speculate"]  # fmt: skip
        names += [] if self.draft_tokens is None else ["draft_tokens"]
        names += [] if self.world == 1 else ["tensor_parallel", "pipeline_parallel"]
        return {"adapters": dict(self.adapters), **{name: getattr(self, name) for name in names}}


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Names and folders of adapters from NAME=FOLDER. Raises UserError for other texts and a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"adapter {text!r}: expected NAME=FOLDER")
        if name in found:
            raise UserError(f"adapter {text!r}: the name {name!r} was given twice")
        found[name] = folder
    return found
