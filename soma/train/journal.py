"""The log of a run: one JSON object a line, in the work folder while it runs, in the artefact's `logs/` after it."""

import json
import os
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.train.tracking import Tracker


class Journal:
    """Appends records to `path` and hands their numbers to the tracker.

    A record has `event` ("train", "evaluate", "sample", "note"), `step` and what belongs to the event.
    """

    def __init__(self, path: Path, tracker: Tracker, enabled: bool) -> None:
        self.path, self.tracker, self.enabled = path, tracker, enabled

    def start(self, size: int) -> None:
        """Go on after the first `size` bytes: what a killed run wrote after its last checkpoint is cut off."""
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            if self.path.stat().st_size > size:
                os.truncate(self.path, size)

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one record."""
        if not self.enabled:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "step": step, **fields}, ensure_ascii=False) + "\n")
        numbers = {key: float(value) for key, value in fields.items() if isinstance(value, int | float)}
        if numbers:
            self.tracker.log(step, numbers)
        progress.current().event(event, step=step, **fields)

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.enabled else 0
