"""Facts about this machine: cores, memory, bf16, compilers, torch build, GPUs, disk. Loads no torch."""

import csv
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from soma.base.artefact import json_hash, write_json

SAMPLE_SECONDS = 0.2
PROGRAMS = {
    # As torch.compile builds on a CPU: OpenMP, and Python's own headers for the binding.
    "c++": ("cpp", '#include <Python.h>\n#include <cmath>\nextern "C" double probe(double x) { return sqrt(x); }\n'),
    "c": ("c", "#include <math.h>\ndouble probe(double x) { return sqrt(x); }\nint main(void) { return 0; }\n"),
}
CANDIDATES = {"c++": ("CXX", "g++", "clang++", "c++"), "c": ("CC", "gcc", "clang", "cc")}


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found. `works` says whether it built a small program; if not, `error` is why."""

    path: str
    works: bool
    error: str = ""


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, read from its files."""

    version: str  # as installed: 2.13.0+cpu
    cuda: str | None  # CUDA version it was built for
    rocm: str | None

    @property
    def release(self) -> tuple[int, int]:
        """(2, 13)"""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """What a benchmark or a report says about where it ran."""

    system: str
    cpu: str
    cores: int  # that this process may use
    memory_bytes: int  # that this process may use
    bf16: bool  # native bf16 dot products
    python: str
    torch: TorchBuild | None
    gpus: tuple[Gpu, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def facts() -> Machine:
    """Facts that hold as long as the process runs."""
    return Machine(
        f"{platform.system()} {platform.release()}",
        cpu_model(),
        cores(),
        memory_limit(),
        native_bf16(),
        platform.python_version(),
        torch_build(),
        tuple(gpus()),
    )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.is_file() else ""


def cpu_model(cpuinfo: str | None = None) -> str:
    """The processor's name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo() if cpuinfo is None else cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def native_bf16(cpuinfo: str | None = None) -> bool:
    """Whether the CPU multiplies bf16 by itself: AVX512-BF16 or AMX on x86, BF16 on ARM.

    Without it bf16 on a CPU is emulated and slower than float32.
    """
    text = _cpuinfo() if cpuinfo is None else cpuinfo
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = {flag for line in lines for flag in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: its affinity mask, and a container's CPU quota rounded up."""
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    limits = [available]
    for folder in _cgroup_folders(root, "cpu"):
        if (folder / "cpu.max").is_file():  # v2: "200000 100000", or "max 100000"
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        elif (folder / "cpu.cfs_quota_us").is_file():  # v1: -1 is no limit
            quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
        else:
            continue
        if quota.strip() not in ("max", "-1"):
            limits.append(max(1, -(-int(quota) // int(period))))
    return min(limits)


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or a container's limit."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            path = folder / name
            if path.is_file() and (text := path.read_text().strip()) != "max":
                limits.append(int(text))
    return min(limits)


def memory_available(root: Path = Path("/")) -> int:
    """Bytes that can be taken now without swapping, as far as a container's limit allows."""
    free = psutil.virtual_memory().available
    for folder in _cgroup_folders(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (folder / limit).is_file() and (folder / used).is_file():
                text = (folder / limit).read_text().strip()
                if text != "max":
                    free = min(free, max(0, int(text) - int((folder / used).read_text())))
    return free


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The control group folders of this process and its parents, v2 and v1. Missing ones do no harm."""
    listing = root / "proc/self/cgroup"
    folders: list[Path] = []
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = base / path.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent == base or base in parent.parents)]
    return folders


def compiler(language: str) -> Compiler | None:
    """The first working compiler for "c" or "c++"; else the first found, with its error; None if there is none.

    Tried are $CC or $CXX and the usual names, as torch.compile does. A result is kept in the cache folder.
    """
    variable, *names = CANDIDATES[language]
    found = [path for name in [os.environ.get(variable, ""), *names] if name and (path := shutil.which(name))]
    tried = []
    for path in dict.fromkeys(found):
        tried.append(_tried(language, path))
        if tried[-1].works:
            return tried[-1]
    return tried[0] if tried else None


def _tried(language: str, path: str) -> Compiler:
    from soma.base.cache import cache_root

    real = Path(path).resolve()
    state = real.stat()
    include = sysconfig.get_path("include")
    key = json_hash([language, str(real), state.st_size, state.st_mtime_ns, include, PROGRAMS[language]])
    record = cache_root() / "compilers" / f"{key}.json"
    if os.path.isfile(record):  # Path's raises where the folder may not be looked into
        return Compiler(path, True)
    suffix, program = PROGRAMS[language]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"probe.{suffix}"
        source.write_text(program)
        openmp = [] if sys.platform == "darwin" or language == "c" else ["-fopenmp"]
        shared = ["-shared", "-fPIC", f"-I{include}", *openmp] if language == "c++" else []
        if sys.platform == "darwin" and language == "c++":
            shared += ["-undefined", "dynamic_lookup"]
        command = [path, *shared, str(source), "-o", str(Path(folder) / "probe.out"), "-lm"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Compiler(path, False, str(error))
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            return Compiler(path, False, lines[0][:300])
    with suppress(OSError):  # a home that cannot be written, a full disk: it is tried again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"language": language, "path": str(real)})
    return Compiler(path, True)


def torch_build() -> TorchBuild | None:
    """The installed torch, from its version.py: importing it would take a second. None if it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    names: dict[str, Any] = {}
    text = (Path(spec.origin).parent / "version.py").read_text()
    for name, value in re.findall(r"^(\w+)(?::[^=\n]+)?\s*=\s*(None|'[^']*')$", text, re.MULTILINE):
        names[name] = None if value == "None" else value.strip("'")
    return TorchBuild(names["__version__"], names.get("cuda"), names.get("hip"))


@cache
def gpus() -> list[Gpu]:
    """NVIDIA GPUs, asked of nvidia-smi; none where it is not there or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_gpus(result.stdout) if result.returncode == 0 else []


def read_gpus(text: str) -> list[Gpu]:
    """nvidia-smi's CSV (name, MiB, driver) → GPUs."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) == 3]
    return [Gpu(name, int(float(mib)) << 20, driver) for name, mib, driver in rows if re.fullmatch(r"[\d.]+", mib)]


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or where it would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class PeakMemory:
    """Measures the peak of resident memory of this process and its children inside a `with`.

    `bytes` is the largest sum of resident set sizes seen (every 0.2 s, and at both ends). Pages that processes share
    are counted once per process, so it is an upper bound where a stage forks.
    """

    def __init__(self, interval: float = SAMPLE_SECONDS) -> None:
        self.bytes = 0
        self.interval = interval
        self.process = psutil.Process()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._look()
        self.thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()

    def _sample(self) -> None:
        while not self.over.wait(self.interval):
            self._look()

    def _look(self) -> None:
        total = self.process.memory_info().rss
        for child in self.process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended between the listing and the look
        self.bytes = max(self.bytes, total)
