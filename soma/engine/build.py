"""The engine's C sources (`csrc/`): built at first use with the system's compiler, kept in the cache folder."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from soma.base import progress
from soma.base.artefact import hash_lines
from soma.base.cache import cache_root
from soma.base.machine import compiler, cpu_model

SOURCES = Path(__file__).with_name("csrc")
FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
# Tried in this order: the machine's own instructions and vectors where the code asks for them, then with less.
EXTRAS = (("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"), ("-fopenmp-simd",), ())
BUILD_SECONDS = 120
LOADED: list[ctypes.CDLL] = []
WITHOUT = "the model runs on torch alone, which is slower on a CPU, most of all with quantized weights"


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """forward.c for weights and cache of `dtype`, built unless it is in the cache folder.

    None, with a note that says why, where there is no compiler or it fails.
    """
    found = compiler("c")
    if found is None or not found.works:
        progress.current().note(f"no C compiler: {WITHOUT}")
        return None
    define = f"-DWEIGHT_BF16={int(dtype == torch.bfloat16)}"
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    key = hash_lines([*texts, define, *FLAGS, str(EXTRAS), found.path, cpu_model()])[:20]
    target = cache_root() / "native" / f"forward-{key}.so"
    if not os.path.isfile(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            said = _build(found.path, define, target)
        except OSError as error:
            where = (
                f"{error.filename or target.parent}: {error.strerror}; SOMA_CACHE names a folder that can be written"
            )
            progress.current().note(f"the engine's C sources cannot be built ({where}): {WITHOUT}")
            return None
        if said:
            progress.current().note(f"the engine's C sources do not build ({said}): {WITHOUT}")
            return None
    try:
        built = ctypes.CDLL(str(target))
        LOADED.append(built)
        return built
    except OSError as error:
        progress.current().note(f"{target} does not load ({error}): {WITHOUT}")
        return None


def loaded() -> ctypes.CDLL | None:
    """A library that is there already, for what does not depend on a model's dtype."""
    return LOADED[-1] if LOADED else None


def _build(path: str, define: str, target: Path) -> str:
    """Compile; the compiler's last words if nothing worked, else nothing."""
    said = ""
    for extra in EXTRAS:
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            command = [path, *FLAGS, *extra, define, str(SOURCES / "forward.c"), "-o", name, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(name, target)
                return ""
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0][:200]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        finally:
            Path(name).unlink(missing_ok=True)
    return said
