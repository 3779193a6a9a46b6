"""Checkpoints: `step-N` folders written whole or not at all, checked before they are believed.

checkpoints/step-00000100/
  state/            torch.distributed.checkpoint: weights and optimizer state by parameter name
  run.json          step, data position, decisions, log position …: what the trainer put in
  random-00000.json random state of rank 0
  manifest.json     size and sha256 of every other file; written last
"""

import base64
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from soma.base import progress
from soma.base.artefact import directory_bytes, file_hash, publish, read_json, write_json
from soma.base.disk import full
from soma.base.errors import UserError
from soma.base.units import human_bytes
from soma.model.quantized import QuantizedLinear
from soma.train.optim import allocate_state
from soma.train.parallel.flat import kept_piece
from soma.train.parallel.zero import whole_of
from soma.train.snapshot import Background, Snapshot
from soma.train.world import World

NAME = re.compile(r"step-(\d+)")
# DCP's warning that one process saves or loads alone: it does so on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    directory: Path
    keep: int
    world: World
    in_background: bool = False
    snapshot: Snapshot = field(default_factory=Snapshot)
    background: Background = field(default_factory=Background)
    groups: list[dist.ProcessGroup] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    def steps(self) -> list[int]:
        """Steps of the folders there are, whole or torn, in rising order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(match[1]) for path in self.directory.iterdir() if (match := NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.directory / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        """Folder of a checkpoint that is being written. It has a name of its own in each start of the job: a rank that
        an earlier one has left behind, on another machine perhaps, must not write into ours."""
        return self.directory / f".step-{step:08d}.{self.marks[0]}.tmp"

    def newest(self) -> int | None:
        """Step of the newest whole checkpoint; a torn one on the way is named in a note. Removes half-written ones.

        Rank 0 looks, all ranks get the answer.
        """
        return self.world.agree(self._newest() if self.world.is_main else None)

    def _newest(self) -> int | None:
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)  # what somebody still writes goes next time
        for step in reversed(self.steps()):
            fault = torn(self.path(step))
            if fault is None:
                return step
            progress.current().note(f"checkpoint {self.path(step).name} is torn and is passed over: {fault}")
        return None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        run: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Write the checkpoint of `step`, then remove all but the newest `keep` and `best`.

        In the background: this returns when the tensors are copied, and the checkpoint is whole when `wait` returns;
        one at a time. Raises UserError when the disk is full, now or out of the next call or `wait`; the checkpoints
        that were there stay.
        """
        self.wait()
        if not self.marks:
            self.marks.append(self.world.agree(secrets.token_hex(4)))
        tensors = model_tensors(model) | optimizer_tensors(model, optimizers)
        if self.in_background:
            tensors = self.snapshot.take(tensors)
        work = partial(self.write, step, tensors, run, random_state(), best, self.group())
        if self.in_background:
            self.background.start(work)
        else:
            work()

    def wait(self, seconds: float | None = None) -> None:
        """Until the last checkpoint is written, or so many seconds. Raises what went wrong with it."""
        self.background.wait(seconds)

    def group(self) -> dist.ProcessGroup | None:
        """The ranks, in a group of its own: what it is asked for in a thread must not mix with the training's."""
        if self.world.size > 1 and not self.groups:
            self.groups.append(dist.new_group(backend="gloo"))
        return self.groups[0] if self.groups else None

    def write(
        self, step: int, tensors: dict[str, Tensor], run: dict[str, Any], random: dict[str, Any], best: int | None,
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        """What `save` does with what it was given. All ranks together; if one fails, all do."""
        final, temporary = self.path(step), self.temporary(step)
        with disk_full(self, step, tensors):
            with all_or_none(group):
                if self.world.is_main:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            with all_or_none(group):
                dcp.save(tensors, checkpoint_id=temporary / "state", process_group=group, no_dist=group is None)
                write_json(temporary / f"random-{self.world.rank:05d}.json", random)
                hashes = file_facts(temporary, own_files(temporary, self.world.rank))
            if group is not None:
                everyone: list[dict[str, Any]] = [{}] * self.world.size
                dist.all_gather_object(everyone, hashes, group=group)
                hashes = {name: facts for part in everyone for name, facts in part.items()}
            with all_or_none(group):
                if self.world.is_main:
                    write_json(temporary / "run.json", run)
                    write_json(temporary / "manifest.json", manifest(temporary, hashes))
                    publish(temporary, final)
        with all_or_none(group):
            if self.world.is_main:
                self.prune(best)

    def prune(self, best: int | None) -> None:
        """Remove all but the newest `keep` and `best`."""
        for step in self.steps()[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step))

    def load(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Read weights, optimizer and this rank's random state in place; returns what `save` was given as `run`."""
        allocate_state(optimizers)
        tensors = model_tensors(model) | optimizer_tensors(model, optimizers)
        self._read(step, tensors)
        own = self.path(step) / f"random-{self.world.rank:05d}.json"  # more ranks than there were: rank 0's
        set_random_state(read_json(own if own.is_file() else self.path(step) / "random-00000.json"))
        return read_json(self.path(step) / "run.json")

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Read the weights alone, in place."""
        self._read(step, model_tensors(model))

    def _read(self, step: int, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            try:
                dcp.load(tensors, checkpoint_id=self.path(step) / "state")
            except dcp.CheckpointException as error:
                raise UserError(
                    f"{self.path(step)}: the checkpoint does not fit this model and optimizer ({first_cause(error)}); "
                    "it comes from another config: remove the work folder to start anew"
                ) from error


def torn(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if every file is as its manifest says."""
    if not (path / "manifest.json").is_file():
        return "it has no manifest.json"
    try:
        files = read_json(path / "manifest.json")["files"]
    except (UserError, KeyError, TypeError):
        return "its manifest.json cannot be read"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
        if file_hash(file) != facts["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def manifest(directory: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Size and sha256 of every file below a folder; those in `known` are not read again."""
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    found = dict(known) | file_facts(directory, [name for name in names if name not in known])
    return {"files": {name: found[name] for name in sorted(names)}}


def own_files(directory: Path, rank: int) -> list[str]:
    """The files of a checkpoint that a rank has written, so that each reads its own for their hashes."""
    names = [path.name for path in (directory / "state").glob(f"__{rank}_*")]
    return [*(f"state/{name}" for name in names), f"random-{rank:05d}.json"]


def file_facts(directory: Path, names: list[str]) -> dict[str, Any]:
    """Size and sha256 of files in a folder, by name."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": file_hash(directory / name)} for name in names}


@contextmanager
def all_or_none(group: dist.ProcessGroup | None) -> Iterator[None]:
    """If a rank fails inside, all do; none waits for one that will not come. The others raise OSError with the rank."""
    error: BaseException | None = None
    try:
        yield
    except (OSError, RuntimeError, dcp.CheckpointException) as failure:
        error = failure
    if group is not None:
        faults: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(faults, None if error is None else str(error), group=group)
        for rank, fault in enumerate(faults):
            if error is None and fault is not None:
                error = OSError(f"rank {rank} could not write the checkpoint: {fault}")
    if error is not None:
        raise error


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights that are trained and persistent buffers, by name; tied weights once.

    What is frozen (below low-rank updates, rounded or not) is where the run started from, which `identity` names.
    """
    seen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    seen |= {id(b) for module in model.modules() if isinstance(module, QuantizedLinear) for b in module.buffers()}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = kept_piece(tensor)
    return tensors


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer state by the name of its parameter: `optimizer.layers.0.….exp_avg`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[whole_of(parameter)]}.{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators as JSON."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [[int(key) for key in keys], position, has_gauss, gauss],
        "torch": to_text(torch.get_rng_state()),
        "cuda": [to_text(state) for state in cuda],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back `random_state()`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(from_text(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([from_text(text) for text in state["cuda"]])


def to_text(state: Tensor) -> str:
    """A byte tensor as base64."""
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def from_text(text: str) -> Tensor:
    """The byte tensor of `to_text`."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


@contextmanager
def disk_full(checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Turn "no space left" into a message that says what is needed and what is there; the torn rest is removed."""
    temporary = checkpoints.temporary(step)
    try:
        yield
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(checkpoints.directory).free
        written = directory_bytes(temporary) if temporary.exists() else 0
        shutil.rmtree(temporary, ignore_errors=True)
        if not (is_no_space(error) or free + written < needed):
            raise
        raise UserError(
            f"the disk is full: the checkpoint of step {step} needs {human_bytes(needed)} in {checkpoints.directory}, "
            f"where {human_bytes(free + written)} are free. {last_whole(checkpoints)} Free some space and give the "
            "same command again"
        ) from error


def last_whole(checkpoints: Checkpoints) -> str:
    """A sentence that names the last whole checkpoint."""
    for step in reversed(checkpoints.steps()):
        if torn(checkpoints.path(step)) is None:
            return f"The last good checkpoint is {checkpoints.path(step)} (step {step})."
    return "There is no checkpoint yet."


def is_no_space(error: BaseException) -> bool:
    """Whether a full disk is behind an error, also one that DCP has wrapped."""
    if isinstance(error, dcp.CheckpointException):
        return any(is_no_space(failure[0]) for failure in error.failures.values())
    return full(error) is not None


def first_cause(error: dcp.CheckpointException) -> str:
    """The first failure that DCP reports, in one line."""
    failures = list(error.failures.values())
    return str(failures[0][0]).split("\n")[0] if failures else str(error)
