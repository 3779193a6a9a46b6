"""One service on a tiny model, in a subprocess of its own, for all tests of the room."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_model

from soma.serve.server import running_service

# The service's own words go to a file; one thread, since two only wait for each other on tiny models.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a full context takes seconds: time to leave, stop and queue in."""
    return make_model(tmp_path_factory.mktemp("chat"), num_hidden_layers=16)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return make_model(tmp_path_factory.mktemp("base"), chat=False)


@pytest.fixture(scope="session")
def service_url(tiny_folder: Path) -> Iterator[str]:
    with running_service(tiny_folder, max_running=4, max_waiting=8) as url:
        yield url


@pytest.fixture(scope="session")
def base_url(base_folder: Path) -> Iterator[str]:
    with running_service(base_folder) as url:
        yield url
