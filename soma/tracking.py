"""MLflow for a whole run: parameters and the metrics of each training stage, the finished model in the registry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from soma.base import progress
from soma.base.artefact import json_hash
from soma.base.errors import UserError
from soma.base.registry import default_uri, register_model
from soma.base.runs import flatten
from soma.recipe import Recipe
from soma.train.tracking import NullTracker, Tracker


class Trackers(Protocol):
    """Gives each training stage its tracker."""

    def for_stage(self, stage: str) -> Tracker: ...


class StageTracker:
    """The part of a run's MLflow record that one stage writes: metrics under `STAGE/NAME`."""

    def __init__(self, stage: str, tracker: Tracker) -> None:
        self.stage, self.tracker = stage, tracker

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings that the stage settled on, beside the recipe's."""
        self.tracker.params({self.stage: dict(values)})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers measured at a step."""
        self.tracker.log(step, {f"{self.stage}/{name}": value for name, value in metrics.items()})

    def artefact(self, path: Path) -> None:
        """A file or folder that the stage made."""
        self.tracker.artefact(path)


class Tracking:
    """One run's record with MLflow, begun when the first stage is made; a run that finds all cached adds none."""

    def __init__(self, recipe: Recipe, runs: Path) -> None:
        self.recipe = recipe
        self.enabled = recipe.tracking.enabled
        self.uri = recipe.tracking.uri or default_uri(runs)
        self.tracker: Any = None

    def for_stage(self, stage: str) -> Tracker:
        """Where a stage that is about to be made writes its numbers."""
        if self.enabled and self.tracker is None:
            self._begin()
        return StageTracker(stage, self.tracker) if self.enabled else NullTracker()

    def _begin(self) -> None:
        from soma.train.mlflow_tracker import MlflowTracker

        settings = self.recipe.model_dump(mode="json", exclude_unset=True)
        try:
            self.tracker = MlflowTracker(self.uri, self.recipe.name, self.recipe.name, key=json_hash(settings))
        except UserError as error:
            self._off(error)
            return
        self.tracker.params(flatten(settings))

    def _off(self, error: UserError) -> None:
        self.enabled = False
        progress.current().note(f"MLflow is off: {error}")

    def record(self, metrics: Mapping[str, float]) -> None:
        """Final figures of a stage."""
        if self.tracker is not None and metrics:
            self.tracker.log(0, metrics)

    def finish(self, status: str, model: Path | None, lineage: Mapping[str, str], report: Path | None) -> str | None:
        """Close the record; a finished run's model is registered. Its `NAME@VERSION`, or None."""
        registered = None
        if self.enabled and status == "finished" and model is not None:
            name = self.recipe.tracking.register_as or self.recipe.name
            try:
                run_id = self.tracker.run_id if self.tracker is not None else None
                registered = f"{name}@{register_model(self.uri, name, model, lineage, run_id)}"
            except UserError as error:
                self._off(error)
        if self.tracker is not None:
            if report is not None:
                self.tracker.artefact(report)
            self.tracker.finish(status)
        return registered
