"""What all tests share: the real data beside the checkout, a small recipe, and no network."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SOMA_TEST_DATA", ROOT.parent / "shared" / "data"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():  # Triton reads this when it is imported, whoever does so first
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("soma", deadline=None)  # a busy machine may stop for longer than any example takes
settings.load_profile("soma")
sys.path.insert(0, str(ROOT))  # tests/browser.py and benchmarks/ are imported from the checkout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="I/N", help="run the I-th of N parts of the tests that are selected, each N-th one, from 1"
    )


@pytest.hookimpl(trylast=True)  # after -m and -k have taken away what they do
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is None:
        return
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise pytest.UsageError(f"--part {part}: expected I/N with I from 1 to N, such as 2/8")
    chosen = items[int(number) - 1 :: int(parts)]
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """`shared_data("wikitext2/wiki.test.raw")`: a real file, or a skip that says which one is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data {name!r} is not here (looked in {SHARED}; set SOMA_TEST_DATA)")
        return path

    return find
