"""The MLflow tracker: read back by MLflow's own client, resumed, and out of the way when the server is."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soma.base import progress
from soma.train.mlflow_tracker import MlflowTracker
from tests.mlflow_db import empty_database


class Notes(progress.Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def notes() -> Iterator[list[str]]:
    reporter = Notes()
    with progress.use(reporter):
        yield reporter.texts


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return empty_database(tmp_path / "runs" / "mlflow.db")


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, experiment: str = "quickstart") -> list[Any]:
    reader = client(uri)
    return list(reader.search_runs([reader.get_experiment_by_name(experiment).experiment_id]))


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(uri).get_metric_history(run_id, name)]


def test_mlflows_own_client_reads_it(uri: str, tmp_path: Path, notes: list[str]) -> None:
    tracker = MlflowTracker(uri, "quickstart", "train")
    tracker.params({"optimizer": {"name": "adamw", "lr": 1e-3}, "sources": ["https://u:hunter22@h/x?token=abcdef"]})
    for step in range(3):
        tracker.log(step, {"loss": 3.0 - step, "loss@validation": float("nan")})
    (tmp_path / "report.html").write_text("report")
    tracker.artefact(tmp_path / "report.html")
    tracker.finish("finished")
    (run,) = runs_of(uri)
    assert (run.info.run_name, run.info.status, run.info.run_id) == ("train", "FINISHED", tracker.run_id)
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["sources"] == "['https://h/x?token=***']"
    assert history(uri, run.info.run_id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert len(history(uri, run.info.run_id, "loss_validation")) == 3
    assert [file.path for file in client(uri).list_artifacts(run.info.run_id)] == ["report.html"]
    assert (tmp_path / "runs" / "mlflow-artifacts").is_dir(), "artefacts lie beside the database"
    assert notes == []


def test_more_than_one_batch(uri: str) -> None:
    tracker = MlflowTracker(uri, "quickstart", "train", flush_seconds=60)
    for step in range(1500):
        tracker.log(step, {"loss": float(step), "rate": 1.0})
    tracker.params({f"p{index}": index for index in range(250)})
    tracker.finish("finished")
    (run,) = runs_of(uri)
    assert history(uri, run.info.run_id, "loss") == [(step, float(step)) for step in range(1500)]
    assert len(run.data.params) == 250


def test_it_writes_while_the_loop_runs(uri: str) -> None:
    tracker = MlflowTracker(uri, "quickstart", "train", flush_seconds=0.05)
    tracker.log(0, {"loss": 1.0})
    until = time.monotonic() + 120
    while not history(uri, tracker.run_id or "", "loss") and time.monotonic() < until:
        time.sleep(0.05)
    assert history(uri, tracker.run_id or "", "loss") == [(0, 1.0)]
    tracker.finish("interrupted")
    assert runs_of(uri)[0].info.status == "KILLED"


def test_a_killed_run_is_taken_up_again(uri: str) -> None:
    killed = MlflowTracker(uri, "quickstart", "train", key="abc")
    killed.params({"steps": 5})
    for step in range(4):
        killed.log(step, {"loss": float(step)})
    killed.flush()
    resumed = MlflowTracker(uri, "quickstart", "train", key="abc")
    assert resumed.run_id == killed.run_id
    resumed.params({"steps": 5})
    for step in range(2, 6):  # from its checkpoint on
        resumed.log(step, {"loss": float(step)})
    resumed.finish("finished")
    assert history(uri, killed.run_id or "", "loss") == [(step, float(step)) for step in range(6)]
    again = MlflowTracker(uri, "quickstart", "train", key="abc")
    assert again.run_id != killed.run_id, "a finished run is not written to again"
    again.finish("failed")
    killed.finish("failed")


def test_taken_up_by_run_id(uri: str) -> None:
    first = MlflowTracker(uri, "quickstart", "train")
    first.log(0, {"loss": 1.0})
    first.finish("failed")
    second = MlflowTracker(uri, "quickstart", "train", run_id=first.run_id)
    second.log(0, {"loss": 9.0})
    second.log(1, {"loss": 0.5})
    second.finish("finished")
    (run,) = runs_of(uri)
    assert (run.info.status, history(uri, run.info.run_id, "loss")) == ("FINISHED", [(0, 1.0), (1, 0.5)])


def test_a_server_that_is_away_is_one_notice(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker("http://bob:hunter22@127.0.0.1:9", "quickstart", "train", flush_seconds=0.02)
    asked, goes_on, ask = threading.Semaphore(0), threading.Event(), tracker.client.get_experiment_by_name

    def slow(*given: Any) -> Any:
        asked.release()
        assert goes_on.wait(120)
        return ask(*given)

    monkeypatch.setattr(tracker.client, "get_experiment_by_name", slow)
    tracker.log(0, {"loss": 1.0})
    assert asked.acquire(timeout=120)
    for step in range(1, 1000):
        tracker.log(step, {"loss": 1.0})
    assert len(tracker.pending) == 1000, "logging does not wait for the server"
    goes_on.set()
    tracker.params({"steps": 1})
    tracker.artefact(Path("nothing"))
    for _ in range(3):
        assert asked.acquire(timeout=120), "it is asked again and again"
    tracker.finish("finished")
    assert len(notes) == 2
    assert "the work goes on without it" in notes[0]
    assert notes[1] == "MLflow http://127.0.0.1:9: 1000 values were not delivered; logs/metrics.jsonl has them"
    assert "hunter22" not in "".join(notes)


def test_what_was_collected_is_sent_when_the_server_is_back(
    uri: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    tracker = MlflowTracker(uri, "quickstart", "train", flush_seconds=60)
    real = tracker.client.log_batch

    def away(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(tracker.client, "log_batch", away)
    tracker.log(0, {"loss": 1.0})
    assert not tracker.flush()
    tracker.log(1, {"loss": 0.5})
    assert not tracker.flush()
    assert len(notes) == 1
    monkeypatch.setattr(tracker.client, "log_batch", real)
    tracker.finish("finished")
    assert history(uri, tracker.run_id or "", "loss") == [(0, 1.0), (1, 0.5)]
    assert len(notes) == 1


def test_a_parameter_that_changed_does_not_stop_the_rest(uri: str, notes: list[str]) -> None:
    first = MlflowTracker(uri, "quickstart", "train", key="abc")
    first.params({"steps": 5})
    first.finish("failed")
    second = MlflowTracker(uri, "quickstart", "train", key="abc")
    second.params({"steps": 6})
    second.log(0, {"loss": 1.0})
    second.finish("finished")
    assert history(uri, second.run_id or "", "loss") == [(0, 1.0)]
    assert len(notes) == 1
