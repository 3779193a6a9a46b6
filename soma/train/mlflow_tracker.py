"""A `Tracker` that writes to MLflow, beside the training loop and never in its way.

Metrics are collected and written by a thread of their own, one batch every few seconds. When the server is away the
training goes on: one notice, what was collected is sent when it is back, and logs/metrics.jsonl has everything anyway.
"""

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.registry import mlflow_client
from soma.base.runs import flatten
from soma.base.secrets import redact, redact_url, scrub

FLUSH_SECONDS = 5.0
BATCH = 1000  # metrics that MLflow takes in one call
KEPT = 100_000  # metrics kept while the server is away; older ones are in metrics.jsonl
RESUME_TAG = "soma.key"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MlflowTracker:
    """Records one MLflow run.

    uri: `sqlite:///…` or an MLflow server. key: what the run does (a stage's key): a run with the same key that did not
    finish is taken up again, and steps that it already has are not written twice. run_id: take up exactly this run.
    Raises UserError where MLflow is not installed; a server that does not answer is a notice, not an error.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        key: str | None = None,
        run_id: str | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.uri, self.experiment, self.run_name, self.key = uri, experiment, run_name, key
        self.run_id = run_id
        self.client = mlflow_client(uri)
        self.pending: list[tuple[str, float, int, int]] = []
        self.settings: dict[str, str] = {}
        self.last_step: dict[str, int] = {}
        self.resumed = run_id is not None
        self.opened = False
        self.told = False
        self.guard = threading.Lock()  # of `pending` and `settings`
        self.writing = threading.Lock()
        self.over = threading.Event()
        self.flush_seconds = flush_seconds
        self.flush()
        self.thread = threading.Thread(target=self._write_until_over, name="mlflow", daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Collect metrics of a step. Returns at once."""
        now = int(time.time() * 1000)
        with self.guard:
            self.pending += [(_name(name), float(value), now, step) for name, value in metrics.items()]
            del self.pending[:-KEPT]

    def params(self, params: Mapping[str, Any]) -> None:
        """Collect parameters; nested ones get dotted names, secrets in URLs are hidden."""
        flat = {_name(key): str(value)[:6000] for key, value in flatten(redact(dict(params))).items()} if params else {}
        with self.guard:
            self.settings |= flat

    def artefact(self, path: Path) -> None:
        """Copy a file or folder to the run's artefacts."""
        from mlflow.exceptions import MlflowException

        self.flush()
        if not self.opened:
            return
        try:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            else:
                self.client.log_artifact(self.run_id, str(path))
        except (MlflowException, OSError) as error:
            self._notice(error)

    def finish(self, status: str) -> None:
        """Write what is left and close the run: "finished", "failed" or "interrupted"."""
        from mlflow.exceptions import MlflowException

        self.over.set()
        self.thread.join()
        self.flush()
        if self.opened:
            try:
                self.client.set_terminated(self.run_id, STATUS[status])
            except MlflowException as error:
                self._notice(error)
        if self.pending:
            text = f"MLflow {redact_url(self.uri)}: {len(self.pending)} values were not delivered"
            progress.current().note(f"{text}; logs/metrics.jsonl has them")

    def flush(self) -> bool:
        """Write what has been collected. False, with one notice, where the server does not take it."""
        from mlflow.exceptions import MlflowException

        with self.writing:
            try:
                if not self.opened:
                    self._open()
                self._write_params()
                self._write_metrics()
            except (MlflowException, OSError) as error:
                self._notice(error)
                return False
        self.told = False
        return True

    def _write_until_over(self) -> None:
        while not self.over.wait(self.flush_seconds):
            if self.pending or self.settings:
                self.flush()

    def _open(self) -> None:
        """Find or make the experiment and the run."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else self._new_experiment()
        if self.run_id is None and self.key is not None:
            query = f"tags.`{RESUME_TAG}` = '{self.key}' and attributes.status != 'FINISHED'"
            found = self.client.search_runs([experiment_id], query, max_results=1)
            self.run_id = found[0].info.run_id if found else None
            self.resumed = self.run_id is not None
        if self.run_id is None:
            tags = {RESUME_TAG: self.key} if self.key else {}
            self.run_id = self.client.create_run(experiment_id, run_name=self.run_name, tags=tags).info.run_id
        elif self.resumed:
            self.client.update_run(self.run_id, status="RUNNING")
        self.opened = True

    def _new_experiment(self) -> str:
        """SQLite keeps the artefacts beside itself; a server decides on its own."""
        location = None
        if self.uri.startswith("sqlite:///"):
            location = (Path(self.uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts").as_uri()
        return str(self.client.create_experiment(self.experiment, artifact_location=location))

    def _write_params(self) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        with self.guard:
            settings = dict(self.settings)
        items = list(settings.items())
        for start in range(0, len(items), 100):  # MLflow takes a hundred at a time
            try:
                batch = [Param(key, value) for key, value in items[start : start + 100]]
                self.client.log_batch(self.run_id, params=batch)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                self._notice(error)  # a parameter cannot change; the run goes on with those that it had
        with self.guard:
            self.settings = {key: value for key, value in self.settings.items() if settings.get(key) != value}

    def _write_metrics(self) -> None:
        from mlflow.entities import Metric

        while self.pending:
            with self.guard:
                batch, self.pending = self.pending[:BATCH], self.pending[BATCH:]
            try:
                new = [Metric(*values) for values in batch if values[3] > self._last_step(values[0])]
                if new:
                    self.client.log_batch(self.run_id, metrics=new)
            except BaseException:
                with self.guard:
                    self.pending = batch + self.pending
                raise

    def _last_step(self, name: str) -> int:
        """The last step that a resumed run has of a metric, -1 if none: up to there the values are the same."""
        if name not in self.last_step:
            history = self.client.get_metric_history(self.run_id, name) if self.resumed else []
            self.last_step[name] = max((metric.step for metric in history), default=-1)
        return self.last_step[name]

    def _notice(self, error: Exception) -> None:
        if not self.told:
            self.told = True
            reason = (scrub(str(error), self.uri).splitlines() or [type(error).__name__])[0][:200]
            progress.current().note(f"MLflow {redact_url(self.uri)}: {reason}; the work goes on without it")


def _name(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w.\- /:]", "_", name)[:250]
