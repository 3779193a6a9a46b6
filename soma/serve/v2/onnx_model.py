"""An ONNX model, run by onnxruntime (`pip install 'somacube[onnx]'`)."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soma.base.errors import UserError
from soma.serve.v2.datatypes import Tensors, as_objects
from soma.serve.v2.model import TensorSpec, V2Model

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float": "FP32", "double": "FP64",
    "string": "BYTES",
}  # fmt: skip


class OnnxModel(V2Model):
    """The graph of a file; inputs and outputs are what it says, named sizes become -1. `threads`: of one run, 0 for as
    many as onnxruntime likes. Raises UserError: no onnxruntime, no such file, no model, a type that the protocol does
    not have."""

    platform = "onnxruntime_onnx"

    def __init__(self, path: Path, *, threads: int = 0, labels: Sequence[str] = ()) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError("an ONNX model needs onnxruntime: pip install 'somacube[onnx]'") from None
        if not path.is_file():
            raise UserError(f"onnx {path}: there is no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=onnxruntime.get_available_providers()
            )
        except Exception as error:
            raise UserError(f"onnx {path}: {str(error).strip()[:300]}") from error
        self.inputs = [self.spec(each, path) for each in self.session.get_inputs()]
        self.outputs = [self.spec(each, path) for each in self.session.get_outputs()]
        self.labels = labels

    @staticmethod
    def spec(argument: Any, path: Path) -> TensorSpec:
        """An input or output of the graph."""
        kind = argument.type.removeprefix("tensor(").removesuffix(")")
        if kind not in DATATYPES:
            raise UserError(f"onnx {path}: {argument.name} is {argument.type}, which the protocol does not have")
        shape = tuple(size if isinstance(size, int) else -1 for size in argument.shape)
        return TensorSpec(argument.name, DATATYPES[kind], shape)

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """What the graph makes of the inputs, computed in a thread."""
        return await asyncio.to_thread(self.run, tensors)

    def run(self, tensors: Tensors) -> Tensors:
        """The same, in this thread."""
        texts = {spec.name for spec in self.inputs if spec.datatype == "BYTES"}
        given = {
            name: np.vectorize(bytes.decode, otypes=[object])(array) if name in texts and array.size
            else np.ascontiguousarray(array)
            for name, array in tensors.items()
        }  # fmt: skip
        names = [spec.name for spec in self.outputs]
        made = dict(zip(names, self.session.run(names, given), strict=True))
        for spec in self.outputs:
            if spec.datatype == "BYTES":
                array = np.asarray(made[spec.name], object)
                made[spec.name] = as_objects([str(each).encode() for each in array.ravel()], array.shape)
        return made
