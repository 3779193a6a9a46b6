"""Fetching: local paths, a real HTTP server with its failures, object stores, the hub, and no secrets anywhere."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from soma.base import progress, remote
from soma.base.cache import cache_root, fetch_file
from soma.base.errors import UserError
from soma.base.fetch import fetch
from tests.base.file_server import FileServer, serving

BODY = bytes(range(256)) * 4096  # 1 MiB


class Notes(progress.Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def notes() -> Iterator[list[str]]:
    with progress.use(Notes()) as reporter:
        assert isinstance(reporter, Notes)
        yield reporter.texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path / "cache"))
    return cache_root()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as files:
        yield files


def everything_in(folder: Path) -> str:
    """Names and contents of all files, for looking for secrets."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(f"{path} {path.read_bytes()!r}" for path in paths)


# --- Local paths ---


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)) == tmp_path
    (tmp_path / "a b.txt").write_text("x")
    assert fetch(f"file://{tmp_path}/a%20b.txt", "file") == tmp_path / "a b.txt"


def test_an_absent_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "models" / "quickstart").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean .*/models/quickstart\?"):
        fetch(str(tmp_path / "models" / "quikstart"))
    with pytest.raises(UserError, match=r"did you mean .*/models\?"):
        fetch(str(tmp_path / "model" / "quickstart"))
    with pytest.raises(UserError, match="hf:acme/tiny"):
        fetch("acme/tiny")


# --- HTTP ---


def test_http_is_cached_by_etag(server: FileServer) -> None:
    server.files["/a.txt"] = BODY
    first = fetch(f"{server.url}/a.txt", "file")
    assert first.read_bytes() == BODY
    assert first.name == "a.txt"
    assert first.parent.name == hashlib.sha256(BODY).hexdigest()
    assert fetch(f"{server.url}/a.txt", "file") == first
    assert server.answered("/a.txt") == [200, 304]
    server.files["/a.txt"] = b"new"
    assert fetch(f"{server.url}/a.txt", "file").read_bytes() == b"new"
    assert server.answered("/a.txt") == [200, 304, 200]


def test_without_a_validator_it_is_downloaded_again(server: FileServer) -> None:
    server.validators = False
    server.files["/a"] = b"one"
    fetch(f"{server.url}/a", "file")
    server.files["/a"] = b"two"
    assert fetch(f"{server.url}/a", "file").read_bytes() == b"two"


def test_a_broken_transfer_is_resumed_where_it_stopped(server: FileServer) -> None:
    server.files["/a"] = BODY
    server.cut["/a"] = [300_000, 100_000]
    assert fetch(f"{server.url}/a", "file").read_bytes() == BODY
    assert server.answered("/a") == [200, 206, 206]
    assert server.requests[1][2]["Range"] == "bytes=300000-"


def test_a_killed_download_is_resumed_by_the_next_process(server: FileServer) -> None:
    server.files["/a"] = BODY
    server.cut["/a"] = [200_000, 0]  # the second request brings nothing: it gives up
    with pytest.raises(UserError, match=r"ended after 200 kB of 1\.05 MB.*resumed"):
        fetch(f"{server.url}/a", "file")
    assert fetch(f"{server.url}/a", "file").read_bytes() == BODY
    assert server.requests[-1][2]["Range"] == "bytes=200000-"


def test_content_that_changed_is_not_glued_to_the_old(server: FileServer) -> None:
    server.files["/a"] = BODY
    server.cut["/a"] = [200_000, 0]
    with pytest.raises(UserError):
        fetch(f"{server.url}/a", "file")
    server.files["/a"] = bytes(reversed(BODY))
    assert fetch(f"{server.url}/a", "file").read_bytes() == bytes(reversed(BODY))
    assert server.answered("/a")[-1] == 200


def test_without_a_validator_a_broken_transfer_starts_again(server: FileServer) -> None:
    server.validators = False
    server.files["/a"] = BODY
    server.cut["/a"] = [200_000]
    assert fetch(f"{server.url}/a", "file").read_bytes() == BODY
    assert "Range" not in server.requests[-1][2]


def test_nothing_half_written_is_found(server: FileServer, cache: Path) -> None:
    server.files["/a"] = BODY
    server.cut["/a"] = [1000, 0]
    with pytest.raises(UserError):
        fetch(f"{server.url}/a", "file")
    assert not list(cache.glob("blobs/*/*"))


def test_absent_and_refused(server: FileServer) -> None:
    with pytest.raises(UserError, match="no such file \\(HTTP 404\\)"):
        fetch(f"{server.url}/nothing", "file")
    server.files["/a"] = b"x"
    server.status["/a"] = [403]
    with pytest.raises(UserError, match="refused \\(HTTP 403\\)"):
        fetch(f"{server.url}/a", "file")


def test_a_busy_server_is_asked_again(server: FileServer) -> None:
    server.files["/a"] = b"x"
    server.status["/a"] = [503, 503]
    assert fetch(f"{server.url}/a", "file").read_bytes() == b"x"
    server.status["/b"] = [500] * 9
    with pytest.raises(UserError, match="HTTP 500"):
        fetch(f"{server.url}/b", "file")


def test_a_slow_server_is_given_up(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    server.files["/a"] = b"x"
    server.delay["/a"] = 60.0
    with pytest.raises(UserError, match="timed out"):
        fetch(f"{server.url}/a", "file")


def test_checksum_is_enforced(server: FileServer, cache: Path) -> None:
    server.files["/a"] = BODY
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"sha256 is .*, not {wrong}"):
        fetch(f"{server.url}/a#sha256={wrong}", "file")
    assert not list(cache.glob("blobs/*/*"))
    right = hashlib.sha256(BODY).hexdigest()
    path = fetch(f"{server.url}/a#sha256={right}", "file")
    count = len(server.requests)
    assert fetch(f"{server.url}/a#sha256={right}", "file") == path
    assert len(server.requests) == count, "a copy with the right hash needs no server"


def test_a_damaged_copy_is_fetched_again(server: FileServer, notes: list[str]) -> None:
    server.files["/a"] = BODY
    path = fetch(f"{server.url}/a", "file")
    path.write_bytes(b"damaged")
    assert fetch(f"{server.url}/a", "file").read_bytes() == BODY
    assert "damaged" in notes[0]


def test_away_from_the_network_the_copy_is_used(notes: list[str]) -> None:
    with serving() as server:
        server.files["/a"] = BODY
        path = fetch(f"{server.url}/a", "file")
    assert fetch(f"{server.url}/a", "file") == path
    assert "using the cached copy" in notes[-1]
    with pytest.raises(UserError, match=r"/b: cannot be reached .*Connection refused.* no whole copy"):
        fetch(f"{server.url}/b", "file")


def test_a_wrong_hash_is_not_served_from_the_cache_when_offline() -> None:
    with serving() as server:
        server.files["/a"] = BODY
        fetch(f"{server.url}/a", "file")
    with pytest.raises(UserError, match="cannot be reached"):
        fetch(f"{server.url}/a#sha256={'1' * 64}", "file")


SECRETS = ("hunter22", "tok-abcdef", "sig+nature/x", "sig%2Bnature%2Fx", "bob-user")


def test_secrets_stay_out_of_errors_and_records(server: FileServer, cache: Path, notes: list[str]) -> None:
    host = server.url.removeprefix("http://")
    query = "token=tok-abcdef&X-Amz-Signature=sig%2Bnature%2Fx&part=7"
    url = f"http://bob-user:hunter22@{host}/a?{query}"
    server.login = "Basic Ym9iLXVzZXI6aHVudGVyMjI="
    server.files["/a"] = BODY
    fetch(url, "file")
    errors = []
    for bad in (
        url.replace("/a?", "/nothing?"),
        url.replace("hunter22", "hunter22x"),
        f"{url}#sha256={'0' * 64}",
        f"http://bob-user:hunter22@127.0.0.1:1/?{query}",
        f"zz://bob-user:hunter22@x/?{query}",
    ):
        with pytest.raises(UserError) as raised:
            fetch(bad, "file")
        errors.append(str(raised.value))
    shown = "\n".join([*errors, *notes, everything_in(cache)])
    for secret in SECRETS:
        assert secret not in shown
    assert "part=***" in shown, "negative control: the errors do show the URL"


def test_a_new_signature_finds_the_same_copy(server: FileServer) -> None:
    server.files["/a"] = BODY
    fetch(f"{server.url}/a?X-Amz-Signature=one&v=1", "file")
    fetch(f"{server.url}/a?X-Amz-Signature=two&v=1", "file")
    assert server.answered("/a") == [200, 304]
    fetch(f"{server.url}/a?X-Amz-Signature=two&v=2", "file")
    assert server.answered("/a")[-1] == 200, "another version is another file"


def test_a_password_is_not_carried_to_another_host(server: FileServer) -> None:
    with serving() as other:
        other.files["/b"] = b"x"
        server.redirect["/a"] = f"{other.url}/b"
        fetch(server.url.replace("//", "//bob:hunter22@") + "/a", "file")
        assert "Authorization" in server.requests[0][2]
        assert "Authorization" not in other.requests[0][2]


def _fetch_in_a_process(url: str) -> str:
    return str(fetch_file(url))


def test_processes_do_not_race(server: FileServer) -> None:
    server.files["/a"] = BODY
    server.delay["/a"] = 0.1
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(_fetch_in_a_process, [f"{server.url}/a"] * 4)
    assert len(set(paths)) == 1
    assert sorted(server.answered("/a")) == [200, 304, 304, 304]


# --- Models in folders ---

MODEL = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": b"weights"}


def test_a_model_over_http(server: FileServer, notes: list[str]) -> None:
    server.files |= {f"/m/{name}": body for name, body in MODEL.items()}
    folder = fetch(f"{server.url}/m/?v=1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL
    assert fetch(f"{server.url}/m?v=1") == folder
    assert server.answered("/m/model.safetensors") == [200, 304]


def test_a_sharded_model_over_http(server: FileServer) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    files |= {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    server.files |= {f"/m/{name}": body for name, body in files.items()}
    assert {path.name for path in fetch(f"{server.url}/m").iterdir()} == files.keys()
    index["weight_map"]["b"] = "../../x.safetensors"
    server.files["/m/model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(UserError, match="outside"):
        fetch(f"{server.url}/m")


def test_a_model_offline(notes: list[str]) -> None:
    with serving() as server:
        server.files |= {f"/m/{name}": body for name, body in MODEL.items()}
        folder = fetch(f"{server.url}/m")
    assert fetch(f"{server.url}/m") == folder
    assert "using the cached copy" in notes[-1]
    (folder / "config.json").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no whole copy"):
        fetch(f"{server.url}/m")


def test_a_folder_that_is_no_model(server: FileServer) -> None:
    with pytest.raises(UserError, match=r"m/config\.json: the server has no such file"):
        fetch(f"{server.url}/m")


# --- Object stores through fsspec ---


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_object_store_file(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/bucket/a.jsonl", BODY)
    path = fetch("memory://bucket/a.jsonl", "file")
    assert path.read_bytes() == BODY
    assert fetch("memory://bucket/a.jsonl", "file") == path
    memory.pipe("/bucket/a.jsonl", b"new")
    assert fetch("memory://bucket/a.jsonl", "file").read_bytes() == b"new"
    with pytest.raises(UserError, match="no such file"):
        fetch("memory://bucket/b", "file")
    with pytest.raises(UserError, match="is a folder"):
        fetch("memory://bucket", "file")


def test_object_store_model_without_pickles(memory: fsspec.AbstractFileSystem) -> None:
    for name, body in {**MODEL, "pytorch_model.bin": b"pickle", "notes.txt": b"x"}.items():
        memory.pipe(f"/bucket/m/{name}", body)
    folder = fetch("memory://bucket/m")
    assert {path.name for path in folder.iterdir()} == MODEL.keys()
    memory.pipe("/bucket/other/readme.txt", b"x")
    with pytest.raises(UserError, match=r"no config\.json"):
        fetch("memory://bucket/other")
    with pytest.raises(UserError, match="no such folder"):
        fetch("memory://bucket/none")


def test_an_object_store_that_breaks_off(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    memory.pipe("/bucket/a", BODY)
    path = fetch("memory://bucket/a", "file")

    def broken(*args: object, **kwargs: object) -> None:
        raise ConnectionError("token=tok-abcdef was not accepted in time")

    monkeypatch.setattr(type(memory), "info", broken)
    assert fetch("memory://bucket/a", "file") == path
    with pytest.raises(UserError, match="cannot be reached") as raised:
        fetch("memory://bucket/b?token=tok-abcdef", "file")
    assert "tok-abcdef" not in str(raised.value)


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="unknown protocol 'zz'"):
        fetch("zz://a/b", "file")


# --- The hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model in it, as huggingface_hub lays it out, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for name, body in MODEL.items():
        (snapshot / name).write_bytes(body)
    return snapshot


def test_hub_offline_with_a_copy(hub: Path) -> None:
    assert fetch("hf:acme/tiny") == hub
    assert fetch(f"hf:acme/tiny@{'a' * 40}") == hub
    assert fetch("hf:acme/tiny/config.json", "file").read_bytes() == b"{}"


def test_hub_offline_without_a_copy(hub: Path) -> None:
    with pytest.raises(UserError, match=r"hf:acme/other: the Hugging Face hub cannot be reached"):
        fetch("hf:acme/other")


def test_hub_pickles_are_refused(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        fetch("hf:acme/tiny")


def test_hub_names_are_checked() -> None:
    for bad in ("hf:", "hf:a b", "hf:a/b/c", "hf:a/b@"):
        with pytest.raises(UserError, match="expected hf:org/name"):
            fetch(bad)


def test_cache_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMA_CACHE")
    assert cache_root() == Path(os.path.expanduser("~/.cache/soma"))
