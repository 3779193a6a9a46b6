"""Serving a model in this process until it is told to stop."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.launch import Launched, launch
from soma.serve.addresses import Addresses, TrustedProxies
from soma.serve.admin.beside import Beside
from soma.serve.calls import Gates
from soma.serve.http_server import Server, grpc_maker, http_config
from soma.serve.limits.config import read_limits
from soma.serve.limits.gate import LimitsGate
from soma.serve.listener import base_url, check_host, listen
from soma.serve.options import ServeOptions
from soma.serve.requestlog.config import request_log_config
from soma.serve.templates.request import load as load_prompts
from soma.serve.v2.config import ModelsFile, add_models
from soma.serve.v2.repository import Repository
from soma.serve.yaml_file import read_as

if TYPE_CHECKING:
    from soma.engine.embed import Embedder
    from soma.model.tokenizer import Tokenizer
    from soma.serve.gateway import Gateway
    from soma.serve.keys.door import Guard
    from soma.serve.requestlog.gate import RequestLog
    from soma.serve.retrieval.routes import Knowledge
    from soma.serve.service import AnyEngine


def serve(model_ref: str | Path, options: ServeOptions, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve a model until SIGTERM or SIGINT.

    `ready` is called with the base URL once requests are answered; without it a note says so. Raises UserError: no such
    model or index, a public host without `keys` or `allow_public`, a port in use, an adapter or model that cannot be
    loaded, limits that make no sense, a database that cannot be opened.
    """
    check_host(options.host, allow_public=options.allow_public or options.keys is not None)
    with ExitStack() as stack:
        listener = listen(options.host, options.port)
        stack.callback(listener.close)
        around = open_around(options, stack)
        processes = 0 if options.in_process else options.replicas
        launched = [launch(options.replicas * options.world) for _ in range(processes)]
        from soma.serve.app import create_app  # heavy: the engine process imports its parts meanwhile

        engine, tokenizer, own_name, embedder = start_engine(model_ref, launched, **options.for_engine())
        stack.callback(engine.close)
        stack.callback(around.repository.close)
        name = options.name or own_name
        around.check_names(name, engine.adapter_folders)
        app = create_app(
            engine, tokenizer, name, embedder=embedder, allow_adapter_loading=options.allow_adapter_loading,
            repository=around.repository, allow_model_control=options.allow_model_control,
            prompts=load_prompts(options.prompts, tokenizer), gates=around.gates(), guard=around.guard,
            request_log=around.request_log, knowledge=around.knowledge,
        )  # fmt: skip
        app.add_middleware(Addresses, proxies=around.proxies)  # before the door, which counts failures by address
        if around.limiter is not None:
            around.limiter.register(app.state.service.metrics.registry)
        url = base_url(listener)
        announce = ready or (lambda url: progress.current().note(f"{name} is served at {url}"))
        make_grpc = None
        if options.grpc_port is not None:
            make_grpc = grpc_maker(
                app, options.host, options.grpc_port, around.guard, around.proxies, options.grpc_compression
            )  # fmt: skip
        if around.gateway is not None and options.admin_port is not None:
            beside = Beside(around.limiter, around.request_log, chat_url=url if tokenizer.has_chat_template else None)
            admin = around.gateway.start_admin(options.admin_host, options.admin_port, beside)
            progress.current().note(f"the admin page is at {admin}")
        Server(http_config(app), app, options.grace, lambda: announce(url), make_grpc).run(sockets=[listener])


@dataclass
class Around:
    """What stands around the model: who is asked for a key, what is counted, kept and looked up."""

    proxies: TrustedProxies
    repository: Repository
    limiter: LimitsGate | None
    knowledge: "Knowledge | None" = None
    gateway: "Gateway | None" = None
    request_log: "RequestLog | None" = None

    @property
    def guard(self) -> "Guard | None":
        """Who asks for keys at the door."""
        return self.gateway.guard if self.gateway else None

    def gates(self) -> Gates:
        """What every request that uses the model passes, the log last."""
        limiters = [] if self.limiter is None else [self.limiter]
        kept = [] if self.request_log is None else [self.request_log]
        return Gates([*(self.gateway.gates(limiters) if self.gateway else limiters), *kept])

    def check_names(self, name: str, adapters: Mapping[str, str]) -> None:
        """Raises UserError: an adapter with the base model's name, a model without a price."""
        if name in adapters:
            raise UserError(f"adapter {name!r}: this is the name of the base model")
        if self.gateway is not None:
            self.gateway.check_models((name, *adapters, *(entry.name for entry in self.repository)))


def open_around(options: ServeOptions, stack: ExitStack) -> Around:
    """What the options ask for beside the model, open until the stack ends. Raises UserError."""
    limiter = None if options.limits is None else LimitsGate(read_limits(Path(options.limits)))
    around = Around(TrustedProxies(options.trusted_proxies), Repository(), limiter)
    log_config = request_log_config(
        options.request_log, sample=options.request_log_sample, redact=options.request_log_redact,
        rotate=options.request_log_seconds,
    )  # fmt: skip
    if options.index is not None:
        from soma.serve.retrieval.routes import open_knowledge

        around.knowledge = open_knowledge(options.index, options.rerank)
        stack.callback(around.knowledge.close)
    elif options.rerank is not None:
        raise UserError("rerank sorts what an index finds; say which (--index)")
    if options.models is not None:
        add_models(around.repository, read_as(ModelsFile, Path(options.models)), Path(options.models).parent)
    if options.keys is not None:
        from soma.serve.gateway import Gateway

        around.gateway = Gateway(options.keys, options.prices, options.durability)
        stack.callback(around.gateway.close)
    elif options.prices is not None or options.admin_port is not None:
        raise UserError("prices and the admin API go with the database of keys; say which (--keys DATABASE)")
    if log_config is not None:
        from soma.serve.requestlog.gate import RequestLog

        around.request_log = RequestLog(log_config)
        stack.callback(around.request_log.close)
    return around


def start_engine(
    model_ref: str | Path,
    launched: Sequence[Launched],
    *,
    precision: str,
    device: str,
    adapters: Mapping[str, str],
    **options: Any,
) -> "tuple[AnyEngine, Tokenizer, str, Embedder | None]":
    """The engine, in the processes that were launched or in this one, its tokenizer, the model's name, and who embeds
    (None: the engine process itself)."""
    if launched:
        from soma.engine.process import EngineProcess
        from soma.engine.replicas import Replicas

        options |= {"precision": precision, "device": device, "adapters": adapters}
        world = options.get("tensor_parallel", 1) * options.get("pipeline_parallel", 1)
        process = (
            EngineProcess(model_ref, launched=launched[0], cores_share=world, **options) if len(launched) == 1
            else Replicas(model_ref, launched, **options)
        )  # fmt: skip
        return process, process.tokenizer, process.model_name, None
    from soma.engine.embed import Embedder
    from soma.engine.engine import Engine
    from soma.engine.load import load_weights, model_name
    from soma.model.folder import local_folder

    directory = local_folder(model_ref)
    model, tokenizer = load_weights(directory, precision=precision, device=device)
    engine = Engine(model, tokenizer, **options)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    embedder = Embedder(model, directory, max_length=engine.max_length)
    return engine, tokenizer, model_name(model_ref, directory), embedder
