"""Feast's own environment: it pins libraries that the rest has in newer versions (pandas below 3, prometheus_client
below 0.25), so it is installed beside us from a lock of its own, and talked to as a program and as a server.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from soma.base import progress
from soma.base.cache import cache_root
from soma.base.errors import UserError

VARIABLE = "SOMA_FEAST_ENV"
LOCK = "requirements.txt"
DONE = "soma-complete"  # in an environment that is whole


def lock_text() -> str:
    """The pinned requirements."""
    return files("soma.serve.features").joinpath(LOCK).read_text(encoding="utf-8")


def location() -> Path:
    """Where the environment is or will be: SOMA_FEAST_ENV, or in the cache by lock and Python."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    key = hashlib.sha256(lock_text().encode()).hexdigest()[:12]
    return cache_root() / "feast" / f"{key}-py{sys.version_info.major}.{sys.version_info.minor}"


def python() -> Path:
    """The environment's interpreter; the environment is made if it is not there (some 530 MB, minutes).

    Raises UserError: SOMA_FEAST_ENV names none that has Feast; it cannot be installed.
    """
    where = location()
    program = where / "bin" / "python"
    if os.environ.get(VARIABLE):
        if not program.exists():
            raise UserError(f"{VARIABLE}={where}: there is no bin/python in it; unset it, and one is made")
        return program
    if not (where / DONE).exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        with open(where.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once make one
            if not (where / DONE).exists():
                make(where)
    return program


def program() -> list[str]:
    """The command that runs `feast_side.py` there; its own folder is not on its module path."""
    return [str(python()), "-P", str(files("soma.serve.features").joinpath("feast_side.py"))]


def variables() -> dict[str, str]:
    """This process's environment variables, without those that would mix our modules with Feast's."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def make(where: Path) -> None:
    """Install Feast there. Raises UserError with pip's last words; what was begun is removed."""
    shutil.rmtree(where, ignore_errors=True)
    progress.current().note(f"installing Feast into {where} (once; some 530 MB)")
    try:
        run([sys.executable, "-m", "venv", str(where)])
        lock = files("soma.serve.features").joinpath(LOCK)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(lock)]
        run([str(where / "bin" / "python"), *install])
    except BaseException:
        shutil.rmtree(where, ignore_errors=True)
        raise
    (where / DONE).touch()


def run(command: list[str]) -> None:
    """A step of the installation. Raises UserError."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-1500:]
        raise UserError(f"Feast cannot be installed ({' '.join(command[1:4])}): {words}")
