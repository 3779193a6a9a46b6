"""Search a recipe's settings with Optuna: TPE proposals, asynchronous successive halving, one SQLite study.

The study is `RUNS/NAME-sweep/study.db`. Several processes may work on it; one that is killed loses its trial, which the
others repeat. A trial makes the recipe's stages up to the one that has the objective among its figures, in the common
store: what trials share (corpus, tokens) is made once, a trial that is repeated goes on from its last checkpoint, and
the winner's stages are there for `soma run`.
Asynchronous halving is arXiv:1810.05934: at every rung a trial goes on if it is among the best 1/`reduction` there so
far.
"""

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.artefact import json_hash, write_json
from soma.base.disk import chain, full
from soma.base.errors import UserError
from soma.base.locks import lock
from soma.recipe import Recipe, load
from soma.run import Planned, build_until, plan
from soma.sweep.page import write_page
from soma.sweep.space import parse_space
from soma.sweep.verdict import judge
from soma.train.tracking import NullTracker, Tracker

HEARTBEAT = 30  # seconds; a trial whose process was silent for twice as long is repeated


@dataclass(frozen=True)
class Sweep:
    """One search. `over` and `overrides` as on the command line; `objective` is a figure that gets lower."""

    recipe: Path
    over: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    objective: str = "train_validation_loss"
    runs: Path = Path("runs")
    seed: int = 0
    reduction: int = 3

    def load(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with a trial's values over it."""
        return load(self.recipe, [*self.overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.load({}).name}-sweep"

    @property
    def identity(self) -> str:
        """Hash of what every trial of a study must share."""
        recipe = self.load({}).model_dump(mode="json")
        return json_hash([recipe, sorted(self.over), self.objective])


@dataclass(frozen=True)
class Outcome:
    """What a sweep found: figures per trial, the winner, and over how many seeds it was held against the recipe."""

    folder: Path
    trials: list[dict[str, Any]]
    best: dict[str, Any]
    value: float
    seeds: dict[str, list[float]]
    verdict: dict[str, Any] | None

    def headline(self) -> list[str]:
        """The result in a few lines."""
        states = [trial["state"] for trial in self.trials]
        settings = " ".join(f"--set {key}={json.dumps(value)}" for key, value in self.best.items())
        lines = [
            f"{len(states)} trials ({states.count('pruned')} stopped early, {states.count('failed')} failed); "
            f"best {self.value:.4f} with {settings}"
        ]
        if self.verdict is not None:
            one = self.verdict
            word = "better than" if one["is_better"] else "NOT shown to be better than"
            lines.append(
                f"over {len(self.seeds['winner'])} seeds the winner is {word} the recipe as written: "
                f"{one['after']:.4f} against {one['before']:.4f}, a gain of {one['gain']:.4f} where chance alone makes "
                f"{one['noise']:.4f}"
            )
        return [*lines, f"Report: {self.folder / 'report.html'}"]


class Pruning:
    """The tracker of a trial: reports held-out losses to Optuna and ends a trial that is behind."""

    def __init__(self, trial: Any, objective: str) -> None:
        self.trial, self.objective = trial, objective

    def for_stage(self, stage: str) -> Tracker:
        """Losses of the stage that the objective is of; other stages run to their end."""
        return self if self.objective == f"{stage}_validation_loss" else NullTracker()

    def params(self, values: Mapping[str, Any]) -> None:
        """The study has them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a held-out loss; raises optuna.TrialPruned where the trial need not go on."""
        from optuna import TrialPruned

        if (loss := metrics.get("validation_loss")) is None or not math.isfinite(loss):
            return
        self.trial.report(loss, step)
        if self.trial.should_prune():
            raise TrialPruned(f"behind at step {step}")

    def artefact(self, path: Path) -> None:
        """It stays in the store."""


class Silent:
    """The tracker of runs that are repeated with other seeds."""

    def for_stage(self, stage: str) -> Tracker:
        return NullTracker()


def sweep(search: Sweep, *, trials: int, workers: int = 1, seeds: int = 3) -> Outcome:
    """Run until the study has `trials` trials, then hold the winner against the recipe over `seeds` seeds.

    The same call goes on with the study that is there. `workers` processes work on it, this one among them. `seeds` 0
    judges nothing. Raises UserError for a space or objective that does not fit the recipe, and for a study of another.
    """
    check(search)
    search.folder.mkdir(parents=True, exist_ok=True)
    open_study(search)
    others = [_start_worker(search, trials) for _ in range(workers - 1)]
    try:
        work(search, trials)
    finally:
        for other in others:
            other.wait()
            assert other.stdin is not None
            other.stdin.close()
    outcome = settle(search, seeds)
    write_json(search.folder / "sweep.json", asdict(outcome) | {"folder": search.folder.name, **describe(search)})
    write_page(search.folder / "report.html", search.load({}).name, search.objective, parse_space(search.over), outcome)
    return outcome


def describe(search: Sweep) -> dict[str, Any]:
    """What was searched, as JSON."""
    return {
        "recipe": search.recipe.name, "over": list(search.over), "overrides": list(search.overrides),
        "objective": search.objective, "seed": search.seed, "reduction": search.reduction,
    }  # fmt: skip


def check(search: Sweep) -> None:
    """Raise UserError unless every key is one of the recipe's and the ends of each range are allowed."""
    for key, values in parse_space(search.over).items():
        for value in values.values if hasattr(values, "values") else (values.low, values.high):
            search.load({key: value})


def open_study(search: Sweep) -> Any:
    """The study, made if absent, with the recipe as written as its first trial where the space holds it."""
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with lock(search.folder / ".study.lock"), _usable(search.folder / "study.db"):
        storage = RDBStorage(
            f"sqlite:///{search.folder.resolve() / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=HEARTBEAT, grace_period=2 * HEARTBEAT,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=2),
        )  # fmt: skip
        study = optuna.create_study(
            storage=storage, study_name="sweep", load_if_exists=True, direction="minimize",
            sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=_seed(search)),
            pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=search.reduction),
        )  # fmt: skip
        identity = study.user_attrs.get("identity")
        if identity is None:
            study.set_user_attr("identity", search.identity)
            space = parse_space(search.over)
            written = {key: _written(search.load({}), key) for key in space}
            if all(space[key].holds(value) for key, value in written.items()):
                study.enqueue_trial(written)
        elif identity != search.identity:
            raise UserError(
                f"{search.folder}: holds the study of another recipe, space or objective; move it away or give the "
                "recipe another name"
            )
    return study


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Raises UserError where the study's file is no database, or cannot be written; a full disk is told elsewhere."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        if full(error) is not None:
            raise
        reason = next((one for one in chain(error) if isinstance(one, sqlite3.Error)), error)
        raise UserError(
            f"{path}: the study cannot be used ({reason}). Make it writable; if it is broken, move it away: what "
            "trials made stays in the store, and a search that comes to the same values finds it"
        ) from error


def _seed(search: Sweep) -> int:
    """Workers that started alike would propose alike: each draws from a seed of its own place in the study."""
    folder = search.folder / "workers"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir()))
    (folder / str(number)).touch()
    return search.seed + number


def _written(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def work(search: Sweep, trials: int) -> None:
    """Run trials until the study has `trials` that ended by themselves."""
    import optuna

    study, done = open_study(search), (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if len(study.get_trials(states=done)) >= trials:
        return
    study.optimize(
        lambda trial: run_trial(search, trial), catch=(UserError, FloatingPointError),
        callbacks=[optuna.study.MaxTrialsCallback(trials, states=done), _stop_if_all_fail],
    )  # fmt: skip


def _stop_if_all_fail(study: Any, trial: Any) -> None:
    """Five failures and nothing else is a mistake in the recipe, not bad luck."""
    trials = study.get_trials(deepcopy=False)
    failed = [one for one in trials if one.state.name == "FAIL"]
    if len(failed) >= 5 and not any(one.state.name in ("COMPLETE", "PRUNED") for one in trials):
        raise UserError(f"the first {len(failed)} trials failed, the last with: {trial.user_attrs.get('error', '?')}")


def run_trial(search: Sweep, trial: Any) -> float:
    """One trial: draw values, make the stages, give the objective. Raises optuna.TrialPruned, UserError."""
    from optuna import TrialPruned

    values = {key: space.draw(trial, key) for key, space in parse_space(search.over).items()}
    recipe = search.load(values)
    progress.current().note(f"trial {trial.number}: {_shown(values)}")
    try:
        value = measure(recipe, search, Pruning(trial, search.objective))
    except TrialPruned as reason:
        _drop_work(plan(recipe, search.runs))
        progress.current().note(f"trial {trial.number}: stopped, {reason}")
        raise
    except (UserError, FloatingPointError) as error:
        trial.set_user_attr("error", str(error))
        progress.current().note(f"trial {trial.number}: failed, {error}")
        raise
    progress.current().note(f"trial {trial.number}: {search.objective} {value:.4f}")
    return value


def measure(recipe: Recipe, search: Sweep, tracking: Any) -> float:
    """The objective of a recipe, its stages made as far as need be."""
    figures = build_until(recipe, search.runs, lambda found: search.objective in found, tracking)
    value = figures.get(search.objective)
    if value is None:
        raise UserError(f"no stage gives {search.objective!r}; there are {', '.join(sorted(figures))}")
    if not math.isfinite(value):
        raise FloatingPointError(f"{search.objective} is {value}")
    return float(value)


def _drop_work(stages: Sequence[Planned]) -> None:
    """A trial that was stopped will not be resumed: its checkpoints go."""
    for item in stages:
        if not item.cached:
            shutil.rmtree(item.work, ignore_errors=True)


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _start_worker(search: Sweep, trials: int) -> "subprocess.Popen[bytes]":
    """It reads a pipe from us and ends with it, so kill -9 of this process ends it too."""
    options = [f"--over={one}" for one in search.over] + [f"--set={one}" for one in search.overrides]
    command = [sys.executable, "-m", "soma.cli", "sweep", str(search.recipe), *options, "--runs", str(search.runs)]
    command += ["--objective", search.objective, "--trials", str(trials), "--seed", str(search.seed)]
    return subprocess.Popen([*command, "--reduction", str(search.reduction), "--worker"], stdin=subprocess.PIPE)


def settle(search: Sweep, seeds: int) -> Outcome:
    """The study's result; with seeds, the winner and the recipe as written run with each of them."""
    study = open_study(search)
    names = {"COMPLETE": "complete", "PRUNED": "pruned"}
    listed = [
        {
            "number": trial.number, "state": names.get(trial.state.name, "failed"),
            "value": trial.value if trial.state.name == "COMPLETE" else None, "values": trial.params,
            "curve": sorted(trial.intermediate_values.items()), "error": trial.user_attrs.get("error"),
        }
        for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()
    ]  # fmt: skip
    if not any(trial["state"] == "complete" for trial in listed):
        raise UserError(f"{search.folder}: no trial came to its end")
    best, value = study.best_params, float(study.best_value)
    figures: dict[str, list[float]] = {"recipe": [], "winner": []}
    written = search.load({})
    trained = [block for block in ("train", "tune", "prefer") if getattr(written, block) is not None]
    for offset in range(1, 1 + (seeds if seeds > 1 else 0)):
        # Seeds that no trial ran with: the winner was chosen for its luck with that one. The data stay the same.
        seed = {f"{block}.seed": written.seed + offset for block in trained}
        for name, values in (("recipe", {}), ("winner", best)):
            progress.current().note(f"{name}, seed {written.seed + offset}")
            figures[name].append(measure(search.load(values | seed), search, Silent()))
    verdict = asdict(judge(figures["recipe"], figures["winner"])) if figures["recipe"] else None
    return Outcome(search.folder, listed, dict(best), value, figures, verdict)
