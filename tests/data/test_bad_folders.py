"""Folders that may not be read, and links that lead nowhere: told, not passed over in silence."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from soma.base.errors import UserError
from soma.data.sources import Item, Skipped, list_items


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be read, by root neither, beside one that may."""
    for name in ("docs/a", "docs/locked", "docs/z"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text.md").write_text("A text.")
    folder, scan = tmp_path / "docs" / "locked", os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return folder


def test_a_folder_below_is_set_aside(locked: Path) -> None:
    found = list(list_items([str(locked.parent)]))
    assert [one.name for one in found if isinstance(one, Item)] == ["a/text.md", "z/text.md"]
    assert [one for one in found if isinstance(one, Skipped)] == [
        Skipped("locked", "unreadable", "a folder: permission denied")
    ]


def test_the_source_itself_is_an_error(locked: Path) -> None:
    with pytest.raises(UserError, match=r"locked: this folder cannot be read \(permission denied\)"):
        list(list_items([str(locked)]))


def test_links_in_a_circle(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("A text.")
    (docs / "loop").symlink_to(docs, target_is_directory=True)
    (docs / "one.md").symlink_to(docs / "two.md")
    (docs / "two.md").symlink_to(docs / "one.md")
    found = list(list_items([str(docs)]))
    assert [one.name for one in found if isinstance(one, Item)] == ["a.md"]
    skipped = [one for one in found if isinstance(one, Skipped)]
    assert [(one.name, one.reason) for one in skipped] == [("one.md", "unreadable"), ("two.md", "unreadable")]
    with pytest.raises(UserError, match=r"one\.md: no such file or folder"):
        list(list_items([str(docs / "one.md")]))
