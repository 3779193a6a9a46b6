"""openvino-genai as a peer of `benchmarks/engine.py`: continuous batching, ids in, ids out; see `worker.py`.

The weights come from the same GGUF file that llama.cpp runs (Q8_0), through openvino-genai's own reader.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import answer_requests


def convert(gguf: Path) -> None:
    """Write `openvino_model.xml` beside a GGUF file, and no tokenizer: without one the pipeline takes ids."""
    try:
        openvino_genai.LLMPipeline(str(gguf), "CPU", enable_save_ov_model=True)
    except RuntimeError as error:  # the model is saved; then the tokenizer, whose words we made up, does not compile
        if not (gguf.parent / "openvino_model.xml").is_file():
            raise RuntimeError(f"openvino-genai does not read {gguf.name}: {error}") from None
    for path in gguf.parent.glob("openvino_*tokenizer.*"):
        path.unlink()


class OpenVino:
    """A pipeline for up to `sequences` sequences of `length` tokens."""

    def __init__(self, folder: str, threads: int, length: int, sequences: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = sequences * (length // 32 + 2)
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = sequences, max(512, sequences)
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties, {})

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`count` greedy tokens after each prompt: seconds of the whole."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        config.eos_token_id, config.stop_token_ids = 0, {0}
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        start = time.perf_counter()
        results = self.pipeline.generate(ids, [config] * len(prompts))
        seconds = time.perf_counter() - start
        made = [list(result.m_generation_ids[0]) for result in results]
        assert all(len(row) == count for row in made)
        return {"seconds": seconds, "ids": made}


def main() -> None:
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]))
        return
    peer = OpenVino(sys.argv[1], *map(int, sys.argv[2:5]))
    answer_requests({"generate": peer.generate})


if __name__ == "__main__":
    main()
