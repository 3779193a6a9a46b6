"""The doctor: what is off or broken is said, with why and what to do."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from soma.base import doctor, machine
from soma.base.doctor import Check, diagnose, is_healthy, report
from soma.base.machine import Compiler, Gpu, TorchBuild

CPU = TorchBuild("2.13.0+cpu", None, None)
CUDA = TorchBuild("2.12.1+cu128", "12.8", None)
GPU = Gpu("NVIDIA X", 80 << 30, "550")


def test_diagnose_here(tmp_path: Path) -> None:
    checks = diagnose(tmp_path / "runs", network=False)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "torch.compile", "GPU", "memory", "disk", "port"} <= set(names)
    assert next(check for check in checks if check.name == "torch").state == "ok"
    for check in checks:
        assert check.what
        assert check.state == "ok" or (check.why and check.do), check
    as_json = json.loads(json.dumps(report(checks)))
    assert as_json["healthy"] == is_healthy(checks)
    assert not (tmp_path / "runs").exists(), "looking makes nothing"


def test_healthy_means_no_problem() -> None:
    assert is_healthy([Check("a", "ok", "x"), Check("b", "off", "x")])
    assert not is_healthy([Check("a", "ok", "x"), Check("b", "problem", "x")])


@pytest.mark.parametrize(("version", "state"), [((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")])
def test_python(version: tuple[int, ...], state: str) -> None:
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(
    ("build", "state", "says"),
    [
        (None, "problem", "not installed"),
        (CPU, "ok", "CPU only"),
        (CUDA, "ok", "CUDA 12.8"),
        (TorchBuild("2.10.0", None, None), "problem", "2.10.0"),
        (TorchBuild("2.14.0a0+git1", None, None), "problem", "2.14"),
        (TorchBuild("2.11.0", None, "6.3"), "ok", "ROCm"),
    ],
)
def test_torch(build: TorchBuild | None, state: str, says: str) -> None:
    check = doctor.check_torch(build)
    assert check.state == state
    assert says in check.what


def test_compilers() -> None:
    good, c = Compiler("/usr/bin/g++", True), Compiler("/usr/bin/gcc", True)
    assert doctor.check_compile(good, c).state == "ok"
    none = doctor.check_compile(None, c)
    assert (none.state, none.why) == ("off", "no C++ compiler was found; the C compiler /usr/bin/gcc is not enough")
    broken = doctor.check_compile(Compiler("/usr/bin/g++", False, "Python.h: No such file"), c)
    assert broken.state == "off"
    assert "Python.h: No such file" in broken.why


def test_gpu_without_a_torch_that_can_use_it() -> None:
    assert doctor.check_gpu([], CPU).state == "off"
    assert doctor.check_gpu([GPU], CUDA).state == "ok"
    unused = doctor.check_gpu([GPU], CPU)
    assert unused.state == "off"
    assert "without CUDA" in unused.why


def test_bf16_memory_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMA_RUNS_QUOTA", raising=False)
    assert doctor.check_bf16(True).state == "ok"
    assert doctor.check_bf16(False).state == "off"
    assert doctor.check_memory(8 << 30, 6 << 30, 2).state == "ok"
    assert doctor.check_memory(8 << 30, 1 << 30, 2).state == "off"
    assert doctor.check_disk(tmp_path, 50 << 30).state == "ok"
    assert doctor.check_disk(tmp_path, 1 << 20).state == "problem"
    monkeypatch.setenv("SOMA_RUNS_QUOTA", "20GB")
    assert "quota 20 GB" in doctor.check_disk(tmp_path, 50 << 30).what
    monkeypatch.setenv("SOMA_RUNS_QUOTA", "lots")
    assert doctor.check_disk(tmp_path, 50 << 30).state == "problem"


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = doctor.check_port(port)
    assert check.state == "off"
    assert f"--port {port + 1}" in check.do
    assert doctor.check_port(port).state == "ok"


def test_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no chromium" in doctor.check_chromium().why
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert doctor.check_chromium().state == "ok"


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_extra("data").state == "ok"
    monkeypatch.setitem(doctor.EXTRAS, "data", (("daft", "no_such_module_here"), "corpora"))
    check = doctor.check_extra("data")
    assert (check.state, check.do) == ("off", "pip install 'somacube[data]'")
    assert check.why == "no_such_module_here not installed; off: corpora"


def test_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert doctor.check_hub(2.0, "127.0.0.1", port).state == "ok"
    check = doctor.check_hub(2.0, "127.0.0.1", port)
    assert check.state == "off"
    assert "refused" in check.why


def test_a_network_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    over = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        over.wait(10)
        raise OSError("gave up")

    monkeypatch.setattr(socket, "create_connection", hang)
    check = doctor.check_hub(0.1)
    over.set()
    assert "no answer within 0.1 s" in check.why


def test_the_extras_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    assert project["requires-python"] == ">=3.11"
    (low, high) = doctor.TORCH_RANGE
    assert f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}" in project["dependencies"]


def test_it_loads_no_torch() -> None:
    program = "import sys; from soma.base import doctor; doctor.diagnose(network=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert machine.torch_build() is not None
