"""MLflow for a whole run: parameters at the start, metrics of each training stage, the finished model at the end."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.recipe import Recipe


class Tracking:
    """Records nothing: what a run gets with `tracking.enabled: false`, or without the extra."""

    def for_stage(self, name: str) -> Any:
        """The `Tracker` that a training stage writes to."""
        from soma.train.tracking import NullTracker

        return NullTracker()

    def register(self, artefacts: Mapping[str, Path], record: Mapping[str, Any]) -> dict[str, Any]:
        """Register the finished model; what to add to the run's record."""
        return {}

    def finish(self, status: str) -> None:
        """The run is over."""
