"""A feature server that speaks Feast's API, and a stand-in for Feast's program; `needs_feast` for the real ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gateway_tools import Scripted

FEAST = os.environ.get("SOMA_FEAST_ENV", "")
needs_feast = pytest.mark.skipif(
    not (Path(FEAST) / "bin" / "python").exists() or not FEAST,
    reason="SOMA_FEAST_ENV names no environment with Feast (`soma features init` makes one in the cache)",
)
VIEW = {
    "name": "answer", "keys": ["question"], "features": ["answer", "since"], "event_time": "event_time",
    "created_time": "created_time", "ttl": None, "online": True, "path": "data/answers.parquet", "mapped": False,
}  # fmt: skip
PROGRAM = """#!/bin/sh
# $1 is -P, $2 the script; what it would be asked is kept, what it would say is in a file
echo "$3 $PYTHONPATH" >> FOLDER/asked
case "$3" in
  describe) cat FOLDER/views.json ;;
  write) cp "$5"/*.parquet FOLDER/ ;;
  serve) echo "no Feast here" >&2; exit 3 ;;
  apply) if [ -e FOLDER/refuse ]; then echo "ValueError: no such entity" >&2; exit 1; fi ;;
esac
"""


def stand_in(folder: Path, views: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose interpreter says what it is told; `folder` keeps what it was asked and given."""
    program = folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.replace("FOLDER", str(folder)))
    program.chmod(0o755)
    (folder / "views.json").write_text(json.dumps(views))
    monkeypatch.setenv("SOMA_FEAST_ENV", str(folder))
    return folder


class FeatureServer(Scripted):
    """POST /get-online-features as Feast 0.67 answers it. `rows`: features by the key `question`."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.rows = rows
        self.statuses: dict[str, str] = {}  # of a question, in place of PRESENT
        self.reply: Callable[[dict[str, Any]], web.Response] | None = None

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/get-online-features", self._handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def say(self, request: web.Request, value: dict[str, Any]) -> web.Response:
        if self.reply is not None:
            return self.reply(value)
        questions = value["entities"]["question"]
        names, results = ["question"], [{"values": questions, "statuses": ["PRESENT"] * len(questions)}]
        for reference in value["features"]:
            view, feature = reference.split(":")
            found = [self.rows.get(question, {}).get(feature) for question in questions]
            statuses = [self.statuses.get(question, "NOT_FOUND" if each is None else "PRESENT")
                        for question, each in zip(questions, found, strict=True)]  # fmt: skip
            names.append(f"{view}__{feature}")
            results.append({"values": found, "statuses": statuses})
        return web.json_response({"metadata": {"feature_names": names}, "results": results})
