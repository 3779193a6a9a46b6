"""Our engine as a side of `benchmarks/engine.py`, in a process of its own: see `worker.py`."""

import sys
import threading
import time
from typing import Any

import torch
from ids import Ids
from worker import answer_requests

from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.engine.request import TokenEvent
from soma.model.hub import load_model


class Ours:
    """The engine on weights in `weights`: bf16, fp32, int8 or int4; with `-no-prefix-cache` it keeps nothing."""

    def __init__(self, folder: str, weights: str, threads: int, length: int, sequences: int) -> None:
        torch.set_num_threads(threads)
        kind = weights.removesuffix("-no-prefix-cache")
        model = load_model(folder, torch.float32 if kind == "fp32" else torch.bfloat16)
        options: dict[str, Any] = {"weights": kind} if kind in ("int8", "int4") else {}
        self.engine = Engine(
            model, Ids(), max_length=length, max_running=sequences, max_waiting=sequences,
            prefix_cache=kind == weights, **options,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """`count` greedy tokens after each prompt.

        Seconds: `first` until the first token of each, `prefill` until all have one, `decode` from there to the end.
        """
        times: list[list[float]] = [[] for _ in prompts]
        ids: list[list[int]] = [[] for _ in prompts]

        def listener(place: int) -> Any:
            def listen(event: TokenEvent) -> None:
                if event.id is not None:
                    times[place].append(time.perf_counter())
                    ids[place].append(event.id)
                if event.finish_reason is not None:
                    waiting.discard(place)
                    if not waiting:
                        done.set()

            return listen

        waiting, done = set(range(len(prompts))), threading.Event()
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        self.engine.submit_all(prompts, params, [listener(place) for place in range(len(prompts))])
        done.wait()
        first = max(row[0] for row in times)
        return {
            "first": [row[0] - start for row in times], "prefill": first - start,
            "decode": max(row[-1] for row in times) - first, "ids": ids,
        }  # fmt: skip

    def weight_bytes(self) -> int:
        """Bytes that a step reads: all matrices; of the embedding only where it is the output's too."""
        return self.engine.weight_bytes

    def read_bandwidth(self) -> float:
        """GB/s of the fastest of five reads of 1 GiB of plain memory by torch's threads."""
        memory = torch.ones(1 << 28, dtype=torch.float32)
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            memory.sum()
            best = max(best, memory.nbytes / (time.perf_counter() - start) / 1e9)
        return best


def main() -> None:
    folder, weights, threads, length, sequences = sys.argv[1:6]
    ours = Ours(folder, weights, int(threads), int(length), int(sequences))
    answer_requests(
        {"generate": ours.generate, "weight_bytes": ours.weight_bytes, "read_bandwidth": ours.read_bandwidth}
    )
    ours.engine.close()


if __name__ == "__main__":
    main()
