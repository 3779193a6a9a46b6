"""The model that a recipe starts from, and where a stage finds its model and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soma.base.artefact import content_hash
from soma.base.fetch import fetch
from soma.stages.stage import Build, nothing_outside


@dataclass(frozen=True)
class StartModel:
    """The model that a recipe starts from."""

    ref: str

    def path(self) -> Path:
        """Its local folder, fetched if need be."""
        return fetch(self.ref)

    def fingerprint(self) -> str:
        """Hash of the folder's content."""
        return content_hash(self.path())


def outside_of(base: StartModel | None) -> Callable[[], str]:
    """The fingerprint of a stage that reads the start model, where the recipe has one."""
    return base.fingerprint if base else nothing_outside


def tokenizer_folder(job: Build, base: StartModel | None) -> Path:
    """The trained tokenizer's folder, or the start model's, which holds its own."""
    return job.inputs["tokenizer"] if base is None else base.path()


def model_folder(job: Build, base: StartModel | None, role: str = "model") -> Path:
    """The model's folder in the artefact of that role, or the start model's."""
    if role in job.inputs:
        return job.inputs[role] / "model"
    assert base is not None, "the recipe's validation asks for a model to start from"
    return base.path()
