"""The adapters of an engine: loaded and unloaded while it runs, any number of them in one step (S-LoRA,
arXiv:2311.03285; Punica, arXiv:2310.18547).

An adapter has a slot while it is loaded. The C step reads its updates from a table of slots; the other backends go
through the model's modules, whose linear layers become `AdaptedLinear` when the first adapter comes.
"""

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from soma.base.errors import UserError
from soma.engine.backends.choose import Backend
from soma.engine.errors import unknown_model
from soma.engine.native import NativeModel
from soma.model.adapted import AdaptedLinear, LowRank
from soma.model.folder import local_folder
from soma.model.lora import lora_layers, read_adapter, targets
from soma.model.transformer import Transformer


@dataclass(eq=False)
class Loaded:
    """One adapter. `salt` keeps its blocks of the prefix cache apart; `users`: requests that are not over."""

    name: str
    folder: str
    slot: int
    salt: bytes
    layers: dict[str, LowRank]
    users: int = 0
    leaving: bool = False


class Adapters:
    """What is loaded over one model and its backend. Safe to use from any thread."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.loaded: dict[str, Loaded] = {}
        self.numbers = itertools.count(1)  # never the same salt twice: another adapter may come under an old name
        self.loading = threading.Lock()
        self.changed = threading.Condition()

    @property
    def folders(self) -> dict[str, str]:
        """Names that requests may choose, and where they were loaded from."""
        with self.changed:
            return {name: each.folder for name, each in self.loaded.items() if not each.leaving}

    def load(self, name: str, folder: str | Path) -> None:
        """Load a PEFT folder (or a reference to one) under a name.

        Raises UserError: the name is taken or empty, or what `soma.model.lora.read_adapter` raises.
        """
        with self.loading:
            if not name:
                raise UserError("an adapter needs a name")
            with self.changed:
                if name in self.loaded:
                    state = "being unloaded" if self.loaded[name].leaving else "loaded already"
                    raise UserError(f"the adapter {name!r} is {state}")
            if lora_layers(self.model):
                raise UserError("the model has an adapter in it that is not merged; merge it before others are loaded")
            layers = read_adapter(local_folder(folder), self.model.config).layers
            with self.changed:
                taken = {each.slot for each in self.loaded.values()}
                slot = next(slot for slot in itertools.count() if slot not in taken)
                new = Loaded(name, str(folder), slot, b"adapter %d" % next(self.numbers), layers)
                self._install({**self.loaded, name: new})
                self.loaded[name] = new

    def unload(self, name: str) -> None:
        """Take no more requests for an adapter, wait until those that are in are over, and free it.

        Raises RequestError for an adapter that is not there.
        """
        with self.changed:
            leaving = self.loaded.get(name)
            if leaving is None or leaving.leaving:
                raise unknown_model(name)
            leaving.leaving = True
            self.changed.wait_for(lambda: leaving.users == 0)
            del self.loaded[name]
            self._install(self.loaded)

    def acquire(self, name: str | None, count: int = 1) -> Loaded | None:
        """The adapter of that name for `count` requests, each of which has to `release` it; None for the base.

        Raises RequestError for an adapter that is not there.
        """
        if name is None:
            return None
        with self.changed:
            found = self.loaded.get(name)
            if found is None or found.leaving:
                raise unknown_model(name)
            found.users += count
            return found

    def release(self, adapter: Loaded | None, count: int = 1) -> None:
        """Requests of the adapter are over."""
        if adapter is not None:
            with self.changed:
                adapter.users -= count
                self.changed.notify_all()

    def _install(self, loaded: dict[str, Loaded]) -> None:
        """Make the backend's updates those of `loaded`. A step in flight goes on with what it has."""
        if isinstance(self.backend, NativeModel):
            self.backend.set_adapters({each.slot: each.layers for each in loaded.values()})
            return
        for target in targets(self.model.config).values():
            for path in target.parts:
                layer = self._adapted(path)
                layer.updates = {
                    each.slot: layer.updates.get(each.slot) or self._to_model(each.layers[path])
                    for each in loaded.values() if path in each.layers
                }  # fmt: skip

    def _adapted(self, path: str) -> AdaptedLinear:
        """The linear layer at `path`, made ready for adapters."""
        layer = self.model.get_submodule(path)
        if not isinstance(layer, AdaptedLinear):
            parent, _, name = path.rpartition(".")
            layer = AdaptedLinear(layer)
            setattr(self.model.get_submodule(parent), name, layer)
        return layer

    def _to_model(self, update: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """A and scale · B on the model's device, in its dtype."""
        b_NR = update.b_NR.float() * update.scale
        return tuple(half.to(self.model.device, self.model.dtype) for half in (update.a_RK, b_NR))  # type: ignore[return-value]
