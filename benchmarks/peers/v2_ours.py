"""Our side of benchmarks/v2_infer.py: `python v2_ours.py HTTP_PORT GRPC_PORT` serves `echo`, which returns its rows."""

import sys

import numpy as np

from soma.serve.v2.alone import create_app, run
from soma.serve.v2.callables import PythonModel
from soma.serve.v2.model import TensorSpec
from soma.serve.v2.repository import Repository


async def echo(x: np.ndarray) -> np.ndarray:
    """The rows."""
    return x


if __name__ == "__main__":
    repository = Repository()
    repository.add("echo", PythonModel(echo, [TensorSpec("x", "FP32", (-1, -1))], [TensorSpec("y", "FP32", (-1, -1))]))
    run(create_app(repository), "echo", "127.0.0.1", int(sys.argv[1]), grpc_port=int(sys.argv[2]))
