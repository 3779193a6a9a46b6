"""DualPipe's overlapped chunk: forward and backward of MoE stages in turns, against one after the other.

Two stages of layers with the widths of DeepSeek-V3 (one GPU's share of experts, all 256 of the router) take turns as on
a rank in the middle of a DualPipe: F of the one with B of the other. In the steady state of a step this is all that a
rank does.

    python benchmarks/dualpipe.py --json                       # one GPU: copies in place of the all-to-all
    python benchmarks/dualpipe.py --gpus 4 --json              # the all-to-all of NCCL, a process for each GPU

On one GPU an exchange is a copy of the same rows, in three ways: `copies` (the device's own, on all multiprocessors),
`processors` (a kernel on some of them, as the kernels of an all-to-all are) and `--host` (to the CPU's memory and back
by the copy engines, at the speed of PCIe). With `--gpus` it is NCCL's all-to-all between processes, and with `--peer`
copies to a second GPU and back. What is hidden is seen in three ways: the step against one after the other and against
a step whose exchanges are left out; the simulation of the pair from the times of its pieces, each measured alone; the
kernels of the profiler on both streams (`--trace` writes the last of them as a Chrome trace).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Case, alternate, finish, parser
from peers.exchanges import CopyExchange, FewProcessors, NoExchange, ThroughHost, ThroughPeer
from torch import nn

from soma.model.config import ModelConfig
from soma.model.moe import MoE
from soma.model.transformer import Transformer
from soma.train.parallel.exchange import Exchange, GroupExchange
from soma.train.parallel.expert import spread
from soma.train.parallel.pipeline.chunks import Chunk, length
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.overlap import OverlapWorker, alone, in_turns
from soma.train.parallel.pipeline.pieces import Piece, Recorder
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.stage import StageWorker, cut

DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3", "vocab_size": 1024, "hidden_size": 7168, "num_attention_heads": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_experts": 256, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 8192, "router_aux_loss_coef": 0.001,
}  # fmt: skip
SMALL = DEEPSEEK | {
    "hidden_size": 128, "num_attention_heads": 4, "moe_intermediate_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_experts": 32,
}  # fmt: skip


NO_HEAD: Any = None  # neither of the two stages is the last


class Stopwatch:
    """Times on a GPU's current stream, or of the process."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Waits for the end."""
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.append((name, start, self.now()))

    def around(self, owner: Any, method: str, name: str) -> Any:
        """A patch under which every call of a method is a span."""
        inner = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.watch(name):
                return inner(*args, **kwargs)

        return mock.patch.object(owner, method, call)


class Pair:
    """Two stages of a rank in the middle of a DualPipe, on their own: what comes from other stages is there."""

    def __init__(self, settings: argparse.Namespace, ranks: int, device: torch.device) -> None:
        layers, shape = settings.layers, SMALL if settings.small else DEEPSEEK
        if settings.gpus:  # as many experts as the ranks' shares
            shape = shape | {
                "num_experts": shape["num_experts"] // settings.ranks * ranks,
                "n_group": 1,
                "topk_group": 1,
            }
        config = ModelConfig(**shape, num_hidden_layers=2 * layers + 2, tie_word_embeddings=False)
        self.model = Transformer(config, device="meta", dtype=torch.bfloat16)
        ends = [[0], list(range(1, layers + 1)), list(range(layers + 1, 2 * layers + 1)), [2 * layers + 1]]
        stages = cut(self.model, SCHEDULES["dualpipe"](4, 8), 1, ends)
        self.count, self.device = config.num_experts, device
        for layer in self.model.layers:
            for name, whole in list(layer.mlp.experts.named_parameters()):
                setattr(layer.mlp.experts, name, nn.Parameter(whole[: self.count // ranks].detach()))
        self.model.to_empty(device=device).train()
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.02)
            for layer in self.model.layers:
                layer.mlp.gate.e_score_correction_bias.zero_()
        tokens = torch.zeros(1, settings.tokens, dtype=torch.long, device=device)
        self.x, self.grad = (
            torch.randn(1, settings.tokens, config.hidden_size, device=device).bfloat16() for _ in range(2)
        )
        self.stopwatch = Stopwatch(device)
        self.whole = [
            StageWorker(stage, NO_HEAD, nullcontext, split=(), recompute=False, compiled=False) for stage in stages
        ]
        self.pieces = [
            OverlapWorker(stage, NO_HEAD, nullcontext, split=(), recompute=False, apart=True) for stage in stages
        ]
        for worker in [*self.whole, *self.pieces]:
            worker.microbatches = [Microbatch(tokens, tokens)] * 2
            worker.aux_scale = torch.ones((), device=device)

    def use(self, exchange: Exchange) -> None:
        """Let tokens travel so."""
        self.exchange = exchange
        for layer in self.model.layers:
            assert isinstance(layer.mlp, MoE)
            spread(layer.mlp.experts, self.count, exchange)

    def run(self, kind: str, exchange: Exchange, count: int) -> float:
        """Seconds of a pair, the mean of 2 · `count`: F of a microbatch on one stage, B of the last on the other.

        kind: whole (a stage is one graph, one pass after the other), pieces (the same piece by piece) or turns.
        """
        self.use(exchange)
        workers: list[Any] = list(self.whole if kind == "whole" else self.pieces)
        self.begin(workers)
        start = self.stopwatch.now()
        self.pairs(kind, workers, count)
        seconds = self.stopwatch.seconds(start, self.stopwatch.now())
        self.end(workers, count)
        return seconds / (2 * count)

    def begin(self, workers: list[Any]) -> None:
        for worker in workers:
            worker.forward(0, self.x)

    def pairs(self, kind: str, workers: list[Any], count: int) -> None:
        for turn in range(1, count + 1):
            new, old = turn % 2, (turn - 1) % 2
            for one, other in (workers, workers[::-1]):
                if kind == "turns":
                    in_turns(one.forward_pass(new, self.x), other.backward_pass(old, self.grad))
                else:
                    one.forward(new, self.x)
                    other.backward(old, self.grad)

    def end(self, workers: list[Any], count: int) -> None:
        for worker in workers:
            worker.backward(count % 2, self.grad)

    def chunks(self, exchange: Exchange) -> tuple[Chunk, Chunk]:
        """What the pieces of a forward and of a backward take, each pass alone."""
        self.use(exchange)
        watch, worker = self.stopwatch, self.pieces[0]
        watch.spans.clear()
        with (
            watch.around(Recorder, "run", "compute"), watch.around(Piece, "backward", "compute"),
            watch.around(Piece, "weights", "behind"), watch.around(exchange, "rows", "exchange"),
        ):  # fmt: skip
            alone(worker.forward_pass(0, self.x))
            forward, watch.spans = watch.spans, []
            alone(worker.backward_pass(0, self.grad))
            backward, watch.spans = watch.spans, []
        return self.chunk(forward), self.chunk(backward)

    def chunk(self, spans: list[tuple[str, Any, Any]]) -> Chunk:
        times: dict[str, list[float]] = {"compute": [], "exchange": [], "behind": []}
        for name, start, end in spans:
            times[name].append(self.stopwatch.seconds(start, end))
        return Chunk(times["compute"], times["exchange"], times["behind"])


def middle(chunks: list[Chunk]) -> Chunk:
    """Medians, place by place."""

    def medians(rows: list[Any]) -> list[float]:
        return [statistics.median(column) for column in zip(*rows, strict=True)]

    return Chunk(*(medians([getattr(one, name) for one in chunks]) for name in ("compute", "exchange", "behind")))


def profile(pair: Pair, exchange: Exchange, trace: Path | None) -> dict[str, float]:
    """Seconds of kernels on the computing stream, of all else, and of all else beside those, of four pairs in turns."""
    pair.use(exchange)
    pair.begin(pair.pieces)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        pair.pairs("turns", pair.pieces, 2)
        torch.cuda.synchronize()
    pair.end(pair.pieces, 2)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_stream: dict[int, list[Any]] = {}
    for event in kernels:
        by_stream.setdefault(event["args"]["stream"], []).append(event)
    computing = max(by_stream, key=lambda stream: len(by_stream[stream]))
    own = union([(e["ts"], e["ts"] + e["dur"]) for e in by_stream.pop(computing)])
    other = union([(e["ts"], e["ts"] + e["dur"]) for rest in by_stream.values() for e in rest])
    if trace is not None:
        first = min(event["ts"] for event in kernels)
        short = [
            {
                "ph": "X", "pid": 0, "name": event["name"][:60], "ts": round(event["ts"] - first, 1),
                "dur": event["dur"], "tid": "computation" if event["args"]["stream"] == computing else "exchange",
            }
            for event in kernels if event["dur"] >= 5
        ]  # fmt: skip
        trace.write_text(json.dumps({"traceEvents": short, "displayTimeUnit": "ms"}))
    return {"computing": total(own) / 1e6, "exchange": total(other) / 1e6, "hidden": common(own, other) / 1e6}


Spans = list[tuple[float, float]]


def union(spans: Spans) -> Spans:
    """The same time without overlaps, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def common(one: Spans, other: Spans) -> float:
    """Time that lies in both."""
    return total(one) + total(other) - total(union([*one, *other]))


def measure(settings: argparse.Namespace, pair: Pair, ranks: int, exchanges: dict[str, Exchange]) -> list[Case]:
    """All cases of one process; the same calls on all of them, so that their collectives meet."""
    cases = []
    for name, exchange in exchanges.items():
        times = alternate(
            {
                "whole": lambda e=exchange: pair.run("whole", e, settings.pairs),
                "pieces": lambda e=exchange: pair.run("pieces", e, settings.pairs),
                "turns": lambda e=exchange: pair.run("turns", e, settings.pairs),
                "free": lambda: pair.run("turns", NoExchange(ranks), settings.pairs),
            },
            settings.rounds, settings.warmup,
        )  # fmt: skip
        found = [pair.chunks(exchange) for _ in range(settings.rounds + 1)][1:]
        forward, backward = (middle([both[place] for both in found]) for place in (0, 1))
        exchanged = sum(forward.exchange) + sum(backward.exchange)
        print(f"{name}: a pair's exchanges take {exchanged * 1e3:.2f} ms alone, computation "
              f"{(forward.work + backward.work) * 1e3:.2f}")  # fmt: skip
        for kind, chunk in (("F", forward), ("B", backward)):
            parts = (chunk.compute, chunk.behind, chunk.exchange)
            print(f"  {kind}: " + "; ".join(" ".join(f"{t * 1e3:.2f}" for t in part) for part in parts), flush=True)
        cases += [
            against(name, "one after the other, whole stages", times["turns"], times["whole"], 1.0),
            against(name, "one after the other, in pieces", times["turns"], times["pieces"], None),
            against(name, "without exchanges", times["turns"], times["free"], None),
            against(name, "simulated", times["turns"], [length(forward, backward)] * settings.rounds, None),
            against(f"{name}, alone", "simulated", times["pieces"],
                    [length(forward) + length(backward)] * settings.rounds, None),
        ]  # fmt: skip
        if pair.device.type == "cuda":
            seen = profile(pair, exchange, settings.trace if dist_rank() == 0 else None)
            share = seen["hidden"] / seen["exchange"]
            print(f"{name}: {seen}: {share:.1%} of the exchanges' time beside kernels of the computation")
            cases.append(
                Case(f"{name}, hidden (profiler)", "share", share, "all", 1.0, share, (share, share), None, None)
            )
    return cases


def against(name: str, peer: str, ours: list[float], theirs: list[float], bar: float | None) -> Case:
    """Milliseconds of a pair; more than 1 is faster than the peer."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return Case(
        f"{name}, pair", "ms", statistics.median(ours) * 1e3, peer, statistics.median(theirs) * 1e3, ratio,
        (min(ratios), max(ratios)), bar, None if bar is None else ratio >= bar,
    )  # fmt: skip


def dist_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def on_gpu(rank: int, settings: argparse.Namespace, store: str, answers: Any) -> None:
    """A process of several: its GPU, and the all-to-all with the others."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=settings.gpus, device_id=device, pg_options=options
    )
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    pair = Pair(settings, settings.gpus, device)
    cases = measure(settings, pair, settings.gpus, {f"NCCL, {settings.gpus} GPUs": GroupExchange(group)})
    if rank == 0:
        answers.put(cases)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def on_gpus(settings: argparse.Namespace) -> list[Case]:
    """A process for each GPU; what rank 0 measured."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=on_gpu, args=(rank, settings, f"{folder}/store", answers), daemon=True)
            for rank in range(settings.gpus)
        ]
        for process in processes:
            process.start()
        cases: list[Case] = answers.get(timeout=600)
        for process in processes:
            process.join()
    return cases


def main() -> None:
    arguments = parser("dualpipe", __doc__ or "", rounds=5)
    arguments.add_argument("--layers", type=int, default=2, help="MoE layers of a stage (default 2)")
    arguments.add_argument("--tokens", type=int, default=4096, help="tokens of a microbatch (default 4096)")
    arguments.add_argument("--ranks", type=int, default=32, help="ranks that share the experts, where they are copies")
    arguments.add_argument("--passes", type=int, nargs="+", default=[8], help="copies of an exchange (default 8)")
    arguments.add_argument("--few", type=int, nargs="+", default=[2, 8], help="the same by the kernel (default 2 8)")
    arguments.add_argument("--processors", type=int, default=20, help="multiprocessors that it has (default 20)")
    arguments.add_argument("--host", action="store_true", help="through the CPU's memory too")
    arguments.add_argument("--peer", action="store_true", help="through a second GPU too")
    arguments.add_argument("--pairs", type=int, default=4, help="turns of a measurement (default 4)")
    arguments.add_argument("--gpus", type=int, default=0, help="processes with a GPU each and NCCL (default: none)")
    arguments.add_argument("--small", action="store_true", help="small widths: whether it runs, no measurement")
    arguments.add_argument("--trace", type=Path, help="write the last profile as a Chrome trace")
    settings = arguments.parse_args()
    if settings.gpus:
        finish("dualpipe", settings, on_gpus(settings))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exchanges: dict[str, Exchange] = {
        f"copies x{passes}": CopyExchange(settings.ranks, passes) for passes in settings.passes
    }
    if device.type == "cuda":
        for passes in settings.few:
            exchanges[f"{settings.processors} processors x{passes}"] = FewProcessors(
                settings.ranks, passes, settings.processors
            )
    if settings.host:
        exchanges["through the host"] = ThroughHost(settings.ranks)
    if settings.peer:
        exchanges["through a second GPU"] = ThroughPeer(settings.ranks, torch.device("cuda", 1))
    cases = measure(settings, Pair(settings, settings.ranks, device), settings.ranks, exchanges)
    finish("dualpipe", settings, cases)


if __name__ == "__main__":
    main()
