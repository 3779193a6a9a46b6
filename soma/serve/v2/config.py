"""The file that names further models beside the engine's: `soma serve MODEL --models models.yaml`.

models:
  sentiment:
    python: sentiment.py:classify          # or package.module:NAME; files are looked for beside this one
    inputs: [{name: text, datatype: BYTES, shape: [-1]}]
    outputs: [{name: label, datatype: BYTES, shape: [-1]}]
    batching: {max_batch: 32, max_delay_ms: 5}
  digits:
    onnx: digits.onnx
    versions: {"2": {onnx: digits-2.onnx}} # keys beside `versions` are version 1
  minilm:
    encoder: models/minilm                 # a folder, hf:ID or registry:NAME@VERSION
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soma.base.errors import UserError
from soma.serve.v2.model import TensorSpec, V2Model
from soma.serve.v2.repository import Repository

Datatype = Literal["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32",
                   "FP64", "BF16", "BYTES"]  # fmt: skip


class Tensor(BaseModel):
    """A tensor of a Python model."""

    model_config = ConfigDict(extra="forbid")
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1 for any size")
    optional: bool = False

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.datatype, tuple(self.shape), self.optional)


class Batching(BaseModel):
    """How requests are gathered: see `soma.serve.batching.Batcher`."""

    model_config = ConfigDict(extra="forbid")
    max_batch: int = Field(32, ge=1, description="rows of a batch at most")
    max_delay_ms: float = Field(5.0, ge=0, description="longest time that a request is held for company")
    latency_target_ms: float | None = Field(None, gt=0, description="time from request to answer to aim for")
    pad: bool = Field(False, description="fill batches up to powers of two")


class Version(BaseModel):
    """One version of a model: exactly one of `python`, `onnx`, `encoder`."""

    model_config = ConfigDict(extra="forbid")
    python: str | None = Field(None, description="module:NAME or file.py:NAME of a function or a V2Model")
    onnx: str | None = Field(None, description="file")
    encoder: str | None = Field(None, description="model folder, hf:ID or registry:NAME@VERSION")
    inputs: list[Tensor] = Field([], description="of a Python function")
    outputs: list[Tensor] = Field([], description="of a Python function")
    labels: list[str] = Field([], description="names of the classes, for the classification extension")
    threads: int = Field(0, ge=0, description="of an ONNX model; 0: all cores")
    batching: Batching | None = None
    load: bool = Field(True, description="at the start; else when a client asks for it")

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in ("python", "onnx", "encoder") if getattr(self, kind) is not None]

    @model_validator(mode="after")
    def _one_kind(self) -> "Version":
        versions = getattr(self, "versions", {})
        if len(self.kinds) != 1 and not (versions and not self.kinds):
            raise ValueError(f"expected one of python, onnx, encoder; got {', '.join(self.kinds) or 'none'}")
        return self


class Model(Version):
    """A model: a version of its own (number 1), further ones, or both."""

    versions: dict[str, Version] = Field({}, description="by number")

    @model_validator(mode="after")
    def _own_version(self) -> "Model":
        if self.kinds and "1" in self.versions:
            raise ValueError("version 1 is there twice: what stands beside `versions` is version 1")
        return self

    @property
    def all_versions(self) -> dict[str, Version]:
        own: dict[str, Version] = {"1": self} if self.kinds else {}
        return own | self.versions


class ModelsFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")
    models: dict[str, Model] = Field(min_length=1)


def add_models(repository: Repository, file: ModelsFile, folder: Path) -> None:
    """Put the file's models into the repository and load those that say so. Raises UserError."""
    for name, model in file.models.items():
        for number, version in model.all_versions.items():
            entry = repository.add(name, maker(name, version, folder), number)
            if version.load:
                assert entry.make is not None
                entry.put(entry.make())


def maker(name: str, version: Version, folder: Path) -> Callable[[], V2Model]:
    """What loads a version."""

    def make() -> V2Model:
        try:
            model = build(version, folder)
            if version.batching is None:
                return model
            from soma.serve.v2.batched import BatchedModel

            options = version.batching
            target = None if options.latency_target_ms is None else options.latency_target_ms / 1000
            return BatchedModel(
                model, max_batch=options.max_batch, max_delay=options.max_delay_ms / 1000, target=target,
                pad=options.pad,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"models.{name}: {error}") from error

    return make


def build(version: Version, folder: Path) -> V2Model:
    """The model itself. Raises UserError."""
    if version.onnx is not None:
        from soma.serve.v2.onnx_model import OnnxModel

        return OnnxModel(folder / version.onnx, threads=version.threads, labels=version.labels)
    if version.encoder is not None:
        return build_encoder(version.encoder, folder)
    from soma.serve.v2.callables import PythonModel, find

    assert version.python is not None
    found = find(version.python, folder)
    if isinstance(found, type) and issubclass(found, V2Model):
        found = found()
    if isinstance(found, V2Model):
        return found
    if not callable(found):
        raise UserError(f"python {version.python!r} is no function and no V2Model")
    if not version.inputs or not version.outputs:
        raise UserError(f"python {version.python!r} is a function: say its inputs and outputs")
    inputs, outputs = ([tensor.spec for tensor in side] for side in (version.inputs, version.outputs))
    return PythonModel(found, inputs, outputs, labels=version.labels)


def build_encoder(reference: str, folder: Path) -> V2Model:
    """An encoder, or a classifier, in this process."""
    from soma.engine.embed import load_embedder
    from soma.model.folder import local_folder
    from soma.model.tokenizer import Tokenizer
    from soma.serve.v2.classifier import Classifier
    from soma.serve.v2.encoder import Encoder

    beside = folder / reference
    directory = local_folder(beside if beside.is_dir() else reference)
    embedder = load_embedder(directory)
    return (Classifier if embedder.labels else Encoder)(embedder, Tokenizer.load(directory))
