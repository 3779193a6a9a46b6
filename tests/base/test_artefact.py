"""Artefact folders: hashes over content alone, and nothing half-written under a final name."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from soma.base.artefact import (
    building,
    content_files,
    content_hash,
    directory_bytes,
    file_hash,
    hash_lines,
    json_hash,
    publish,
    read_json,
    write_json,
    write_text,
)
from soma.base.errors import UserError


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_hashes_of_values() -> None:
    assert json_hash({"a": 1, "b": [1, 2]}) == json_hash({"b": [1, 2], "a": 1})
    assert json_hash({"a": [1, 2]}) != json_hash({"a": [2, 1]})
    assert json_hash({}) == hashlib.sha256(b"{}").hexdigest()
    assert hash_lines(["ab"]) != hash_lines(["a", "b"])


def test_content_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    one = content_hash(fill(tmp_path / "1", a="x", b__c="y"))
    assert content_hash(fill(tmp_path / "2", b__c="y", a="x")) == one
    assert content_hash(fill(tmp_path / "3", a="y", b__c="x")) != one
    assert content_hash(fill(tmp_path / "4", a="x", b="y")) != one
    assert content_hash(fill(tmp_path / "5", a="x", b__c="y", d="")) != one


def test_logs_and_lineage_lie_outside_the_content(tmp_path: Path) -> None:
    before = content_hash(fill(tmp_path, a="x", b__logs__c="inner folders of that name do count"))
    fill(tmp_path, logs__metrics="1", checkpoint__x="2")
    (tmp_path / "run.json").write_text("{}")
    assert content_hash(tmp_path) == before
    assert [path.relative_to(tmp_path).as_posix() for path in content_files(tmp_path)] == ["a", "b/logs/c"]


def test_file_hash_of_more_than_a_chunk(tmp_path: Path) -> None:
    body = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(body)
    assert file_hash(tmp_path / "a") == hashlib.sha256(body).hexdigest()


def test_directory_bytes_follows_no_links(tmp_path: Path) -> None:
    fill(tmp_path / "a", x="12345", y__z="123")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert directory_bytes(tmp_path / "a") == 8


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, None]})
    assert read_json(path) == {"ü": [1, None]}
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=r"a\.json: not valid JSON .*line 2"):
        read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_building_publishes_only_what_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "store" / "a"
    with pytest.raises(UnicodeEncodeError), building(final) as folder:
        write_text(fill(folder, a="half") / "b", "\ud800")
    assert not final.exists()
    with building(final) as folder:
        fill(folder, a="whole")
        assert not final.exists()
    assert (final / "a").read_text() == "whole"
    with building(final) as folder:
        fill(folder, b="newer")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in final.parent.iterdir()] == ["a"]


def test_publish_replaces(tmp_path: Path) -> None:
    publish(fill(tmp_path / "t1", a="1"), tmp_path / "x" / "final")
    publish(fill(tmp_path / "t2", a="2"), tmp_path / "x" / "final")
    assert (tmp_path / "x" / "final" / "a").read_text() == "2"


KILLED = """
import os, sys
from pathlib import Path
from soma.base.artefact import building
with building(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
