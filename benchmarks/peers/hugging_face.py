"""transformers as a peer of `benchmarks/engine.py`: `generate` and its continuous batching; see `worker.py`."""

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from worker import answer_requests


class HuggingFace:
    """A model in bf16 or fp32."""

    def __init__(self, folder: str, precision: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision)).eval()
        self.manager: Any = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`count` greedy tokens after each prompt (all of one length), one static batch: seconds of the whole."""
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return {"seconds": time.perf_counter() - start, "ids": made[:, ids.shape[1] :].tolist()}

    def generate_batch(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """The same through its continuous batching, whose loop is started once and stays."""
        if self.manager is None:
            config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
            self.manager = self.model.init_continuous_batching(generation_config=config)
            self.manager.start()
        start = time.perf_counter()
        names = [self.manager.add_request(prompt, max_new_tokens=count) for prompt in prompts]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            if (output := self.manager.get_result(timeout=60)) is None:
                raise RuntimeError("continuous batching gave nothing for a minute")
            if output.is_finished():
                done[output.request_id] = output.generated_tokens
        seconds = time.perf_counter() - start
        assert all(len(made) == count for made in done.values()), "continuous batching did not finish"
        return {"seconds": seconds, "ids": [done[name] for name in names]}


def main() -> None:
    peer = HuggingFace(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    answer_requests({"generate": peer.generate, "generate_batch": peer.generate_batch})
    if peer.manager is not None:
        peer.manager.stop(block=True)


if __name__ == "__main__":
    main()
