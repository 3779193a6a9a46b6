"""Running the service: in this process until it is told to stop, or as a subprocess for the length of a `with`."""

import errno
import ipaddress
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from soma.base import progress
from soma.base.errors import UserError
from soma.engine.launch import Launched, launch
from soma.serve.addresses import Addresses, TrustedProxies
from soma.serve.admin.beside import Beside
from soma.serve.calls import Gates
from soma.serve.limits.config import read_limits
from soma.serve.limits.gate import LimitsGate
from soma.serve.requestlog.config import request_log_config
from soma.serve.slow_headers import HeaderTimeout
from soma.serve.templates.request import load as load_prompts
from soma.serve.v2.config import ModelsFile, add_models
from soma.serve.v2.repository import Repository
from soma.serve.yaml_file import read_as

if TYPE_CHECKING:
    from soma.engine.embed import Embedder
    from soma.model.tokenizer import Tokenizer
    from soma.serve.app import AnyEngine
    from soma.serve.keys.door import Guard
    from soma.serve.v2.grpc_server import GrpcServer

GRACE = 30.0  # seconds that running answers get after SIGTERM


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM first lets running answers end while new requests get 503; a second signal ends it all."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, grace: float, ready: Callable[[], None],
        make_grpc: "Callable[[], GrpcServer] | None" = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.make_grpc = make_grpc
        self.repository: Repository | None = app.state.v2.repository if hasattr(app.state, "v2") else None
        self.grpc: GrpcServer | None = None
        self.service, self.grace, self.ready = app.state.service, grace, ready
        self.deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.make_grpc is not None:
            self.grpc = self.make_grpc()
            await self.grpc.start()
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.grpc is not None:
            await self.grpc.stop(0)  # who still runs has had its time
        if self.repository is not None:
            self.repository.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True
        self.deadline = time.monotonic() + self.grace

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and (self.service.open == 0 or time.monotonic() > (self.deadline or 0)):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    model_ref: str | Path, host: str = "127.0.0.1", port: int = 8000, *, name: str | None = None,
    allow_public: bool = False, precision: str = "auto", device: str = "auto", max_length: int | None = None,
    max_running: int = 64, max_waiting: int = 256, weights: str | None = None, replicas: int = 1,
    cache_dtype: str = "auto", speculate: str | None = None, draft_tokens: int | None = None, tensor_parallel: int = 1,
    pipeline_parallel: int = 1, grace: float = GRACE, in_process: bool = False,
    adapters: Mapping[str, str] | None = None, allow_adapter_loading: bool = False, keys: str | None = None,
    grpc_port: int | None = None, grpc_compression: str = "none", models: str | Path | None = None,
    allow_model_control: bool = False, limits: Path | None = None, trusted_proxies: Sequence[str] = (),
    prices: str | None = None, durability: str = "process", admin_port: int | None = None,
    admin_host: str = "127.0.0.1",
    prompts: str | None = None, request_log: str | Path | None = None, request_log_sample: float = 1.0,
    request_log_redact: bool = True, request_log_seconds: float = 60.0,
    index: str | None = None, rerank: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve a model until SIGTERM or SIGINT.

    port 0 takes a free one. `keys`: the database of keys (`soma keys`), which requests are then asked for, and of the
    ledger; `prices`: what tokens cost (`soma.serve.ledger.prices`); `durability`: what the ledger's row of a call
    outlives from its start, `process` or `power` (`soma.serve.ledger.gate`). `admin_port`, `admin_host`: where the
    admin API and page listen, which ask for keys of their own.
    `allow_public` lets `host` be reachable from other machines without keys: whoever reaches the port uses the model.
    `limits`: a file of rate limits (`soma.serve.limits`). `trusted_proxies`: addresses and networks whose
    `X-Forwarded-For` is believed.
    `grace`: seconds that running answers get at the end. `replicas`: engine processes
    with a copy of the model each, behind this one front. `tensor_parallel`, `pipeline_parallel`: ranks that split each
    layer, times stages of layers, for each copy (`soma.engine.parallel`). `cache_dtype`, `speculate`,
    `draft_tokens`: see `Engine`.
    `in_process`: no process of its own for the engine (one process to debug; a crash of the engine ends the service).
    `adapters`: names and PEFT folders of adapters, chosen as models by those names; with `allow_adapter_loading`
    clients may load and unload others. `grpc_port`: the Open Inference Protocol over gRPC as well, on the same host;
    `grpc_compression` of its answers. `models`: a file with further models for that protocol (`soma.serve.v2.config`),
    which clients may load and unload with `allow_model_control`. `prompts`: a folder of prompts that requests may name
    (`soma.serve.templates`). `request_log`: a folder for what is asked and answered (`soma.serve.requestlog`), of which
    the share `request_log_sample` is kept, personal data masked unless `request_log_redact` is false, a file for
    `request_log_seconds` at most. `ready` is called with the base URL once requests are answered; without it a note
    says so.
    `index`: of `soma index`, a folder or the URL of a Qdrant server: chats are answered from it; `rerank`: URL#MODEL of
    a route that sorts what it finds. Raises UserError: no such model or index, a public host
    without `keys` or `allow_public`, a port in use, no replicas, an
    adapter or model that cannot be loaded, limits that make no sense, a database that cannot be opened.
    """
    sizes = {"replicas": replicas, "tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    for option, size in sizes.items():
        if size < 1 or (in_process and size > 1):
            raise UserError(f"{option} {size}: expected 1 or more, and with in_process 1")
    world = tensor_parallel * pipeline_parallel
    more = {} if world == 1 else {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    check_host(host, allow_public=allow_public or keys is not None)
    proxies = TrustedProxies(trusted_proxies)
    limiter = None if limits is None else LimitsGate(read_limits(Path(limits)))
    log_config = request_log_config(
        request_log, sample=request_log_sample, redact=request_log_redact, rotate=request_log_seconds
    )  # fmt: skip
    listener = listen(host, port)
    gateway = kept = knowledge = None
    repository = Repository()
    try:
        if index is not None:
            from soma.serve.retrieval.routes import open_knowledge

            knowledge = open_knowledge(index, rerank)
        elif rerank is not None:
            raise UserError("rerank sorts what an index finds; say which (--index)")
        if models is not None:
            add_models(repository, read_as(ModelsFile, Path(models)), Path(models).parent)
        if (prices is not None or admin_port is not None) and keys is None:
            raise UserError("prices and the admin API go with the database of keys; say which (--keys DATABASE)")
        if keys is not None:
            from soma.serve.gateway import Gateway

            gateway = Gateway(keys, prices, durability)
        if log_config is not None:
            from soma.serve.requestlog.gate import RequestLog

            kept = RequestLog(log_config)
        launched = [] if in_process else [launch(replicas * world) for _ in range(replicas)]
        from soma.serve.app import create_app  # heavy: the engine process imports its parts meanwhile

        engine, tokenizer, own_name, embedder = start_engine(
            model_ref, launched, precision=precision, device=device, max_length=max_length,
            max_running=max_running, max_waiting=max_waiting, weights=weights, cache_dtype=cache_dtype,
            speculate=speculate,
            **({} if draft_tokens is None else {"draft_tokens": draft_tokens}), adapters=dict(adapters or {}), **more,
        )  # fmt: skip
        try:
            if (name or own_name) in engine.adapter_folders:
                raise UserError(f"adapter {name or own_name!r}: this is the name of the base model")
            if gateway is not None:
                names = (name or own_name, *engine.adapter_folders, *(entry.name for entry in repository))
                gateway.check_models(names)
            limiters = [] if limiter is None else [limiter]
            library = load_prompts(prompts, tokenizer)
            last = [] if kept is None else [kept]
            app = create_app(
                engine, tokenizer, name or own_name, embedder=embedder, allow_adapter_loading=allow_adapter_loading,
                repository=repository, allow_model_control=allow_model_control, prompts=library,
                gates=Gates([*(gateway.gates(limiters) if gateway else limiters), *last]),
                guard=gateway.guard if gateway else None, request_log=kept,
                knowledge=knowledge,
            )  # fmt: skip
            app.add_middleware(Addresses, proxies=proxies)  # before the door, which counts failures by address
            if limiter is not None:
                limiter.register(app.state.service.metrics.registry)
            url = base_url(listener)
            config = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=2,
                lifespan="off",
                http=HeaderTimeout,
            )
            announce = ready or (lambda url: progress.current().note(f"{name or own_name} is served at {url}"))
            make_grpc = None
            if grpc_port is not None:
                make_grpc = grpc_maker(
                    app, host, grpc_port, gateway.guard if gateway else None, proxies, grpc_compression
                )  # fmt: skip
            if gateway is not None and admin_port is not None:
                beside = Beside(limiter, kept, chat_url=url if tokenizer.has_chat_template else None)
                progress.current().note(f"the admin page is at {gateway.start_admin(admin_host, admin_port, beside)}")
            Server(config, app, grace, lambda: announce(url), make_grpc).run(sockets=[listener])
        finally:
            repository.close()
            engine.close()
    finally:
        if knowledge is not None:
            knowledge.close()
        if kept is not None:
            kept.close()
        if gateway is not None:
            gateway.close()
        listener.close()


def grpc_maker(
    app: FastAPI, host: str, port: int, guard: "Guard | None", proxies: TrustedProxies, compression: str
) -> "Callable[[], GrpcServer]":  # fmt: skip
    """What makes the gRPC listener, inside the event loop. Raises UserError where gRPC is not installed."""
    try:
        from soma.serve.v2.grpc_server import GrpcServer
    except ImportError as error:
        raise UserError(f"gRPC needs more packages ({error}): pip install 'somacube[gateway]'") from error
    return lambda: GrpcServer(app.state.v2, host, port, guard=guard, proxies=proxies, compression=compression)


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


def check_host(host: str, *, allow_public: bool) -> None:
    """Refuse to listen beyond this machine unless told to. Raises UserError."""
    if allow_public or host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UserError(
            f"host {host}: other machines could reach the service, and it asks nobody for a key. Give it keys (--keys "
            "DATABASE, `soma keys create`), use 127.0.0.1, or say allow_public (--allow-public) if everybody who "
            "reaches the port may use the model"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError that says what to do if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: expected 0 to 65535 (0 takes a free one)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise UserError(f"host {host}: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: stop what listens there, or take another one (--port)"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs privileges: take one above 1023 (--port)") from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def base_url(listener: socket.socket) -> str:
    """http://host:port of a socket, with an address that a client can use."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(options: str) -> None:
    """What the subprocess of `running_service` runs: `serve` with options from JSON, the URL on standard output."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        serve(**json.loads(options), ready=lambda url: print(url, flush=True))
    except UserError as error:
        sys.exit(str(error))


@contextmanager
def running_service(
    model_ref: str | Path, *, log: Path | None = None, timeout: float = 120.0, **options: Any
) -> Iterator[str]:
    """The service on `model_ref` in a subprocess, from healthy to the end of the `with`; yields its base URL.

    log: where the service's own words go. options: those of `serve`; a free port unless given. Raises UserError with
    the service's words if it does not come up within `timeout` seconds.
    """
    arguments = json.dumps({"model_ref": str(model_ref), "port": 0, **options})
    code = "import sys; from soma.serve.server import main; main(sys.argv[1])"
    with open(log, "w+b") if log else tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            yield _wait_healthy(process, said, timeout)
        finally:
            process.terminate()
            try:
                process.wait(timeout=options.get("grace", GRACE) + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _wait_healthy(process: "subprocess.Popen[bytes]", said: IO[bytes], timeout: float) -> str:
    """The URL that the service prints, once its health check answers."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    os.set_blocking(process.stdout.fileno(), False)
    url = ""
    while time.monotonic() < deadline and process.poll() is None:
        url = url or (process.stdout.readline() or b"").decode().strip()
        if url and healthy(url):
            return url
        time.sleep(0.05)
    said.seek(0)
    words = said.read().decode(errors="replace").strip()[-2000:] or "it said nothing"
    what = f"is not up after {timeout:g} s" if process.poll() is None else f"ended with status {process.returncode}"
    raise UserError(f"the service {what}: {words}")


def healthy(url: str) -> bool:
    """Whether the service at `url` answers its health check."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
