"""onnxruntime-genai as a peer of `benchmarks/engine.py`: one batch of prompts of equal length; see `worker.py`.

Its own model builder makes the ONNX graph from the Hugging Face folder: int4 in groups of 32, products in int8
(accuracy level 4), which is what it recommends for a CPU. The builder wants torch and transformers, the pipeline does
not: the first runs in our environment with the peers' packages behind ours, the second in the peers'.

    python onnxruntime_genai_peer.py convert MODEL OUT PEERS_PYTHON THREADS
"""

import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

EOS = 0  # there is none: every request makes as many tokens as are asked for


def convert(model: Path, out: Path, peers: str, threads: str) -> None:
    """Write the graph and its configuration to `out`."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    sys.path.append(subprocess.run([peers, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as work:
        source, cache = Path(work) / "model", Path(work) / "cache"
        source.mkdir()
        for path in model.iterdir():
            if path.suffix in (".json", ".safetensors") and path.name != "config.json":
                (source / path.name).symlink_to(path)
        config = json.loads((model / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"eos_token_id": EOS, "bos_token_id": EOS}))
        sys.argv = ["builder", "-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(cache),
                    "--extra_options", "int4_accuracy_level=4"]  # fmt: skip
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    path = out / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = int(threads)
    path.write_text(json.dumps(settings))


class Pipeline:
    """A model folder that `convert` made."""

    def __init__(self, folder: str) -> None:
        import onnxruntime_genai

        self.library, self.model = onnxruntime_genai, onnxruntime_genai.Model(folder)

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`count` greedy tokens after each prompt; seconds up to the first tokens and after them."""
        parameters = self.library.GeneratorParams(self.model)
        length = len(prompts[0]) + count
        parameters.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = self.library.Generator(self.model, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        assert all(len(generator.get_sequence(row)) == length for row in range(len(prompts)))
        return {"prefill": first - start, "decode": end - first}


def main() -> None:
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
        return
    from worker import answer_requests

    answer_requests({"generate": Pipeline(sys.argv[1]).generate})


if __name__ == "__main__":
    main()
