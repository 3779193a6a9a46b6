"""What a stage is, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from soma.recipe import Recipe
from soma.tracking import Trackers

Block = TypeVar("Block", bound=BaseModel)


@dataclass(frozen=True)
class Build:
    """What a stage is given: an empty folder to fill, a folder that survives a kill, its inputs' artefacts."""

    out: Path
    state: Path
    inputs: Mapping[str, Path]
    tracking: Trackers


def nothing_outside() -> str:
    """The fingerprint of a stage that reads only what other stages made."""
    return ""


def _no_metrics(artefact: Path) -> dict[str, float]:
    return {}


def _no_check() -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One step of a run. Raise `format_version` when the same inputs and config give other bytes than before.

    `config` is JSON and part of the key; `inputs` maps a role to the stage that fills it; `fingerprint` hashes what
    lies outside of the store; `build` returns None, or the reason why a second run would not give the same bytes;
    `metrics` reads the figures of a finished artefact for `soma runs`; `check` raises UserError for what `build` would
    refuse, as far as that is known before any stage is made.
    """

    name: str
    config: dict[str, Any]
    build: Callable[[Build], str | None]
    inputs: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Callable[[], str] = nothing_outside
    metrics: Callable[[Path], dict[str, float]] = _no_metrics
    format_version: int = 1
    check: Callable[[], None] = _no_check


def seeded(block: Block, recipe: Recipe) -> Block:
    """The block with the recipe's seed, unless it names its own."""
    if "seed" in type(block).model_fields and "seed" not in block.model_fields_set:
        return block.model_copy(update={"seed": recipe.seed})
    return block


def settings(block: BaseModel) -> dict[str, Any]:
    """What of a block shapes the artefact, as JSON: a part of the stage's key.

    The ranks' layout does not change what is trained, nor does reading the shards from afar.
    """
    return block.model_dump(mode="json", exclude={"layout", "stream"})
