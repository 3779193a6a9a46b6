"""Facts about the machine, from made-up ones where this one cannot show them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soma.base import machine
from soma.base.machine import Gpu, PeakMemory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path / "cache"))


def group(root: Path, listing: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(listing)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine() -> None:
    found = machine.facts()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_bytes >= machine.memory_available() > 0
    assert found.cpu
    assert found.describe()["python"] == sys.version.split()[0]


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4)])
def test_cores_under_cgroup_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    group(tmp_path, "0::/a/b\n", a__cpu_DOT_max=quota, a__b__cpu_DOT_max="max 100000")
    assert machine.cores(tmp_path) == cores


def test_cores_under_cgroup_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    files = {"cpu__a__cpu_DOT_cfs_quota_us": "300000", "cpu__a__cpu_DOT_cfs_period_us": "100000\n"}
    group(tmp_path, "4:cpu:/a\n3:memory:/a\n", **files)
    assert machine.cores(tmp_path) == 3


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert machine.cores(tmp_path) == 1


def test_memory_under_cgroups(tmp_path: Path) -> None:
    v2 = group(tmp_path / "2", "0::/a\n", a__memory_DOT_max="1000000", a__memory_DOT_current="400000")
    assert machine.memory_limit(v2) == 1_000_000
    assert machine.memory_available(v2) == 600_000
    v1 = group(tmp_path / "1", "3:memory:/a\n", memory__a__memory_DOT_limit_in_bytes="2000000")
    assert machine.memory_limit(v1) == 2_000_000
    free = group(tmp_path / "0", "0::/\n", memory_DOT_max="max")
    assert machine.memory_limit(free) == machine.memory_limit()


def test_native_bf16() -> None:
    assert machine.native_bf16("flags\t\t: fpu avx512_bf16 sse\n")
    assert machine.native_bf16("Features\t: fp asimd bf16 i8mm\n")
    assert not machine.native_bf16("flags\t\t: fpu avx512f avx512_bf16x\n")
    assert machine.cpu_model("processor: 0\nmodel name\t: Some CPU @ 3 GHz\n") == "Some CPU @ 3 GHz"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_does_not_work_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler("c++") is None
    path = script(tmp_path / "g++", "echo 'fatal error: Python.h: No such file' >&2; exit 1")
    found = machine.compiler("c++")
    assert found == machine.Compiler(path, False, "fatal error: Python.h: No such file")
    works = script(tmp_path / "clang++", "exit 0")
    assert machine.compiler("c++") == machine.Compiler(works, True)


def test_a_compiler_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", script(tmp_path / "my++", f"echo called >> {log}"))
    assert machine.compiler("c++") == machine.compiler("c++") == machine.Compiler(str(tmp_path / "my++"), True)
    assert log.read_text() == "called\n"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMA_CACHE", str(Path(__file__) / "cache"))
    monkeypatch.setenv("CXX", script(tmp_path / "my++", "true"))
    assert machine.compiler("c++") == machine.Compiler(str(tmp_path / "my++"), True)


def test_torch_is_read_without_importing_it() -> None:
    build = machine.torch_build()
    assert build is not None
    import torch

    assert (build.version, build.cuda) == (torch.__version__, torch.version.cuda)
    assert build.release == tuple(int(part) for part in torch.__version__.split(".")[:2])
    program = "import sys; from soma.base import machine; machine.facts(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_gpus() -> None:
    text = "NVIDIA H100 80GB HBM3, 81559, 550.54\nNVIDIA X, [N/A], 550.54\n"
    assert machine.read_gpus(text) == [Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "550.54")]
    assert machine.read_gpus("No devices were found\n") == []


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "a" / "b") > 0


def wait_for_growth(memory: PeakMemory, idle: PeakMemory, size: float) -> None:
    """Until its thread has seen so many bytes more, or has had a minute to."""
    deadline = time.monotonic() + 60
    while memory.bytes - idle.bytes <= size and time.monotonic() < deadline:
        time.sleep(0.01)


def test_peak_memory_sees_what_was_freed_again() -> None:
    size = 200 << 20
    with PeakMemory(interval=0.01) as idle:
        pass
    with PeakMemory(interval=0.01) as memory:
        block = bytearray(b"x") * size
        wait_for_growth(memory, idle, 0.8 * size)
        del block
    assert memory.bytes - idle.bytes > 0.8 * size


def test_peak_memory_counts_children() -> None:
    program = "import time; block = bytearray(b'x') * (150 << 20); print('ready', flush=True); time.sleep(600)"
    with PeakMemory(interval=0.01) as idle:
        pass
    with PeakMemory(interval=0.01) as memory:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        wait_for_growth(memory, idle, 140 << 20)
        child.kill()
        child.wait()
    assert memory.bytes - idle.bytes > 140 << 20
