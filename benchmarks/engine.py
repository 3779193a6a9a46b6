"""The engine on a CPU against what a user would pick instead: llama.cpp, the genai pipelines of OpenVINO and ONNX
Runtime, and transformers.

All sides have the same random weights of real shapes (SmolLM2-135M, Qwen3-0.6B), and every engine lives in a process of
its own. They take turns. llama.cpp is fed through its batch API by a loop that does nothing but argmax: continuous
batching at its best. Its matrices are all in one format (`pure`), as ours are. openvino-genai reads its Q8_0 file and
runs its own continuous batching. onnxruntime-genai runs int4, one batch of prompts of equal length. llama.cpp is built
without AMX (`-mno-amx-tile`): with it, llama-cpp-python 0.3.36 dies of an illegal instruction in Q8_0 and Q4_0 on the
processor at hand. transformers is ten times slower with many requests: it runs once, without a warm-up. In `stream` the
clients' process shares the cores with the service.

A side that breaks is written down as not run, with the reason, and so is what does not begin in `--minutes`; the result
file is written anew after each part.

    make bench, or: python -m venv peers
    peers/bin/pip install llama-cpp-python gguf safetensors openvino-genai onnxruntime-genai onnx-ir
    python benchmarks/engine.py --peers peers/bin/python --json
"""

import argparse
import functools
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import torch
from common import Case, compare, finish, make_case, parser, write

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
PREFILL_BAR, PREFIX_BAR, BANDWIDTH_BAR, STREAM_BAR = 1.3, 5.0, 0.8, 0.9
START_SECONDS = 90.0
Run = Callable[[], float]


class Bench:
    """One shape's files, the workers that run on them, and what was not run."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.folder, self.options = name, folder / name, options
        self.rounds = {"rounds": options.rounds, "warmup": options.warmup}
        self.vocabulary = SHAPES[name].vocab_size
        self.cases: list[Case] = []
        self.not_run: dict[str, str] = {}
        self.workers: list[Worker] = []
        self.formats = dict(FORMATS) if name == "135M" else {key: FORMATS[key] for key in ("int8", "int4")}
        self.folder.mkdir()
        save_model(Transformer(SHAPES[name], dtype=torch.float32), self.folder)
        if self._peer("convert", self.folder, self.folder / "f32.gguf"):
            for their in self.formats.values():
                self._peer("quantize", self.folder / "f32.gguf", self.folder / f"{their}.gguf", their)
        (self.folder / "f32.gguf").unlink(missing_ok=True)

    def _peer(self, what: str, *arguments: object, script: str = "gguf_peer", python: str = "") -> bool:
        command = [python or self.options.peers, str(PEERS / f"{script}.py"), what, *map(str, arguments)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.not_run[f"{self.name} {script} {what}"] = last_line(error)
            return False
        return True

    def worker(self, python: str, script: str, *arguments: object) -> Worker | None:
        """A worker that `close` ends; None, written down, if it does not start."""
        try:
            worker = Worker(python, script, *arguments)
        except (OSError, RuntimeError) as error:
            self.not_run[f"{self.name} {script}"] = str(error)
            return None
        self.workers.append(worker)
        return worker

    def ours(self, weights: str, *, length: int, sequences: int) -> Worker:
        """Our engine, on weights quantized at load."""
        worker = self.worker(sys.executable, "ours", self.folder, weights, self.options.threads, length, sequences)
        if worker is None:
            raise RuntimeError("our own engine does not start")
        return worker

    def llama(self, format_: str, *, length: int, sequences: int) -> Worker | None:
        arguments = [self.folder / f"{format_}.gguf", self.options.threads, length, sequences]
        return self.worker(self.options.peers, "gguf_peer", *arguments)

    def hugging_face(self) -> Worker | None:
        return self.worker(sys.executable, "hugging_face", self.folder, "bfloat16", self.options.threads)

    def openvino(self, *, length: int, sequences: int) -> Worker | None:
        made = (self.folder / "openvino_model.xml").is_file()
        if not made and not self._peer("convert", self.folder / "q8_0.gguf", script="openvino_peer"):
            return None
        return self.worker(self.options.peers, "openvino_peer", self.folder, self.options.threads, length, sequences)

    def onnxruntime(self) -> Worker | None:
        out = self.folder / "onnxruntime"
        if not (out / "genai_config.json").is_file():
            write_tokenizer(self.folder, self.vocabulary)
            convert = [out, self.options.peers, self.options.threads]
            if not self._peer("convert", self.folder, *convert, script="onnxruntime_genai_peer", python=sys.executable):
                return None
        return self.worker(self.options.peers, "onnxruntime_genai_peer", out)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers.clear()

    def prompts(self, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (count, tokens), generator=generator).tolist()

    def guard(self, what: str, run: Run) -> Run:
        """NaN, and a line of what was not run, where a peer breaks."""

        def guarded() -> float:
            try:
                return run()
            except (RuntimeError, OSError) as error:
                self.not_run.setdefault(what, str(error))
                return math.nan

        return guarded

    def compare(
        self, case: str, unit: str, ours: Run, peers: dict[str, Run], bars: dict[str, float | None], **more: object
    ) -> None:  # fmt: skip
        """As `common.compare`; the cases of peers that broke are left out."""
        case = f"{self.name} {case}"
        peers = {name: self.guard(f"{case}: {name}", run) for name, run in peers.items()}
        if not peers:
            self.not_run.setdefault(case, "no peer runs")
            return
        done = compare(case, unit, ours, peers, bars=bars, **{**self.rounds, **more})  # type: ignore[arg-type]
        self.cases += [one for one in done if not math.isnan(one.theirs)]

    def fastest(self, runs: dict[str, Run]) -> str | None:
        """The name of the run with the highest figure, the second of two calls each; None if none runs."""
        values: dict[str, float] = {}
        for name, run in runs.items():
            guarded = self.guard(f"{self.name} {name}", run)
            if not math.isnan(guarded()) and not math.isnan(value := guarded()):
                values[name] = value
                print(f"  {name}: {value:,.4g}", file=sys.stderr, flush=True)
        return max(values, key=values.__getitem__, default=None)


def last_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or b""
    return (said.decode(errors="replace").strip().splitlines() or [str(error)])[-1][:200]


def decode(bench: Bench) -> None:
    """Batch 1: tokens/s after the first token; for 0.6B also the share of the memory bandwidth."""
    prompt, count = bench.prompts(1, 64), 64
    for weights, format_ in bench.formats.items():
        ours, theirs = bench.ours(weights, length=256, sequences=1), bench.llama(format_, length=256, sequences=1)

        def speed(worker: Worker) -> float:
            return (count - 1) / worker("generate", prompts=prompt, count=count)["decode"]

        peers = {
            f"llama.cpp {format_}": theirs,
            "onnxruntime-genai int4": bench.onnxruntime() if weights == "int4" else None,
        }
        bench.compare(
            f"decode, {weights}", "tokens/s", functools.partial(speed, ours),
            {name: functools.partial(speed, worker) for name, worker in peers.items() if worker},
            {f"llama.cpp {format_}": None if weights == "bf16" else 1.0, "onnxruntime-genai int4": None},
        )  # fmt: skip
        if bench.name == "0.6B":
            nbytes, case = ours("weight_bytes"), f"0.6B decode, {weights}: weights read"
            pairs = [(speed(ours) * nbytes / 1e9, ours("read_bandwidth")) for _ in range(bench.options.rounds)]
            reached, memory = zip(*pairs, strict=True)
            bench.cases.append(make_case(case, "GB/s", reached, "plain read of memory", memory, BANDWIDTH_BAR))
        bench.close()


def prefill(bench: Bench) -> None:
    """One long prompt: tokens/s up to the first token, against the best of llama.cpp's formats."""
    seeds = iter(range(10**6))
    sizes = {"length": 2064, "sequences": 1}
    ours = {weights: bench.ours(weights, **sizes) for weights in ("bf16", "int8")}
    theirs = {f"llama.cpp {their}": bench.llama(their, **sizes) for their in FORMATS.values()}
    for tokens in (512, 2048):

        def speed(worker: Worker, tokens: int = tokens) -> float:
            prompts = bench.prompts(1, tokens, next(seeds))  # never seen before: no prefix cache helps
            return tokens / worker("generate", prompts=prompts, count=1)["prefill"]

        runs = {name: functools.partial(speed, worker) for name, worker in theirs.items() if worker}
        best = bench.fastest(dict(runs))
        for weights, worker in ours.items():
            bench.compare(
                f"prefill {tokens}, {weights}", "tokens/s", functools.partial(speed, worker),
                {best: runs[best]} if best else {}, {best: PREFILL_BAR} if best else {},
            )  # fmt: skip


def concurrent(bench: Bench) -> None:
    """16 and 64 requests of 128 tokens in and 128 out: output tokens/s."""
    seeds = iter(range(10**6))
    for requests, bar in PARALLEL_BARS.items():
        sizes = {"length": 256, "sequences": requests}

        def speed(worker: Worker, call: str = "generate", requests: int = requests, count: int = 128) -> float:
            done = worker(call, prompts=bench.prompts(requests, 128, next(seeds)), count=count)
            return requests * count / (done["seconds"] if "seconds" in done else done["prefill"] + done["decode"])

        theirs = {f"llama.cpp {their}": bench.llama(their, **sizes) for their in FORMATS.values()}
        runs = {name: functools.partial(speed, worker) for name, worker in theirs.items() if worker}
        best = bench.fastest({name: functools.partial(run, count=32) for name, run in runs.items()})
        openvino, onnxruntime = bench.openvino(**sizes), bench.onnxruntime()
        ours = {name: bench.ours(name, **sizes) for name in bench.options.weights}
        for weights, worker in ours.items():
            peers, bars = ({best: runs[best]}, {best: bar}) if best else ({}, {})
            if openvino:
                peers["openvino-genai"], bars["openvino-genai"] = functools.partial(speed, openvino), 1.0
            if onnxruntime:
                peers["onnxruntime-genai int4"] = functools.partial(speed, onnxruntime)
                bars["onnxruntime-genai int4"] = None
            bench.compare(
                f"{requests} requests, {weights}", "output tokens/s", functools.partial(speed, worker), peers, bars
            )
        weights, worker = next(iter(ours.items()))
        hugging_face = bench.hugging_face()
        slow = {"transformers generate": ("generate", 5.0), "transformers continuous batching": ("generate_batch", 2.0)}
        bench.compare(
            f"{requests} requests, {weights}", "output tokens/s", functools.partial(speed, worker),
            {name: functools.partial(speed, hugging_face, call) for name, (call, _) in slow.items()}
            if hugging_face else {}, {name: least for name, (_, least) in slow.items()}, rounds=1, warmup=0,
        )  # fmt: skip
        bench.close()


def shared_prefix(bench: Bench) -> None:
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

    bench.compare(
        f"shared prefix, {weights}: mean TTFT", "s", functools.partial(seconds, worker),
        {"without prefix cache": functools.partial(seconds, plain)}, {"without prefix cache": PREFIX_BAR},
        higher_is_better=False,
    )  # fmt: skip


def stream(bench: Bench) -> None:
    """64 clients that stream over HTTP from `soma serve`, against the engine without a service: output tokens/s."""
    weights, requests, count = bench.options.weights[0], 64, 128
    seeds = iter(range(10**6))
    write_tokenizer(bench.folder, bench.vocabulary)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    precision = "fp32" if weights == "fp32" else "bf16"  # as the engine alone has it
    rounding = ["--weights", weights] if weights in ("int8", "int4") else []
    command = [
        sys.executable, "-c", "from soma.cli import main; main()", "serve", str(bench.folder), "--port", str(port),
        "--name", "bench", "--max-length", "256", "--max-running", str(requests),
        "--precision", precision, *rounding,
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        clients = bench.worker(sys.executable, "http_clients", f"http://127.0.0.1:{port}/v1/completions", "")
        offline = bench.ours(weights, length=256, sequences=requests)
        if clients is None:
            return

        def speed(worker: Worker, call: str) -> float:
            done = worker(call, prompts=bench.prompts(requests, 128, next(seeds)), count=count)
            if "client_cpu_seconds" in done:
                share = done["client_cpu_seconds"] / done["seconds"]
                print(f"  the clients took {share:.2f} of a core", file=sys.stderr, flush=True)
            return requests * count / (done["seconds"] if "seconds" in done else done["prefill"] + done["decode"])

        bench.compare(
            f"{requests} streams over HTTP, {weights}", "output tokens/s", functools.partial(speed, clients, "stream"),
            {"the engine alone": functools.partial(speed, offline, "generate")}, {"the engine alone": STREAM_BAR},
        )  # fmt: skip
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose every id has a text of three letters, so that each token makes an event."""
    from itertools import islice, product

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    threes = map("".join, islice(product(letters, repeat=3), vocabulary))
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *threes]
    inner = Tokenizer(models.BPE({text: place for place, text in enumerate(texts[:vocabulary])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    """Until `url` answers. Raises RuntimeError if the server ends, or takes `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"soma serve ended with status {server.returncode}")
        try:
            with urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"soma serve did not answer in {START_SECONDS:g} s")


WORKS = {"decode": decode, "prefill": prefill, "concurrent": concurrent, "prefix": shared_prefix, "stream": stream}
BOTH = ("decode",)  # for both shapes, the others for the smaller one


def main() -> None:
    command = parser("engine", __doc__.splitlines()[0], rounds=3)
    command.add_argument("--peers", required=True, help="Python with llama-cpp-python, gguf and safetensors")
    command.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    command.add_argument("--work", nargs="*", default=list(WORKS), choices=list(WORKS))
    command.add_argument("--weights", nargs="*", default=["int8"], help="ours, for many requests")
    command.add_argument("--minutes", type=float, default=14.0, help="begin nothing new after so long")
    options = command.parse_args()
    start = time.monotonic()
    cases: list[Case] = []
    not_run: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            works = [work for work in options.work if work in BOTH or shape == "135M"]
            if not works:
                continue
            if time.monotonic() - start > options.minutes * 60:
                not_run |= {f"{shape} {work}": f"{options.minutes:g} minutes were over" for work in works}
                continue
            bench = Bench(shape, Path(folder), options)
            for work in works:
                if time.monotonic() - start > options.minutes * 60:
                    bench.not_run[f"{shape} {work}"] = f"{options.minutes:g} minutes were over"
                    continue
                began = time.monotonic()
                try:
                    WORKS[work](bench)
                except Exception as error:  # noqa: BLE001  (what is done is not lost)
                    bench.not_run[f"{shape} {work}"] = f"{type(error).__name__}: {error}"
                finally:
                    bench.close()
                print(f"{shape} {work}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                if options.json:
                    write("engine", options, cases + bench.cases, ["transformers"], not_run | bench.not_run)
            cases += bench.cases
            not_run |= bench.not_run
    finish("engine", options, cases, ["transformers"], not_run)


if __name__ == "__main__":
    main()
