"""Shards from a store: the same batches as from disk, damage, retries, the ceiling, prefetch, kill and resume."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from soma.base.errors import UserError
from soma.data import streaming
from soma.data.config import StreamConfig
from soma.data.loader import TokenLoader
from soma.data.streaming import NoRoomError, ShardCache, StreamedStore
from soma.data.tokens import SplitWriter, write_index

EOS, DOCUMENTS, SIZE = 0, 60, 50


def write(out: Path, masked: bool = False) -> Path:
    """Twelve shards of five documents of 50 tokens."""
    out.mkdir()
    with SplitWriter(out, "train", 50_000, masked, shard_tokens=5 * SIZE) as writer:
        for document in range(DOCUMENTS):
            ids = [*range(1 + document * SIZE, (document + 1) * SIZE), EOS]
            writer.add(ids, [1] * SIZE if masked else None, SIZE)
    entry = writer.entry()
    assert len(entry["shards"]) == 12
    write_index(out, 50_000, "hash", EOS, masked, {"train": entry})
    return out


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; `failures[name]` answers are broken off or refused first."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.delay = folder, Counter[str](), 0.0
        self.failures: dict[str, list[str]] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        time.sleep(self.server.delay)
        path = self.server.folder / name
        if not path.exists():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        fault = next(iter(self.server.failures.get(name, [])), None)
        if fault:
            self.server.failures[name].pop(0)
        if fault == "refuse":
            self.send_error(503)
            return
        if fault == "damage":
            data = bytes([data[0] ^ 1]) + data[1:]
        if "Range" in self.headers and self.headers.get("If-Range") == f'"{len(data)}"':
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + (len(data) - start) // 2] if fault == "break" else data[start:])


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FIRST_WAIT", 0.001)


def stream(tmp_path: Path, **changes: Any) -> StreamConfig:
    return StreamConfig(**{"folder": str(tmp_path / "cache"), "cache_gb": 1e-3, **changes})


def same(one: TokenLoader, other: TokenLoader, steps: int) -> None:
    for _ in range(steps):
        ours, theirs = next(one), next(other)
        for name in ("tokens", "targets", "positions", "document_ids"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def disk(cache: Path) -> int:
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # the prefetch thread renames and removes files meanwhile
            total += path.stat().st_size * path.is_file()
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_a_store_gives_the_batches_of_the_disk_on_any_ranks(tmp_path: Path, masked: bool) -> None:
    folder = write(tmp_path / "t", masked)
    store = fsspec.filesystem("memory")
    url = f"memory://tokens-{tmp_path.name}"
    for path in folder.iterdir():
        store.pipe(f"{url}/{path.name}", path.read_bytes())
    settings: dict[str, Any] = {"seed": 3, "buffer": 10}
    here = TokenLoader(folder, "train", 64, 4, **settings)
    there = TokenLoader(url, "train", 64, 4, **settings, stream=stream(tmp_path))
    same(here, there, 12)
    assert here.state_dict() == there.state_dict()
    ranks = [TokenLoader(url, "train", 64, 2, rank, 2, **settings, stream=stream(tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(json.loads(json.dumps(there.state_dict())))
    for _ in range(4):
        whole = next(there)
        np.testing.assert_array_equal(np.concatenate([next(rank).tokens for rank in ranks]), whole.tokens)
    same(TokenLoader(f"file://{folder}", "train", 64, 4, seed=1, stream=stream(tmp_path)),
         TokenLoader(folder, "train", 64, 4, seed=1), 3)  # fmt: skip
    store.rm(url, recursive=True)


def test_what_breaks_off_goes_on_and_what_is_damaged_comes_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    with serving(folder) as server:
        server.failures = {
            "train-00000.bin": ["refuse", "break"], "train-00001.bin": ["damage", "refuse"], "train-00002.bin":
            ["break", "break", "break"], "index.json": ["refuse"], "train-00000.offsets.bin": ["break"],
        }  # fmt: skip
        same(TokenLoader(server.url, "train", 32, 8, stream=stream(tmp_path)), TokenLoader(folder, "train", 32, 8), 12)
        assert not any(server.failures.values())
        server.failures["train-00004.bin"] = ["damage"] * 100
        store = StreamedStore(server.url, "train", stream(tmp_path, folder=str(tmp_path / "new")))
        with pytest.raises(UserError, match=r"train-00004.bin: could not be fetched in 6 attempts: its sha256 is not"):
            store.document(20)
        (folder / "train-00005.bin").unlink()
        with pytest.raises(UserError, match=r"train-00005.bin: the server has no such file"):
            store.document(25)
        assert [path.name for path in (tmp_path / "new").iterdir() if path.suffix == ".part"] == []
        with pytest.raises(UserError, match="no split 'test'"):
            StreamedStore(server.url, "test", stream(tmp_path))
    with pytest.raises(UserError, match="cannot be reached"):
        StreamedStore(server.url, "train", stream(tmp_path))


def test_the_cache_stays_under_its_ceiling(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    offsets, shard = 12 * 6 * 8, 5 * SIZE * 2
    room = offsets + 4 * shard
    with serving(folder) as server:
        small = stream(tmp_path, cache_gb=room / 1e9, ahead=2)
        loader = TokenLoader(server.url, "train", 25, 2, buffer=5, stream=small)
        expected = TokenLoader(folder, "train", 25, 2, buffer=5)
        for _ in range(120):
            same(loader, expected, 1)
            assert disk(tmp_path / "cache") <= room
        store = loader.store
        assert isinstance(store, StreamedStore)
        assert store.cache.fetched > 3 * room, "more went through than it holds"
        with pytest.raises(UserError, match="give pack_buffer"):
            TokenLoader(server.url, "train", 25, 2, stream=small)
        with pytest.raises(UserError, match=r"has 48 B.*raise stream.cache_gb"):
            StreamedStore(server.url, "train", stream(tmp_path, cache_gb=40 / 1e9, folder=str(tmp_path / "tiny")))


def test_what_is_wanted_sooner_is_not_removed(tmp_path: Path) -> None:
    files = {}
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        files[name] = (f"file://{tmp_path / name}", streaming._sha256(tmp_path / name), 100)
    cache = ShardCache(tmp_path / "cache", 250)
    for name in ("a", "b"):
        cache.get(*files[name])
    os.utime(cache.path(files["a"][1]), (1, 1))
    with pytest.raises(NoRoomError):
        cache.get(*files["c"], keep=frozenset([files["a"][1], files["b"][1]]))
    (tmp_path / "cache" / f"{'0' * 64}.part").write_bytes(b"x" * 150)  # of a process that was killed
    cache.get(*files["c"], keep=frozenset([files["b"][1]]))
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.is_file()}
    assert left == {files["b"][1], files["c"][1]}


def test_who_needs_a_file_waits_for_room_that_another_download_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    with serving(folder) as server:
        server.delay = 0.1
        facts = json.loads((folder / "index.json").read_text())["splits"]["train"]["shards"]
        cache = ShardCache(tmp_path / "cache", 5 * SIZE * 2)  # one shard
        urls = [(f"{server.url}/{one['file']}", one["sha256"], 5 * SIZE * 2) for one in facts[:2]]
        first = threading.Thread(target=cache.get, args=urls[0], kwargs={"keep": frozenset()})
        first.start()
        deadline = time.monotonic() + 60
        while not server.asked and time.monotonic() < deadline:
            time.sleep(0.005)
        assert cache.get(*urls[1]).stat().st_size == 5 * SIZE * 2
        first.join()


def test_prefetch_brings_shards_before_they_are_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    with serving(folder) as server:
        loader = TokenLoader(server.url, "train", 50, 1, buffer=5, stream=stream(tmp_path, ahead=3))
        next(loader)
        shards = {one["sha256"] for one in loader.store.entry["shards"]}
        deadline = time.monotonic() + 60
        while len(shards & {path.name for path in (tmp_path / "cache").iterdir()}) < 4:
            assert time.monotonic() < deadline, "the thread fetches the shards of the next blocks"
            time.sleep(0.01)
        waited = loader.waited
        server.failures = {f"train-{number:05d}.bin": ["refuse"] * 100 for number in range(12)}
        for _ in range(18):  # the rest of this block, and the three blocks after it
            next(loader)
        assert loader.waited - waited < 5
        with pytest.raises(UserError, match="could not be fetched"):
            [next(loader) for _ in range(3)]


def test_a_killed_process_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    script = (
        "import sys, json, hashlib\n"
        "from soma.data.config import StreamConfig\n"
        "from soma.data.loader import TokenLoader\n"
        "url, cache, state = sys.argv[1:]\n"
        "stream = StreamConfig(folder=cache, cache_gb=1e-5)\n"
        "loader = TokenLoader(url, 'train', 32, 2, seed=5, buffer=10, stream=stream)\n"
        "if state: loader.load_state_dict(json.loads(state))\n"
        "while loader._order.sequence < 160:\n"
        "    batch = next(loader)\n"
        "    seen = hashlib.sha256(batch.targets.tobytes()).hexdigest()\n"
        "    print(json.dumps([loader.state_dict(), seen]), flush=True)\n"
    )

    def start(state: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, server.url, str(tmp_path / "cache"), state]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with serving(folder) as server:
        server.delay = 0.01
        lines = []
        first = start("")
        assert first.stdout is not None
        for line in first.stdout:
            lines.append(json.loads(line))
            if len(lines) == 17:
                first.send_signal(signal.SIGKILL)
                break
        first.wait()
        first.stdout.close()
        rest, _ = start(json.dumps(lines[-1][0])).communicate(timeout=120)
        lines += [json.loads(line) for line in rest.splitlines()]
    straight = TokenLoader(folder, "train", 32, 2, seed=5, buffer=10)
    expected = [hashlib.sha256(next(straight).targets.tobytes()).hexdigest() for _ in range(80)]
    assert [line[1] for line in lines] == expected
