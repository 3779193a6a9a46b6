"""The runs folder: listing, comparing, pruning (also when killed), locks, quota."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from soma.base import runs as runs_module
from soma.base.errors import UserError
from soma.base.locks import Busy, lock
from soma.base.runs import (
    STALE_WORK_SECONDS,
    compare_runs,
    enforce_quota,
    entry_name,
    hold,
    list_runs,
    pin,
    prune,
    quota_bytes,
    read_run,
    references,
    unpin,
)
from soma.base.units import human_bytes, parse_bytes


def artefact(runs: Path, stage: str, key: str, size: int = 1000, **fields: Any) -> Path:
    folder = runs / "store" / entry_name(stage, key)
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(bytes(size))
    record = {"stage": stage, "key": key, "config": {}, "content_hash": key, "seconds": 1.5} | fields
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def named(
    runs: Path, name: str, keys: dict[str, str], started: str = "2026-01-01T00:00:00+00:00", **fields: Any
) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    stages = [{"stage": stage, "key": key, "cached": False, "seconds": 1.5} for stage, key in keys.items()]
    record = {"name": name, "stages": stages, "started": started, "status": "finished", "metrics": {}, "recipe": {}}
    (folder / "run.json").write_text(json.dumps(record | fields))
    return folder


def key(letter: str) -> str:
    return letter * 64


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that share a corpus, and one artefact that no run wants."""
    for stage, letter in (("corpus", "a"), ("train", "b"), ("train", "c"), ("train", "d")):
        artefact(tmp_path, stage, key(letter), config={"steps": ord(letter), "x": {"y": 1}})
    old = {"metrics": {"loss": 2.0}, "recipe": {"train": {"steps": 98}, "seed": 1}}
    named(tmp_path, "old", {"corpus": key("a"), "train": key("b")}, **old)
    new = {"metrics": {"loss": 1.0, "bits": 0.5}, "recipe": {"train": {"steps": 99}, "name": "n", "seed": 1}}
    named(tmp_path, "new", {"corpus": key("a"), "train": key("c")}, "2026-01-02T00:00:00+00:00", **new)
    return tmp_path


def store(runs: Path) -> set[str]:
    return {path.name[: path.name.index("-") + 2] for path in (runs / "store").glob("[!.]*")}


# --- Listing and comparing ---


def test_list_is_newest_first_and_counts_bytes(runs: Path) -> None:
    new, old = list_runs(runs)
    assert (new.name, old.name) == ("new", "old")
    assert new.bytes == sum(
        path.stat().st_size
        for folder in (runs / "new", *(runs / "store" / entry for entry in new.entries))
        for path in folder.iterdir()
    )
    assert new.seconds == 3.0


def test_links_to_artefacts_are_not_counted_again(runs: Path) -> None:
    before = list_runs(runs)[0].bytes
    (runs / "new" / "train").symlink_to(runs / "store" / entry_name("train", key("c")), target_is_directory=True)
    assert list_runs(runs)[0].bytes == before


def test_a_broken_record_is_left_out_and_stops_a_prune(runs: Path) -> None:
    (runs / "old" / "run.json").write_text("{")
    assert [run.name for run in list_runs(runs)] == ["new"]
    with pytest.raises(UserError, match="not valid JSON"):
        prune(runs)  # what it refers to is not known, so nothing may go
    assert store(runs) == {"corpus-a", "train-b", "train-c", "train-d"}


def test_an_unknown_run_is_answered_with_the_nearest(runs: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'old'"):
        read_run(runs, "odl")
    with pytest.raises(UserError, match="runs here: new, old"):
        read_run(runs, "zzzzzz")
    with pytest.raises(UserError):
        read_run(runs, "../" + runs.name + "/old")


def test_compare(runs: Path) -> None:
    found = compare_runs(runs, "old", "new")
    recipe = [(d.key, d.a, d.b, d.missing) for d in found.recipe]
    assert recipe == [("name", None, "n", "a"), ("train.steps", 98, 99, "")]
    assert found.metrics == {"loss": (2.0, 1.0), "bits": (None, 0.5)}
    corpus, train = found.stages
    assert (corpus.same_content, corpus.config) == (True, [])
    assert train.same_content is False
    assert [(d.key, d.a, d.b) for d in train.config] == [("steps", 98, 99)]
    shutil.rmtree(runs / "store" / entry_name("train", key("b")))
    assert compare_runs(runs, "old", "new").stages[1].same_content is None


# --- Pruning ---


def test_prune_takes_what_no_run_wants(runs: Path) -> None:
    would = prune(runs, dry_run=True)
    assert [removal.path.name[:7] for removal in would.removed] == ["train-d"]
    assert would.bytes > 1000
    assert store(runs) == {"corpus-a", "train-b", "train-c", "train-d"}
    assert [removal.path for removal in prune(runs).removed] == [removal.path for removal in would.removed]
    assert store(runs) == {"corpus-a", "train-b", "train-c"}
    assert not list((runs / "store" / ".trash").iterdir())
    assert prune(runs).removed == []


def test_prune_keeps_the_newest_runs(runs: Path) -> None:
    would = prune(runs, keep=1, dry_run=True)
    assert {removal.path.name[:7] for removal in would.removed} == {"old", "train-b", "train-d"}
    prune(runs, keep=1)
    assert store(runs) == {"corpus-a", "train-c"}
    assert not (runs / "old").exists()
    prune(runs, keep=0)
    assert store(runs) == set()
    with pytest.raises(UserError, match="keep"):
        prune(runs, keep=-1)


def test_pinned_artefacts_stay(runs: Path) -> None:
    entry = entry_name("train", key("d"))
    pin(runs, entry, "model@1")
    pin(runs, entry, "model@2")
    assert prune(runs).removed == []
    unpin(runs, entry, "model@1")
    assert prune(runs).removed == []
    unpin(runs, entry, "model@2")
    assert len(prune(runs).removed) == 1


def test_stale_work_goes_and_fresh_work_stays(runs: Path) -> None:
    work = runs / "store" / ".work"
    for letter in "xyc":
        (work / entry_name("train", key(letter)) / "state").mkdir(parents=True)
    old = time.time() - STALE_WORK_SECONDS - 60
    for path in (work / entry_name("train", key("x"))).rglob("*"):
        os.utime(path, (old, old))
    os.utime(work / entry_name("train", key("x")), (old, old))
    whys = {removal.path.name[:7]: removal.why for removal in prune(runs).removed if removal.path.parent == work}
    assert whys == {"train-x": "unfinished and untouched for a day", "train-c": "its artefact is finished"}
    assert [path.name[:7] for path in work.iterdir()] == ["train-y"]


def test_leftovers_of_dead_processes_go(runs: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".x.tmp-{dead.pid}", f".x.old-{dead.pid}", f".trash/x-{dead.pid}-1"]
    alive = [f".x.tmp-{os.getpid()}", f".trash/x-{os.getpid()}-1"]
    for name in [*names, *alive]:
        (runs / "store" / name).mkdir(parents=True)
    prune(runs)
    assert not any((runs / "store" / name).exists() for name in names)
    assert all((runs / "store" / name).exists() for name in alive)


HOLDER = """
import sys, time
from pathlib import Path
from soma.base.runs import hold
with hold(Path(sys.argv[1]), sys.argv[2], shared=sys.argv[3] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(runs: Path, entry: str, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(runs), entry, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["shared", "exclusive"])
def test_what_another_process_uses_stays_until_it_dies(runs: Path, how: str) -> None:
    process = holder(runs, entry_name("train", key("d")), how)
    try:
        result = prune(runs)
        assert result.removed == []
        assert f"process {process.pid}" in result.kept[0][1]
        assert "train-d" in store(runs)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(prune(runs).removed) == 1


def test_a_run_that_came_to_need_it_meanwhile_keeps_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finishes while a prune removes other things: what it refers to now must stay."""
    artefact(runs, "train", key("e"))
    real = runs_module.directory_bytes

    def later(folder: Path) -> int:
        if folder.name == entry_name("train", key("d")) and not (runs / "late").exists():
            named(runs, "late", {"train": key("e")})
        return real(folder)

    monkeypatch.setattr(runs_module, "directory_bytes", later)
    os.utime(runs / "store" / entry_name("train", key("d")), (1, 1))  # the oldest goes first
    prune(runs)
    assert store(runs) == {"corpus-a", "train-b", "train-c", "train-e"}


PRUNER = """
import sys, shutil, os
from pathlib import Path
import soma.base.runs as runs
real = shutil.rmtree
def half(path, *rest, **more):
    os.unlink(next(Path(path).iterdir()))
    os.kill(os.getpid(), 9)
runs.shutil.rmtree = half
runs.prune(Path(sys.argv[1]))
"""


def test_a_prune_that_is_killed_halfway_leaves_no_half_artefact(runs: Path) -> None:
    result = subprocess.run([sys.executable, "-c", PRUNER, str(runs)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert store(runs) == {"corpus-a", "train-b", "train-c"}
    assert len(list((runs / "store" / ".trash").iterdir())) == 1
    prune(runs)
    assert not list((runs / "store" / ".trash").iterdir())


# --- Locks ---


def test_lock_excludes_and_shares(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with lock(path) as held:
        with pytest.raises(Busy), lock(path, wait=False):
            pass
        with pytest.raises(Busy), lock(path, shared=True, wait=False):
            pass
        held.share()
        with lock(path, shared=True, wait=False):
            pass
        with pytest.raises(Busy, match=f"process {os.getpid()}"), lock(path, wait=False):
            pass
    with lock(path, wait=False):
        path.unlink()  # its holder may remove it
    with lock(path, wait=False):
        assert path.exists()


def test_a_waiter_whose_lock_file_was_removed_takes_the_new_one(runs: Path) -> None:
    entry = "train-w"
    with hold(runs, entry):
        waiter = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(runs), entry, "exclusive"], stdout=subprocess.PIPE, text=True
        )
        time.sleep(0.5)
        (runs / "store" / ".locks" / f"{entry}.lock").unlink()
    try:
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "held\n"
        with pytest.raises(Busy), hold(runs, entry, wait=False):
            pass
    finally:
        waiter.kill()
        waiter.wait()


# --- Quota and sizes ---


def test_quota_takes_the_oldest_unused_first(runs: Path) -> None:
    for letter, age in (("e", 300), ("f", 200)):
        folder = artefact(runs, "train", key(letter), size=50_000)
        os.utime(folder, (time.time() - age,) * 2)
    assert enforce_quota(runs, 10**9).removed == []
    used = runs_module.directory_bytes(runs)
    result = enforce_quota(runs, used - 10_000)
    assert [removal.path.name[:7] for removal in result.removed] == ["train-e"]
    assert references(runs) <= {path.name for path in (runs / "store").iterdir()}


def test_quota_that_cannot_be_met_names_the_biggest(runs: Path) -> None:
    (runs / "store" / entry_name("train", key("c")) / "big").write_bytes(bytes(200_000))
    with pytest.raises(UserError, match=r"over the quota of 100 kB; the biggest: train-c{16} 20\d kB"):
        enforce_quota(runs, 100_000)
    assert store(runs) == {"corpus-a", "train-b", "train-c"}


def test_quota_from_the_environment(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMA_RUNS_QUOTA", raising=False)
    assert enforce_quota(runs).removed == []
    monkeypatch.setenv("SOMA_RUNS_QUOTA", "20GB")
    assert quota_bytes() == 20 * 10**9
    monkeypatch.setenv("SOMA_RUNS_QUOTA", "twenty")
    with pytest.raises(UserError, match="SOMA_RUNS_QUOTA: 'twenty' is not a size"):
        enforce_quota(runs)


def test_sizes() -> None:
    assert [human_bytes(count) for count in (0, 999, 1000, 999_999, 12_345_678, 2.5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "12.3 MB",
        "2.5 TB",
    ]
    assert [parse_bytes(text, "x") for text in ("5", "1.5 GiB", "20GB", "3k")] == [5, 3 << 29, 20 * 10**9, 3000]
    for bad in ("", "GB", "-1GB", "1 parsec", "1e9", "9" * 400):
        with pytest.raises(UserError, match="x: "):
            parse_bytes(bad, "x")
