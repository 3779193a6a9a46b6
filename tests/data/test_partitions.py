"""The corpus from partitions: any number of workers, a kill, a full disk; the same bytes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soma.base.artefact import content_hash, read_json
from soma.base.errors import UserError
from soma.data import partitions
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus
from soma.data.index import Index, Texts
from soma.data.partitions import make_partitions
from soma.data.sources import list_items

WORDS = [f"word{i}" for i in range(900)]


def prose(seed: int, words: int = 150) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def folder_of(tmp_path: Path, files: int = 8, rows: int = 30) -> Path:
    """JSONL files with exact and near-duplicates across them, rows without text and one broken file."""
    root = tmp_path / "docs"
    root.mkdir()
    for number in range(files):
        texts = [prose(number * 1000 + row) for row in range(rows)] + [prose(row) for row in range(3)]
        texts += [prose(number * 1000) + " tail", "tiny"]
        lines = [json.dumps({"text": text, "n": row}) for row, text in enumerate(texts)] + ['{"body": 1}']
        (root / f"{number}.jsonl").write_text("\n".join(lines))
    (root / "bad.jsonl.gz").write_bytes(b"no gzip")
    return root


def build(config: DataConfig, out: Path, state: Path | None = None) -> str:
    out.mkdir()
    build_corpus(config, out, state)
    return content_hash(out)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "PARTITION_FILES", 2)


def test_partitions_and_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)))  # type: ignore[arg-type]
    one = build(config, tmp_path / "one")
    monkeypatch.setattr(partitions, "PARTITION_FILES", 2)
    monkeypatch.setattr(partitions, "BATCH_ROWS", 7)
    monkeypatch.setattr("soma.data.corpus.BUCKET_BYTES", 20_000)
    state = tmp_path / "state"
    assert build(config, tmp_path / "many", state) == one
    assert len(list(state.glob("partitions/*.json"))) == 5
    assert len(read_json(tmp_path / "many" / "report.json")["dropped"]) == 5
    workers = config.model_copy(update={"workers": 3})
    assert build(workers, tmp_path / "workers") == one
    assert config.content() == workers.content()
    # Negative control: another input is another corpus.
    (tmp_path / "docs" / "0.jsonl").write_text(json.dumps({"text": prose(5000)}))
    assert build(config, tmp_path / "changed") != one


def test_what_is_whole_is_not_made_again(tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)))  # type: ignore[arg-type]
    state = tmp_path / "state"
    first = build(config, tmp_path / "first", state)
    made = []
    real = partitions.make_partition
    monkeypatch.setattr(partitions, "make_partition", lambda task: (made.append(task.path.name), real(task))[1])
    with open(tmp_path / "docs" / "7.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": prose(9999)}))
    assert build(config, tmp_path / "second", state) != first
    assert len(made) == 1  # of five, the one that the changed file is in


KILLED = """
import sys
from pathlib import Path
from soma.data import partitions
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus
partitions.PARTITION_FILES = 1
partitions.BATCH_ROWS = 4
real = partitions.make_partition
def slow(task):
    print("begin", flush=True)
    sys.stdin.readline()  # until the test lets it go on
    return real(task)
partitions.make_partition = slow
build_corpus(DataConfig(sources=sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_and_run_again(tmp_path: Path) -> None:
    root, state = folder_of(tmp_path, files=4), tmp_path / "state"
    config = DataConfig(sources=str(root))  # type: ignore[arg-type]
    whole = build(config, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "out"), str(state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):  # two parts are made, the third is begun
            assert process.stdout.readline() == "begin\n"
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == "begin\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(state.glob("partitions/*.json"))) == 2
    for leftover in (tmp_path / "out").iterdir():
        leftover.unlink()
    (tmp_path / "out").rmdir()
    assert build(config.model_copy(update={"workers": 2}), tmp_path / "out", state) == whole


def die(task: partitions.Task) -> dict[str, object]:
    if task.path.name.startswith("00001"):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return partitions.make_partition(task)


def test_a_dead_worker_is_named_and_nothing_is_lost(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)), workers=2)  # type: ignore[arg-type]
    state = tmp_path / "state"
    with monkeypatch.context() as broken:
        broken.setattr(partitions, "map_tasks", _with(die))
        with pytest.raises(UserError, match=r"a worker process died .* run the same command again"):
            build(config, tmp_path / "out", state)
    assert build(config, tmp_path / "again", state) == build(config, tmp_path / "fresh")


def _with(function: object) -> object:
    from soma.data.workers import map_tasks

    return lambda _, tasks, workers, runner: map_tasks(function, tasks, workers, runner)  # type: ignore[arg-type]


def test_a_full_disk_says_so_and_keeps_what_is_done(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)))  # type: ignore[arg-type]
    state = tmp_path / "state"
    written = []

    def full(self: object, path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path)  # type: ignore[arg-type]

    real = partitions.DropLog.write
    with monkeypatch.context() as broken:
        broken.setattr(partitions.DropLog, "write", full)
        with pytest.raises(UserError, match=r"partitions: the disk is full.*run the same command again"):
            build(config, tmp_path / "out", state)
    assert len(list(state.glob("partitions/*.json"))) == 2
    assert not list(state.glob("partitions/.*"))
    assert build(config, tmp_path / "again", state) == build(config, tmp_path / "fresh")


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)))  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr("soma.data.corpus.ShardWriter.close", full)
        with pytest.raises(UserError, match=r"out: the disk is full"):
            build(config, tmp_path / "out", tmp_path / "state")
    assert build(config, tmp_path / "again", tmp_path / "state") == build(config, tmp_path / "fresh")


def test_texts_of_an_index_are_read_when_asked(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "BATCH_ROWS", 5)
    monkeypatch.setattr("soma.data.index.CACHED_GROUPS", 2)
    config = DataConfig(sources=str(folder_of(tmp_path)))  # type: ignore[arg-type]
    made = make_partitions(config, list(list_items(config.sources)), tmp_path / "parts")  # type: ignore[arg-type]
    index = Index(made)
    order = index.order(("id", "ascending"))
    texts = Texts(index, order)
    assert [partitions.text_id(text) for text in texts] == index.table["id"].take(order).to_pylist()
    assert len(texts.cache) == 2


ON_RAY = """
import sys
from pathlib import Path
from soma.data import partitions
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus
partitions.PARTITION_FILES = 2
Path(sys.argv[2]).mkdir()
build_corpus(DataConfig(sources=sys.argv[1], runner="ray", workers=2, attributes=["gopher_quality"]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_ray_cluster_changes_no_byte(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    root = folder_of(tmp_path)
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-c", ON_RAY, str(root), str(tmp_path / "ray")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    config = DataConfig(sources=str(root), attributes=["gopher_quality"])  # type: ignore[arg-type]
    assert content_hash(tmp_path / "ray") == build(config, tmp_path / "here")
