"""The engine on a CPU against what a user would pick instead: llama.cpp and transformers.

All sides have the same random weights of real shapes (SmolLM2-135M, Qwen3-0.6B), and every engine lives in a process of
its own. They take turns. llama.cpp is fed through its batch API by a loop that does nothing but argmax: continuous
batching at its best. Its matrices are all in one format (`pure`), as ours are.

    python -m venv peers && peers/bin/pip install llama-cpp-python gguf safetensors
    python benchmarks/engine.py --peers peers/bin/python --json
"""

import argparse
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Case, compare, finish, make_case, parser

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from worker import PEERS, Worker

from soma.model.config import ModelConfig
from soma.model.hub import save_model
from soma.model.transformer import Transformer

SHAPES = {
    "135M": ModelConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
    ),
    "0.6B": ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, max_position_embeddings=8192,
        tie_word_embeddings=True, rope_theta=1000000.0, qk_norm=True,
    ),
}  # fmt: skip
FORMATS = {"int8": "q8_0", "int4": "q4_0", "bf16": "bf16"}  # ours and llama.cpp's
PARALLEL_BARS = {16: 1.5, 64: 2.0}
PREFILL_BAR, PREFIX_BAR, BANDWIDTH_BAR = 1.3, 5.0, 0.8


class Bench:
    """One shape's files and the workers that run on them."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.folder, self.options = name, folder / name, options
        self.rounds = {"rounds": options.rounds, "warmup": options.warmup}
        self.vocabulary = SHAPES[name].vocab_size
        self.folder.mkdir()
        save_model(Transformer(SHAPES[name], dtype=torch.float32), self.folder)
        self._peer("convert", self.folder, self.folder / "f32.gguf")
        for their in FORMATS.values():
            self._peer("quantize", self.folder / "f32.gguf", self.folder / f"{their}.gguf", their)

    def _peer(self, *arguments: object) -> None:
        command = [self.options.peers, str(PEERS / "gguf_peer.py"), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)

    def ours(self, weights: str, *, length: int, sequences: int) -> Worker:
        """Our engine, on weights quantized at load."""
        return Worker(sys.executable, "ours", self.folder, weights, self.options.threads, length, sequences)

    def llama(self, format_: str, *, length: int, sequences: int) -> Worker:
        arguments = [self.folder / f"{format_}.gguf", self.options.threads, length, sequences]
        return Worker(self.options.peers, "gguf_peer", *arguments)

    def hugging_face(self) -> Worker:
        return Worker(sys.executable, "hugging_face", self.folder, "bfloat16", self.options.threads)

    def prompts(self, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (count, tokens), generator=generator).tolist()


def decode(bench: Bench) -> list[Case]:
    """Batch 1: tokens/s after the first token; for 0.6B also the share of the memory bandwidth."""
    cases, prompt, count = [], bench.prompts(1, 64), 64
    for weights, format_ in FORMATS.items():
        ours, theirs = bench.ours(weights, length=256, sequences=1), bench.llama(format_, length=256, sequences=1)

        def speed(worker: Worker) -> float:
            return (count - 1) / worker("generate", prompts=prompt, count=count)["decode"]

        peer = f"llama.cpp {format_}"
        cases += compare(
            f"{bench.name} decode, {weights}", "tokens/s", functools.partial(speed, ours),
            {peer: functools.partial(speed, theirs)}, bars={peer: None if weights == "bf16" else 1.0}, **bench.rounds,
        )  # fmt: skip
        if bench.name == "0.6B" and weights != "bf16":
            nbytes, case = ours("weight_bytes"), f"0.6B decode, {weights}: weights read"
            pairs = [(speed(ours) * nbytes / 1e9, ours("read_bandwidth")) for _ in range(bench.options.rounds)]
            reached, memory = zip(*pairs, strict=True)
            cases.append(make_case(case, "GB/s", reached, "plain read of memory", memory, BANDWIDTH_BAR))
        close([ours, theirs])
    return cases


def prefill(bench: Bench) -> list[Case]:
    """One long prompt: tokens/s up to the first token, against the best of llama.cpp's formats."""
    cases = []
    seeds = iter(range(10**6))
    for tokens in (512, 2048):
        sizes = {"length": tokens + 16, "sequences": 1}
        ours = {weights: bench.ours(weights, **sizes) for weights in ("bf16", "int8")}
        theirs = {f"llama.cpp {their}": bench.llama(their, **sizes) for their in FORMATS.values()}

        def speed(worker: Worker, tokens: int = tokens) -> float:
            prompts = bench.prompts(1, tokens, next(seeds))  # never seen before: no prefix cache helps
            return tokens / worker("generate", prompts=prompts, count=1)["prefill"]

        best = fastest({name: functools.partial(speed, worker) for name, worker in theirs.items()})
        for weights, worker in ours.items():
            cases += compare(
                f"{bench.name} prefill {tokens}, {weights}", "tokens/s", functools.partial(speed, worker),
                {best: functools.partial(speed, theirs[best])}, bars={best: PREFILL_BAR}, **bench.rounds,
            )  # fmt: skip
        close([*ours.values(), *theirs.values()])
    return cases


def concurrent(bench: Bench) -> list[Case]:
    """16 and 64 requests of 128 tokens in and 128 out: output tokens/s."""
    cases = []
    seeds = iter(range(10**6))
    for requests, bar in PARALLEL_BARS.items():
        sizes = {"length": 256, "sequences": requests}

        def speed(worker: Worker, call: str = "generate", requests: int = requests) -> float:
            done = worker(call, prompts=bench.prompts(requests, 128, next(seeds)), count=128)
            return requests * 128 / (done["seconds"] if "seconds" in done else done["prefill"] + done["decode"])

        ours = {name: bench.ours(name, **sizes) for name in bench.options.weights}
        theirs = {f"llama.cpp {their}": bench.llama(their, **sizes) for their in FORMATS.values()}
        best = fastest({name: functools.partial(speed, worker) for name, worker in theirs.items()})
        hugging_face = bench.hugging_face()
        peers = {best: functools.partial(speed, theirs[best])}
        slow = {
            "transformers generate": functools.partial(speed, hugging_face),
            "transformers continuous batching": functools.partial(speed, hugging_face, "generate_batch"),
        }
        bars = {best: bar, "transformers generate": 5.0, "transformers continuous batching": 2.0}
        for place, (weights, worker) in enumerate(ours.items()):
            cases += compare(
                f"{bench.name} {requests} requests, {weights}", "output tokens/s", functools.partial(speed, worker),
                peers if place else peers | slow, bars=bars, **bench.rounds,
            )  # fmt: skip
        close([*ours.values(), *theirs.values(), hugging_face])
    return cases


def shared_prefix(bench: Bench) -> list[Case]:
    """16 requests behind one prefix of 1,024 tokens: mean time to first token, with and without the prefix cache."""
    weights = bench.options.weights[0]
    worker = bench.ours(weights, length=1200, sequences=16)
    plain = bench.ours(f"{weights}-no-prefix-cache", length=1200, sequences=16)
    seeds = iter(range(0, 10**6, 2))

    def seconds(worker: Worker) -> float:
        seed = next(seeds)
        prefix = bench.prompts(1, 1024, seed)[0]
        worker("generate", prompts=[prefix], count=1)  # someone asked with it before
        prompts = [prefix + own for own in bench.prompts(16, 16, seed + 1)]
        times = worker("generate", prompts=prompts, count=8)["first"]
        return sum(times) / len(times)

    cases = compare(
        f"{bench.name} shared prefix, {weights}: mean TTFT", "s", functools.partial(seconds, worker),
        {"without prefix cache": functools.partial(seconds, plain)}, bars={"without prefix cache": PREFIX_BAR},
        higher_is_better=False, **bench.rounds,
    )  # fmt: skip
    close([worker, plain])
    return cases


def fastest(runs: dict[str, Callable[[], float]]) -> str:
    """The name of the run with the highest figure, the second of two calls each."""
    values = {}
    for name, run in runs.items():
        run()
        values[name] = run()
        print(f"  {name}: {values[name]:,.4g}", file=sys.stderr, flush=True)
    return max(values, key=values.__getitem__)


def close(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()


WORKS = {"decode": decode, "prefill": prefill, "concurrent": concurrent, "prefix": shared_prefix}


def main() -> None:
    command = parser("engine", __doc__.splitlines()[0], rounds=3)
    command.add_argument("--peers", required=True, help="Python with llama-cpp-python, gguf and safetensors")
    command.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    command.add_argument("--work", nargs="*", default=list(WORKS), choices=list(WORKS))
    command.add_argument("--weights", nargs="*", default=["int8", "bf16"], help="ours, for many requests")
    options = command.parse_args()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            bench = Bench(shape, Path(folder), options)
            for work in options.work:
                if work == "decode" or shape == "135M":
                    cases += WORKS[work](bench)
    finish("engine", options, cases, packages=["transformers"])


if __name__ == "__main__":
    main()
