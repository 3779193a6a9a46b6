"""What the cache of remote files holds, and forgetting it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from soma.base.cache import cache_root, clear_cache, list_cache
from soma.base.fetch import fetch
from tests.base.file_server import FileServer, serving

BODY = bytes(range(256)) * 64


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path / "cache"))
    with serving() as files:
        yield files


def test_list_and_clear(server: FileServer) -> None:
    assert list_cache() == []
    assert clear_cache() == 0
    server.files["/a.bin"] = BODY
    server.files["/same.bin"] = BODY
    server.files["/b.bin"] = BODY[:100]
    for name in ("a.bin", "same.bin", "b.bin"):
        fetch(f"{server.url}/{name}", kind="file")
    assert [(one.url, one.bytes) for one in list_cache()] == [
        (f"{server.url}/a.bin", len(BODY)), (f"{server.url}/b.bin", 100), (f"{server.url}/same.bin", len(BODY)),
    ]  # fmt: skip
    assert all(one.path.exists() and one.fetched for one in list_cache())
    assert clear_cache(f"{server.url}/a*") == len(BODY)
    assert fetch(f"{server.url}/same.bin", kind="file").read_bytes() == BODY, "another address has the same content"
    assert server.answered("/same.bin") == [200, 304]
    assert clear_cache("*/same.bin") == len(BODY)
    assert [one.url for one in list_cache()] == [f"{server.url}/b.bin"]
    (cache_root() / "partial").mkdir(exist_ok=True)
    (cache_root() / "partial" / "x").write_bytes(b"1234")
    assert clear_cache() >= 104
    assert list_cache() == []
    assert fetch(f"{server.url}/b.bin", kind="file").read_bytes() == BODY[:100]


def test_a_model_keeps_its_files(server: FileServer) -> None:
    server.files["/m/config.json"] = b"{}"
    server.files["/m/model.safetensors"] = BODY
    folder = fetch(f"{server.url}/m")
    server.files["/other.bin"] = b"other"
    fetch(f"{server.url}/other.bin", kind="file")
    clear_cache("*/other.bin")
    assert (folder / "model.safetensors").read_bytes() == BODY
    assert fetch(f"{server.url}/m") == folder
    assert [one.url for one in list_cache()] == [f"{server.url}/m"]
    clear_cache("*/m")
    assert not folder.exists()
    assert list_cache() == []
