"""The engine on one GPU: Llama-3-8B's shape in bf16 with random weights, beside transformers; attention beside SDPA.

Requests are random ids, answers greedy and of a fixed length (`ignore_eos`), all submitted at once, as vLLM's
`benchmark_throughput` does; output tokens of all over the time from the first submission to the last token.

    python benchmarks/engine_gpu.py --check --json
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import Case, finish, make_case, parser

sys.path.insert(0, str(Path(__file__).resolve().parent))
from attention import measure_flash
from peers.ids import Ids

from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.engine.request import TokenEvent
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer

DEVICE = torch.device("cuda")
SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
BARS = {"256 requests of 100-1,024 in, 100-1,024 out": 9500.0, "256 requests of 1,000 in, 1,000 out": 8700.0}
DECODE_BAR = 230.0  # of an H200: 80 % of what its memory gives
BANDWIDTH_BAR = 0.8


def main() -> None:
    command = parser("engine_gpu", __doc__.splitlines()[0], rounds=1)
    command.add_argument("--check", action="store_true", help="first hold the engine's GPU path to the reference")
    command.add_argument("--only-check", action="store_true", help="check and measure nothing")
    command.add_argument("--work", nargs="*", default=list(WORKS), choices=list(WORKS))
    options = command.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/engine_gpu.py measures the engine on a GPU and found no CUDA GPU")
    if options.check or options.only_check:
        from engine_gpu_check import check

        check()
    if options.only_check:
        return
    cases: list[Case] = []
    for work in options.work:
        cases += WORKS[work](options)
        gc.collect()
        torch.cuda.empty_cache()
    finish("engine_gpu", options, cases, packages=["triton", "transformers", "vllm"])


def random_model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Transformer:
    """Random weights drawn on the GPU: drawing eight billion numbers on the CPU takes minutes."""
    config = ModelConfig(**{**SHAPE, **changes})
    with torch.device("meta"):
        model = Transformer(config, dtype=dtype)
    model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    return model


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]


class Timed:
    """Runs requests to their end: seconds from the submission, and when each token came."""

    def __init__(self, engine: Engine, prompts: list[list[int]], counts: list[int]) -> None:
        self.times: list[list[float]] = [[] for _ in prompts]
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
        start = time.perf_counter()
        requests = engine.submit_all(prompts, params, [self.listener(place) for place in range(len(prompts))])
        while any(request.ended is None for request in requests):
            time.sleep(0.002)
        self.seconds = time.perf_counter() - start
        failed = [request for request in requests if request.finish_reason != "length"]
        assert not failed, f"{len(failed)} requests ended with {failed[0].finish_reason}"
        assert [len(row) for row in self.times] == counts
        self.first = [row[0] - start for row in self.times]

    def listener(self, place: int) -> Callable[[TokenEvent], None]:
        return lambda event: self.times[place].append(time.perf_counter())


def copy_bandwidth() -> float:
    """GB/s of a copy of 4 GiB, reads and writes counted, the best of five."""
    a = torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE).random_()
    b, best = torch.empty_like(a), 0.0
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        best = max(best, 2 * a.numel() / start.elapsed_time(end) * 1e-6)
    return best


def decode(options: argparse.Namespace) -> list[Case]:
    """One request: tokens/s after the first token, of 256 after a prompt of 128."""
    model = random_model()
    engine = Engine(model, Ids(), max_running=1, max_length=2048)
    read = engine.weight_bytes * 1e-9
    ours, theirs, memory = [], [], [copy_bandwidth() for _ in range(options.rounds)]
    peer = HuggingFace(engine.runner.model)
    for seed in range(options.warmup + options.rounds):
        prompt = prompts_of([128], seed)
        times = Timed(engine, prompt, [256]).times[0]
        ours.append(255 / (times[-1] - times[0]))
        theirs.append(peer.decode(prompt[0], 64))
    engine.close()
    ours, theirs = ours[options.warmup :], theirs[options.warmup :]
    name = "batch 1 decode"
    return [
        make_case(name, "tokens/s", ours, "transformers generate", theirs),
        make_case(name, "tokens/s", ours, "the H200's bar", [DECODE_BAR] * len(ours), 1.0),
        make_case(
            f"{name}: weights read", "GB/s", [speed * read for speed in ours], "copy of 4 GiB", memory, BANDWIDTH_BAR
        ),
    ]  # fmt: skip


def throughput(options: argparse.Namespace) -> list[Case]:
    """256 requests at once, all of them running; vLLM's default is `max_num_seqs` 256 too."""
    cases = []
    for cache_dtype in ("auto", "fp8"):
        engine = Engine(random_model(), Ids(), max_running=256, max_length=2304, cache_dtype=cache_dtype)
        Timed(engine, prompts_of([500] * 64, 99), [8] * 64)
        draw = random.Random(1)
        for name, bar in BARS.items():
            ours = []
            for seed in range(options.rounds):
                lengths, counts = [1000] * 256, [1000] * 256
                if "100-1,024" in name:
                    lengths, counts = ([draw.randint(100, 1024) for _ in range(256)] for _ in range(2))
                done = Timed(engine, prompts_of(lengths, seed), counts)
                ours.append(sum(counts) / done.seconds)
                first = sorted(done.first)
                print(
                    f"  {name}, cache {cache_dtype}: {sum(lengths):,} in, {sum(counts):,} out, {done.seconds:.2f} s, "
                    f"{ours[-1]:,.0f} output tokens/s, first token after {first[128]:.2f} s (median)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            fp8 = cache_dtype == "fp8"
            case = f"{name}, FP8 cache" if fp8 else name
            cases.append(
                make_case(case, "output tokens/s", ours, "the H200's bar", [bar] * len(ours), None if fp8 else 1.0)
            )
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return cases


def batch_of_64(options: argparse.Namespace) -> list[Case]:
    """64 requests of 512 in and 128 out, for ours and transformers, which answers them as one padded batch."""
    model = random_model()
    engine = Engine(model, Ids(), max_running=64, max_length=1024)
    peer, ours, theirs = HuggingFace(engine.runner.model), [], []
    for seed in range(options.warmup + options.rounds):
        prompts = prompts_of([512] * 64, seed)
        ours.append(64 * 128 / Timed(engine, prompts, [128] * 64).seconds)
        theirs.append(64 * 128 / peer.seconds(prompts, 128))
    engine.close()
    first = options.warmup
    case = "64 requests of 512 in, 128 out"
    return [make_case(case, "output tokens/s", ours[first:], "transformers generate", theirs[first:])]


class HuggingFace:
    """transformers on the same weights (no copy of them), if it is installed."""

    def __init__(self, model: Transformer) -> None:
        self.model: Any = None
        if find_spec("transformers") is None:
            return
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**SHAPE, dtype=model.dtype)
        with torch.device("meta"):
            peer = LlamaForCausalLM(config).to(model.dtype)
        own = dict(model.named_parameters())
        weights = {name: own[name.removeprefix("model.")] for name in peer.state_dict()}
        peer.load_state_dict(weights, assign=True)
        assert model.rope is not None
        for name, _ in list(peer.model.rotary_emb.named_buffers()):  # not in the state: still on the meta device
            setattr(peer.model.rotary_emb, name, model.rope.inv_freq.clone())
        self.model = peer.eval()

    def seconds(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each of several prompts of one length."""
        if self.model is None:
            return float("nan")
        ids = torch.tensor(prompts, device=DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def decode(self, prompt: list[int], count: int) -> float:
        """Tokens/s after the first one."""
        first = self.seconds([prompt], 1)
        return (count - 1) / (self.seconds([prompt], count) - first)


def flash(options: argparse.Namespace) -> list[Case]:
    """FlashAttention forward and backward, causal, 8,192 tokens of head size 128: see `attention.py`."""
    return measure_flash(options)


WORKS: dict[str, Callable[[argparse.Namespace], list[Case]]] = {
    "decode": decode, "throughput": throughput, "batch": batch_of_64, "flash": flash,
}  # fmt: skip


if __name__ == "__main__":
    main()
