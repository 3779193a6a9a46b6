"""Any Python callable as a model: arrays by the inputs' names in, an array or a dict of them out."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from soma.base.errors import UserError
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import TensorSpec, V2Model


class PythonModel(V2Model):
    """A function. It gets the inputs as keyword arguments, `parameters` too if it has such an argument, and returns a
    dict of outputs, or the only output itself. A plain function runs in a thread, an async one in the event loop."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
        labels: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.function, self.inputs, self.outputs, self.labels = function, inputs, outputs, labels
        call = function if inspect.isroutine(function) else type(function).__call__
        self.is_async = inspect.iscoroutinefunction(call)
        self.takes_parameters = "parameters" in inspect.signature(function).parameters

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """What the function makes of the inputs."""
        given: dict[str, Any] = dict(tensors)
        if self.takes_parameters:
            given["parameters"] = parameters
        if self.is_async:
            made = await self.function(**given)
        else:
            made = await asyncio.to_thread(self.function, **given)
        if isinstance(made, Mapping):
            return dict(made)
        if len(self.outputs) != 1:
            raise ValueError(f"the function must return a dict of {len(self.outputs)} outputs")
        return {self.outputs[0].name: made}


def find(reference: str, folder: Path) -> Any:
    """What `module:name` or `file.py:name` says; files are looked for in `folder`. Raises UserError."""
    where, _, name = reference.rpartition(":")
    if not where or not name.isidentifier():
        raise UserError(f"python {reference!r}: expected package.module:NAME or file.py:NAME")
    module = from_file(folder / where) if where.endswith(".py") else from_package(where)
    if not hasattr(module, name):
        raise UserError(f"python {reference!r}: there is no {name} in it")
    return getattr(module, name)


def from_package(name: str) -> ModuleType:
    """An installed module."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"python {name}: {error}") from error
    return module


def from_file(path: Path) -> ModuleType:
    """A file as a module of its own, read anew every time."""
    if not path.is_file():
        raise UserError(f"python {path}: there is no such file")
    name = f"soma_model_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"python {path}: {type(error).__name__}: {error}") from error
    return module
