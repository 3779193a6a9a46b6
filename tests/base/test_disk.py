"""A full disk is known by what each library says of it. /dev/full is one; a link to it may be removed by who fails."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from soma.base.disk import claim, full

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")


def write_sqlite(full_file: Path) -> None:
    """A database that may have no more pages."""
    with sqlite3.connect(":memory:") as database:
        database.execute("pragma max_page_count = 2")
        database.execute("create table t (x)")
        database.execute("insert into t values (zeroblob(100000))")


def write_rust(full_file: Path) -> None:
    Tokenizer(models.BPE()).save(str(full_file))


def write_arrow(full_file: Path) -> None:
    pq.write_table(pa.table({"x": range(100_000)}), full_file)


def write_wrapped(full_file: Path) -> None:
    try:
        full_file.write_text("x")
    except OSError as error:
        raise RuntimeError("a worker has failed") from error


def write_told(full_file: Path) -> None:
    try:
        full_file.write_text("x")
    except OSError:
        raise ValueError("told already") from None


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda full_file: full_file.write_text("x"), "arrow": write_arrow, "sqlite": write_sqlite,
    "tokenizers": write_rust, "another error": write_wrapped,
}  # fmt: skip


@pytest.fixture
def full_file(tmp_path: Path) -> Path:
    """A file on a full disk."""
    link = tmp_path / "full"
    link.symlink_to(FULL)
    return link


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known(name: str, full_file: Path) -> None:
    with pytest.raises(Exception) as caught:
        WRITERS[name](full_file)
    assert full(caught.value) is not None, repr(caught.value)


def test_others_are_not(full_file: Path) -> None:
    assert full(ValueError("nothing is full")) is None
    with pytest.raises(ValueError, match="told") as caught:
        write_told(full_file)
    assert full(caught.value) is None


def test_holes_are_claimed(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    np.lib.format.open_memmap(sparse, "w+", np.float32, (300, 1000))
    before = os.stat(sparse)
    assert before.st_blocks * 512 < before.st_size
    claim(sparse)
    after = os.stat(sparse)
    assert after.st_blocks * 512 >= after.st_size == before.st_size


def test_the_last_block_of_an_array_is_not_lost(tmp_path: Path) -> None:
    """Files may have 1 MiB here; numpy's own `save` to a file would write as much and say nothing."""
    code = (
        "import resource, sys; from pathlib import Path; import numpy as np;"
        "from soma.data.dedup.files import save_array;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); save_array(Path(sys.argv[1]), np.zeros(131_071))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.npy")], capture_output=True, text=True)
    assert "OSError: [Errno 27]" in done.stderr
    assert list(tmp_path.iterdir()) == []
