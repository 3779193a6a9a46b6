"""V2 infer: JSON against binary REST against gRPC (bytes on the wire, latency), and ours against MLServer.

    python benchmarks/v2_infer.py --json          # about 5 minutes; makes a virtual environment with mlserver once

The model returns its rows, so what is measured is the protocol. Bytes are counted by a relay that one request goes
through; latency is the median of requests one after another, without the relay. Against MLServer: requests a second of
16 clients, and requests per second of the server's own processor time, which does not depend on what the clients take.
MLServer runs without its worker processes (`parallel_workers: 0`), which is faster for a model that costs nothing.
"""

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import psutil
from common import ROOT, Case, compare, finish, make_case, parser
from peers.v2_load import binary_body, grpc_body, json_body

PEERS = ROOT / "benchmarks" / "peers"
SIZES = {"1 kB": 256, "16 kB": 4096, "256 kB": 65_536, "4 MB": 1_048_576}
REQUESTS = {"1 kB": 200, "16 kB": 100, "256 kB": 20, "4 MB": 4}
GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SETTINGS = {"debug": False, "parallel_workers": 0, "host": "127.0.0.1", "metrics_endpoint": None}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def process(command: list[str], folder: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from ready to the end of the `with`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{Path(command[0]).name}-{free_port()}.log", "wb") as log:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not is_ready(address):
                if running.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command} did not come up:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.2)
            yield running
        finally:
            running.terminate()
            running.wait(30)


def is_ready(address: str) -> bool:
    link = http.client.HTTPConnection(address, timeout=5)
    try:
        link.request("GET", "/v2/models/echo/ready")
        return link.getresponse().status == 200
    except OSError:
        return False
    finally:
        link.close()


class Relay:
    """Passes connections on and counts the bytes of both directions."""

    def __init__(self, target: str) -> None:
        host, port = target.split(":")
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.count = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(self.target)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.count += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other side has closed both


def rest_request(address: str, columns: int, *, binary: bool) -> Callable[[], None]:
    """One request with what a client does around it: encode, send, decode."""
    import numpy as np

    link = http.client.HTTPConnection(address, timeout=120)

    last = time.monotonic()

    def ask() -> None:
        nonlocal last
        body, headers = binary_body(columns) if binary else (json_body(columns), {"Content-Type": "application/json"})
        if time.monotonic() - last > 3:  # encoding took so long that the server may have closed the idle connection
            link.close()
        link.request("POST", "/v2/models/echo/infer", body, headers)
        answer = link.getresponse()
        data = answer.read()
        if binary:
            got = np.frombuffer(data[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32)
        else:
            got = np.array(json.loads(data)["outputs"][0]["data"], np.float32)
        assert got.size == columns
        last = time.monotonic()

    return ask


def grpc_request(address: str, columns: int) -> Callable[[], None]:
    import numpy as np

    from soma.serve.v2.messages import pb

    channel = grpc.insecure_channel(address, options=GRPC_OPTIONS)
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask() -> None:
        answer = pb.ModelInferResponse.FromString(call(grpc_body(columns, typed=False)))
        assert np.frombuffer(answer.raw_output_contents[0], np.float32).size == columns

    return ask


def latency(make: Callable[[str], Callable[[], None]], address: str, count: int) -> float:
    """Median milliseconds of requests one after another, on a connection that is open."""
    ask = make(address)
    ask()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        ask()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def wire_bytes(make: Callable[[str], Callable[[], None]], target: str) -> int:
    """Bytes of the second request on a connection, so that its opening does not count."""
    relay = Relay(target)
    ask = make(relay.address)
    ask()
    time.sleep(0.3)  # what follows an answer on its own (HTTP/2 window updates) is counted with the first
    relay.count = 0
    ask()
    time.sleep(0.3)
    return relay.count


def protocols(http_address: str, grpc_address: str, rounds: int, warmup: int) -> list[Case]:
    """gRPC (ours) beside JSON and binary REST, of the same server."""
    cases: list[Case] = []
    for size, columns in SIZES.items():
        makers: dict[str, tuple[Callable[[str], Callable[[], None]], str]] = {
            "gRPC": (lambda address, columns=columns: grpc_request(address, columns), grpc_address),
            "JSON": (lambda address, columns=columns: rest_request(address, columns, binary=False), http_address),
            "binary REST": (lambda address, columns=columns: rest_request(address, columns, binary=True), http_address),
        }  # fmt: skip
        counted = {name: wire_bytes(make, target) for name, (make, target) in makers.items()}
        runs = {name: partial(latency, make, target, REQUESTS[size]) for name, (make, target) in makers.items()}
        mine, alone = runs.pop("gRPC"), [counted.pop("gRPC")]
        for peer, theirs in counted.items():
            words = f"{size}: bytes on the wire, gRPC"
            cases.append(make_case(words, "bytes", alone, peer, [theirs], higher_is_better=False))
        words = f"{size}: latency, gRPC"
        cases += compare(words, "ms", mine, runs, rounds=rounds, warmup=warmup, higher_is_better=False)
    return cases


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with mlserver, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing mlserver into {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "mlserver==1.7.1"],
                       check=True)  # fmt: skip
    return python


def mlserver_files(folder: Path, http_port: int, grpc_port: int) -> None:
    (folder / "settings.json").write_text(json.dumps({**SETTINGS, "http_port": http_port, "grpc_port": grpc_port}))
    (folder / "model-settings.json").write_text(json.dumps({"name": "echo", "implementation": "v2_mlserver.Echo"}))
    (folder / "v2_mlserver.py").write_text((PEERS / "v2_mlserver.py").read_text())


class Loaded:
    """A server under load: requests a second, and per second of its processor time."""

    def __init__(
        self, running: "subprocess.Popen[bytes]", http_address: str, grpc_address: str, seconds: float
    ) -> None:
        self.process = psutil.Process(running.pid)
        self.http, self.grpc, self.seconds = http_address, grpc_address, seconds
        self.per_cpu: dict[tuple[str, int], list[float]] = {}

    def cpu(self) -> float:
        every = [self.process, *self.process.children(recursive=True)]
        return sum(sum(each.cpu_times()[:2]) for each in every)

    def run(self, kind: str, columns: int) -> float:
        """Requests a second."""
        address = self.grpc if kind.startswith("grpc") else self.http
        before = self.cpu()
        command = [sys.executable, str(PEERS / "v2_load.py"), kind, address, str(columns), str(self.seconds), "16"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        rate = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
        self.per_cpu.setdefault((kind, columns), []).append(rate * self.seconds / (self.cpu() - before))
        return rate


def against_mlserver(ours: Loaded, theirs: Loaded, rounds: int, warmup: int) -> list[Case]:
    cases: list[Case] = []
    for size in ("1 kB", "256 kB"):
        columns = SIZES[size]
        for kind, words in (("json", "REST, JSON"), ("grpc", "gRPC, raw"), ("grpc_typed", "gRPC, fp32_contents")):
            case = f"{size}: {words}"
            cases += compare(
                f"{case}, 16 clients", "requests/s", lambda kind=kind, columns=columns: ours.run(kind, columns),
                {"mlserver": lambda kind=kind, columns=columns: theirs.run(kind, columns)}, bars={"mlserver": 2.0},
                rounds=rounds, warmup=warmup,
            )  # fmt: skip
            mine, others = (each.per_cpu[kind, columns][warmup:] for each in (ours, theirs))
            cases.append(make_case(case, "requests/CPU-second", mine, "mlserver", others, 2.0))
    return cases


def main() -> None:
    arguments = parser("v2_infer", __doc__.splitlines()[0], rounds=3)
    arguments.add_argument("--seconds", type=float, default=3.0, help="of each load (default 3)")
    arguments.add_argument("--mlserver", type=Path, default=ROOT / ".venv" / "mlserver", help="virtual environment")
    given = arguments.parse_args()
    python = environment(given.mlserver.absolute())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ports = [free_port() for _ in range(4)]
        mlserver_files(folder, *ports[2:])
        ours, ours_grpc, theirs, theirs_grpc = (f"127.0.0.1:{port}" for port in ports)
        command = [sys.executable, str(PEERS / "v2_ours.py"), str(ports[0]), str(ports[1])]
        with process(command, folder, ours) as our_process:
            cases = protocols(ours, ours_grpc, given.rounds, given.warmup)
            with process([str(python.parent / "mlserver"), "start", "."], folder, theirs) as their_process:
                cases += against_mlserver(
                    Loaded(our_process, ours, ours_grpc, given.seconds),
                    Loaded(their_process, theirs, theirs_grpc, given.seconds), given.rounds, given.warmup,
                )  # fmt: skip
    finish("v2_infer", given, cases, ["grpcio", "fastapi", "uvicorn", "protobuf", "numpy"])


if __name__ == "__main__":
    main()
