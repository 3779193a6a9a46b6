"""The gateway's own cost: what `soma gateway` adds to an upstream's latency, and requests for each second of its CPU,
with keys, limits and ledger on, beside LiteLLM's proxy (`litellm[proxy]<1.107` in an environment that this makes).

    python benchmarks/gateway.py --json

LiteLLM has a master key alone: its own keys need PostgreSQL and a Prisma engine that is downloaded, and its budgets and
limits go with them, so it does less. Gateway and proxy run in one process each, on one core; the upstream (a few lines
of asyncio that say the same at once) and the clients run on the others. Latency is counted from the moment at which a
request was due.
"""

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import yaml
from common import Case, compare, finish, make_case, parser

EVENTS = 16
CONNECTIONS = 32
ALLOWED_MS = 3.0
USAGE = {"prompt_tokens": 12, "completion_tokens": EVENTS, "total_tokens": 12 + EVENTS}
CHAT = {"model": "m", "max_tokens": 64, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


# ------------------------------------------------------------------------------------------------------- The upstream


def answers() -> tuple[bytes, bytes]:
    """What the upstream says: whole, and as a stream."""
    head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Paris. " * EVENTS}}
    whole = json.dumps({**head, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()
    chunk = {**head, "object": "chat.completion.chunk"}
    parts = [
        {**chunk, "choices": [{"index": 0, "delta": {"content": "Paris. "}, "finish_reason": None}], "usage": None}
        for _ in range(EVENTS)
    ]
    parts.append({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
    parts.append({**chunk, "choices": [], "usage": USAGE})
    said = [b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts] + [b"data: [DONE]\n\n"]
    stream = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in said) + b"0\r\n\r\n"
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole,
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + stream,
    )


class Upstream(asyncio.Protocol):
    """One connection: a request with a Content-Length in, an answer out."""

    whole, stream = answers()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.data) < end + 4 + length:
                return
            body, self.data = self.data[end + 4 : end + 4 + length], self.data[end + 4 + length :]
            streams = b'"stream":true' in body.replace(b" ", b"")
            self.transport.write(self.stream if streams else self.whole)  # type: ignore[attr-defined]


async def run_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# -------------------------------------------------------------------------------------------------------- The clients


class Client(asyncio.Protocol):
    """One connection that asks and reads to the end of the answer."""

    def __init__(self, request: bytes, stream: bool) -> None:
        self.request, self.end_mark = request, b"\r\n0\r\n\r\n" if stream else None
        self.answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    async def ask(self) -> None:
        self.data, self.answered = b"", asyncio.get_running_loop().create_future()
        self.transport.write(self.request)  # type: ignore[attr-defined]
        await self.answered

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.answered is None or self.answered.done():
            return
        if not self.data.startswith(b"HTTP/1.1 200") and len(self.data) > 12:
            self.answered.set_exception(RuntimeError(self.data[:300].decode(errors="replace")))
        elif self.end_mark is not None:
            if self.data.endswith(self.end_mark):
                self.answered.set_result(None)
        elif (end := self.data.find(b"\r\n\r\n")) >= 0:
            length = int(self.data[:end].lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(self.data) >= end + 4 + length:
                self.answered.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(RuntimeError("the connection broke"))


async def run_clients(port: int, key: str, stream: bool, seconds: float, rate: float) -> dict[str, object]:
    """Closed loop over all connections if `rate` is 0, else requests due `rate` times a second."""
    body = json.dumps({**CHAT, **({"stream": True} if stream else {})}).encode()
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(request, stream), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    await asyncio.gather(*(client.ask() for client in clients))
    times: list[float] = []
    begun = loop.time()
    turn = iter(range(1 << 40))

    async def one(client: Client) -> None:
        while True:
            due = begun + next(turn) / rate if rate else loop.time()
            if due >= begun + seconds:
                return
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await client.ask()
            times.append(loop.time() - due)

    await asyncio.gather(*map(one, clients))
    return {"count": len(times), "seconds": loop.time() - begun, "ms": sorted(1000 * each for each in times)}


# ------------------------------------------------------------------------------------------------------ The processes


def cores() -> tuple[list[int], list[int]]:
    """(where the gateways run, where everything else does)."""
    all_ = sorted(os.sched_getaffinity(0))
    return all_[:1], all_[1:] or all_[:1]


@contextmanager
def process(command: list[str], own: bool, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process on its cores, ended afterwards with all that it started."""
    made = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment},
        preexec_fn=lambda: os.sched_setaffinity(0, cores()[0 if own else 1]),
    )  # fmt: skip
    try:
        yield made
    finally:
        with suppress(psutil.NoSuchProcess):
            for each in [*psutil.Process(made.pid).children(recursive=True), psutil.Process(made.pid)]:
                each.kill()
        made.wait()


def cpu_seconds(pid: int) -> float:
    """Of a process and its children, since they began."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(each.cpu_times().user + each.cpu_times().system for each in tree)


def wait_up(url: str, running: subprocess.Popen[str], seconds: float = 120) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.poll() is None:
        try:
            direct.open(url, timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{url} did not come up")


class Target:
    """What clients ask: the upstream itself, our gateway, or LiteLLM."""

    def __init__(self, port: int, key: str, pid: int) -> None:
        self.port, self.key, self.pid = port, key, pid

    def load(self, stream: bool, seconds: float, rate: float = 0.0) -> dict[str, object]:
        """Let clients ask; what they saw, and `cpu`, the seconds that it took of the target."""
        options = json.dumps([self.port, self.key, stream, seconds, rate])
        before = cpu_seconds(self.pid)
        with process([sys.executable, __file__, "--as-clients", options], own=False) as clients:
            said, _ = clients.communicate()
            if clients.returncode:
                sys.exit("the clients failed")
        return {**json.loads(said), "cpu": cpu_seconds(self.pid) - before}


def our_gateway(stack: ExitStack, folder: Path, upstream: int) -> Target:
    """`soma gateway` with a key, prices, a ledger, and four limits that hold nobody back."""
    from soma.serve.database import Database
    from soma.serve.keys.store import KeyStore

    database = folder / "keys.db"
    _, secret = KeyStore(Database(str(database), create=True)).create("benchmark", team="benchmark")
    (folder / "prices.yaml").write_text("currency: USD\nmodels:\n  m: {prompt: 0.15, completion: 0.60}\n")
    rules = [
        {"name": "rpm", "limit": 10**7, "window": "1m", "per": ["key"]},
        {"name": "tpm", "limit": 10**9, "window": "1m", "per": ["team"], "unit": "tokens"},
        {"name": "all", "limit": 10**8, "window": "1h", "algorithm": "sliding_window_counter"},
        {"name": "at-once", "limit": 10_000, "per": ["key"], "algorithm": "concurrency"},
    ]
    config = {
        "keys": str(database), "prices": str(folder / "prices.yaml"), "limits": {"rules": rules},
        "models": {"m": {"upstreams": [{"url": f"http://127.0.0.1:{upstream}/v1"}], "health": None}},
    }  # fmt: skip
    (folder / "gateway.yaml").write_text(yaml.safe_dump(config))
    code = (
        "import sys; from pathlib import Path; from soma.serve.upstreams.server import serve_gateway; "
        "serve_gateway(Path(sys.argv[1]), port=0, ready=lambda url: print(url, flush=True))"
    )
    root = str(Path(__file__).resolve().parent.parent)
    running = stack.enter_context(
        process([sys.executable, "-c", code, str(folder / "gateway.yaml")], own=True, PYTHONPATH=root)
    )
    assert running.stdout is not None
    port = int(running.stdout.readline().rpartition(":")[2])
    return Target(port, secret.text, running.pid)


def litellm(stack: ExitStack, folder: Path, upstream: int, python: Path) -> Target:
    """LiteLLM's proxy with a master key."""
    key = f"sk-{secrets.token_hex(24)}"
    model = {"model": "openai/m", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "m", "litellm_params": model}], "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False},
    }  # fmt: skip
    (folder / "litellm.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        str(python),
        "-c",
        "from litellm import run_server; run_server()",
        "--config",
        str(folder / "litellm.yaml"),
        "--host",
        "127.0.0.1",
    ]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "*"}
    running = stack.enter_context(process([*command, "--port", str(port)], own=True, **environment))
    wait_up(f"http://127.0.0.1:{port}/health/liveliness", running)
    return Target(port, key, running.pid)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(given: Path | None) -> Path:
    """The Python that has LiteLLM, in an environment made for it."""
    if given is not None:
        return given
    folder = Path(__file__).resolve().parent.parent / ".venv" / "litellm"
    python = folder / "bin" / "python"
    if not (stamp := folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "litellm[proxy]<1.107"], check=True)
        stamp.touch()
    return python


# ----------------------------------------------------------------------------------------------------- What is measured


def per_cpu_second(target: Target, stream: bool, seconds: float) -> float:
    """Requests for each second of the target's CPU, all connections busy."""
    made = target.load(stream, seconds)
    return float(made["count"]) / float(made["cpu"])  # type: ignore[arg-type]


def added(target: Target, direct: Target, rate: float, seconds: float) -> tuple[float, float, float]:
    """ms that the target adds at p50, p95, p99, both asked at one rate."""
    through, straight = (each.load(False, seconds, rate)["ms"] for each in (target, direct))
    return tuple(quantile(through, q) - quantile(straight, q) for q in (0.5, 0.95, 0.99))  # type: ignore[return-value]


def quantile(ordered: object, q: float) -> float:
    assert isinstance(ordered, list)
    return float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])


def measure(arguments: argparse.Namespace) -> list[Case]:
    cases: list[Case] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(process([sys.executable, __file__, "--as-upstream"], own=False))
        assert upstream.stdout is not None
        direct = Target(int(upstream.stdout.readline()), "none", upstream.pid)
        ours = our_gateway(stack, folder, direct.port)
        peer = litellm(stack, folder, direct.port, environment_of(arguments.litellm))
        for stream in (False, True):
            cases += compare(
                f"chat, {f'a stream of {EVENTS} events' if stream else 'whole'}", "requests per CPU-second",
                lambda stream=stream: per_cpu_second(ours, stream, arguments.seconds),
                {"litellm, master key only": lambda stream=stream: per_cpu_second(peer, stream, arguments.seconds)},
                bars={"litellm, master key only": 10.0}, rounds=arguments.rounds, warmup=arguments.warmup,
            )  # fmt: skip
        peaks = []
        for target in (ours, peer):
            made = target.load(False, arguments.seconds)
            peaks.append(float(made["count"]) / float(made["seconds"]))  # type: ignore[arg-type]
        print(f"peaks, requests/s on one core: ours {peaks[0]:.0f}, litellm {peaks[1]:.0f}", file=sys.stderr)
        rows = [added(ours, direct, peaks[0] / 2, arguments.seconds) for _ in range(arguments.rounds)]
        theirs = [added(peer, direct, peaks[1] / 2, arguments.seconds) for _ in range(arguments.rounds)]
        for place, name in enumerate(("p50", "p95", "p99")):
            mine = [row[place] for row in rows]
            what = f"added latency {name} at half of its own peak"
            cases.append(make_case(what, "ms", mine, "litellm, master key only", [row[place] for row in theirs],
                                   higher_is_better=False))  # fmt: skip
            if name == "p95":
                cases.append(make_case(what, "ms", mine, f"{ALLOWED_MS:g} ms allowed", [ALLOWED_MS] * len(mine), 1.0,
                                       higher_is_better=False))  # fmt: skip
        print(f"added latency was measured at {peaks[0] / 2:.0f} requests/s for ours, {peaks[1] / 2:.0f} for litellm")
    return cases


def main() -> None:
    if sys.argv[1:2] in (["--as-upstream"], ["--as-clients"]):
        import uvloop

        if sys.argv[1] == "--as-upstream":
            uvloop.run(run_upstream())
        else:
            print(json.dumps(uvloop.run(run_clients(*json.loads(sys.argv[2])))))
        return
    options = parser("gateway", __doc__.partition("\n\n")[0], rounds=3)
    options.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default 5)")
    options.add_argument("--litellm", type=Path, metavar="PYTHON", help="a Python that has litellm[proxy] already")
    arguments = options.parse_args()
    finish("gateway", arguments, measure(arguments), packages=["aiohttp", "uvicorn", "httptools", "uvloop"])


if __name__ == "__main__":
    main()
