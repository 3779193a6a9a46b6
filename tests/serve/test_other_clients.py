"""LiteLLM and MLServer's types and codecs as clients, each from an environment of its own: their pins are not ours.

    python -m venv litellm && litellm/bin/pip install 'litellm<1.107'
    SOMA_LITELLM_ENV=litellm/bin/python python -m pytest -m slow tests/serve/test_other_clients.py

SOMA_MLSERVER_ENV likewise, with `mlserver==1.7.1`.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from v2_tools import v2_server

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def run(variable: str, script: str, *arguments: str) -> str:
    """What a script says in the environment whose Python a variable names; a skip where it names none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python of an environment with this client")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(HERE / script), *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_litellm(service_url: str) -> None:
    """Chat whole and as a stream say the same; vectors; errors are LiteLLM's own of the right kind."""
    found = json.loads(run("SOMA_LITELLM_ENV", "litellm_script.py", service_url, "tiny").splitlines()[-1])
    usage = found["usage"]
    assert found["text"]
    assert found["text"] == found["streamed"]
    assert found["reason"] == "length"
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert found["streamed_tokens"] == [12]
    one, same, other = np.array(found["vectors"])
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(one, same, atol=1e-5)
    assert np.abs(one - other).max() > 1e-3
    assert found["embedded_tokens"] >= 3
    assert [each[:2] for each in found["errors"].values()] == [["NotFoundError", 404], ["BadRequestError", 400]]
    assert "nobody" in found["errors"]["model"][2]
    assert "top_p" in found["errors"]["parameter"][2]


def test_mlserver() -> None:
    with v2_server() as served:
        said = run("SOMA_MLSERVER_ENV", "mlserver_script.py", f"http://{served.http}", served.grpc)
    assert said == "all as it should be\n"
