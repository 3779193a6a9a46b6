"""Where a training stage reports to, beside its own log. `mlflow_tracker.py` has the one for MLflow. Loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes a run's parameters, metrics and files."""

    def params(self, values: Mapping[str, Any]) -> None:
        """The run's settings, once."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers measured at a step."""

    def artefact(self, path: Path) -> None:
        """A file or folder that the run made."""


class NullTracker:
    """Reports to nobody."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Drop them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Drop them."""

    def artefact(self, path: Path) -> None:
        """Drop it."""
