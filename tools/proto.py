"""Write soma/serve/v2/inference_pb2.py from inference.proto (`make proto`).

The messages go into a descriptor pool of their own: in protobuf's default pool the name `inference.ModelInferRequest`
can exist once in a process, and a client library (tritonclient, mlserver, kserve) may have it already.
"""

import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "soma/serve/v2/inference.proto"


def generate() -> str:
    """The generated code."""
    with TemporaryDirectory() as folder:
        status = protoc.main([
            "protoc", f"-I{ROOT}", f"-I{files('grpc_tools').joinpath('_proto')}", f"--python_out={folder}",
            str(ROOT / SOURCE),
        ])  # fmt: skip
        if status:
            sys.exit(status)
        (made,) = (path.read_text() for path in Path(folder).rglob("*.py"))
    if made.count("_descriptor_pool.Default()") != 1:
        sys.exit("protoc writes the pool in another way than this tool knows")
    return made.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")


if __name__ == "__main__":
    (ROOT / SOURCE).with_name("inference_pb2.py").write_text(generate())
