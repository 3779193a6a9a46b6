"""Write soma/serve/v2/inference_pb2.py and inference_pb2_grpc.py from inference.proto (`make proto`).

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


def generate() -> dict[str, str]:
    """The generated files' names and contents."""
    with TemporaryDirectory() as folder:
        status = protoc.main([
            "protoc", f"-I{ROOT}", f"-I{files('grpc_tools').joinpath('_proto')}", f"--python_out={folder}",
            f"--grpc_python_out={folder}", str(ROOT / SOURCE),
        ])  # fmt: skip
        if status:
            sys.exit(status)
        made = {path.name: path.read_text() for path in Path(folder).rglob("*.py")}
    whole = made["inference_pb2.py"]
    if whole.count("_descriptor_pool.Default()") != 1:
        sys.exit("protoc writes the pool in another way than this tool knows")
    made["inference_pb2.py"] = whole.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")
    return made


if __name__ == "__main__":
    for name, text in generate().items():
        (ROOT / SOURCE).with_name(name).write_text(text)
