"""A tiny model for the engine's tests, on one thread: two only wait for each other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from soma.engine.engine import Engine
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from tests.train.pool import Pool


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for tests on several ranks; they live through the session."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder)


@pytest.fixture
def make_engine(tiny_folder: Path, tokenizer: Tokenizer) -> Iterator[Callable[..., Engine]]:
    """`make_engine(**options)`; the engines are closed after the test."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(load_model(tiny_folder), tokenizer, **{"cache_tokens": 32_768, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        assert not engine.thread.is_alive()
