"""Training speed of one 10M-parameter Llama: ours, `transformers.Trainer`, and a plain hand-written PyTorch loop.

All three train the same shape from the same random weights on the same batches (random ids, seen once), with AdamW,
gradient clipping and bf16 autocast (fp32 where bf16 is not native), and are timed over whole optimizer steps, after
steps that warm up and compile. They take turns within one process.

    python benchmarks/train.py --json
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Case, Run, compare, finish, parser

from soma.data.tokens import SplitWriter, write_index
from soma.model.config import ModelConfig
from soma.model.hub import save_model
from soma.model.transformer import Transformer
from soma.train.compute import Compute, native_bf16, resolve_device
from soma.train.config import TrainConfig
from soma.train.journal import Journal
from soma.train.loop import Trainer
from soma.train.objective import LanguageModeling, make_loader
from soma.train.parallel.apply import parallelize
from soma.train.tracking import NullTracker
from soma.train.world import World

SHAPE = ModelConfig(
    family="llama", vocab_size=8192, hidden_size=320, num_hidden_layers=6, num_attention_heads=5,
    num_key_value_heads=5, intermediate_size=864, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
SEQUENCE, BATCH, LEARNING_RATE = 512, 8, 1e-3


def write_tokens(folder: Path, steps: int) -> None:
    """Shards of random ids, documents as long as a sequence."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, documents in (("train", steps * BATCH), ("validation", BATCH)):
        with SplitWriter(folder, split, SHAPE.vocab_size, masked=False) as writer:
            for _ in range(documents):
                writer.add(torch.randint(1, SHAPE.vocab_size, (SEQUENCE,), generator=generator).tolist())
        splits[split] = writer.entry()
    write_index(folder, SHAPE.vocab_size, "random", 0, masked=False, splits=splits)


class Ours:
    """Our trainer, a few steps at a time: `Trainer.train_step` is what `Trainer.run` repeats."""

    def __init__(
        self, tokens: Path, start: Path, device: torch.device, precision: str, compiled: bool, isolate: bool
    ) -> None:
        from soma.model.hub import load_model

        config = TrainConfig(
            steps=10**6, sequence_length=SEQUENCE, batch_size=BATCH, learning_rate=LEARNING_RATE, warmup=0,
            isolate_documents=isolate, log_every=10,
        )  # fmt: skip
        compute, world = Compute(device, precision, compiled), World()
        model = load_model(start, dtype=torch.float32).to(device).train()
        work = Path(tempfile.mkdtemp())
        self.trainer = Trainer(
            config, work, parallel=parallelize(model, world.mesh), objective=LanguageModeling(model, config, compute),
            loader=make_loader(config, world, tokens, "train"), validation=None, steps=10**6, compute=compute,
            tokenizer=None, identity="", world=world, journal=Journal(work / "metrics.jsonl", NullTracker(), True),
        )  # type: ignore[arg-type]  # fmt: skip

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.trainer.train_step()
            self.trainer.at.done += 1


class PlainLoop:
    """What one would write by hand with the transformers model."""

    def __init__(self, tokens: Path, start: Path, device: torch.device, precision: str, compiled: bool) -> None:
        self.model = hf_model(start).to(device).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        self.device, self.precision = device, precision
        self.batches = random_batches(tokens, device)

    def steps(self, count: int) -> None:
        for _ in range(count):
            tokens_BT, targets_BT = next(self.batches)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits_BTV = self.forward(tokens_BT).logits
                loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()


class HuggingFaceTrainer:
    """`transformers.Trainer`: one call of `train()` per measurement, timed between its first and last step's ends."""

    def __init__(self, tokens: Path, start: Path, device: torch.device, precision: str, compiled: bool) -> None:
        self.model, self.device, self.precision, self.compiled = hf_model(start), device, precision, compiled
        batches = random_batches(tokens, torch.device("cpu"))
        rows = torch.cat([next(batches)[0] for _ in range(64)])
        self.rows = [{"input_ids": row, "labels": row} for row in rows]

    def seconds(self, count: int) -> float:
        """Seconds of `count` steps, after two that warm up (and compile, the first time)."""
        from transformers import Trainer as Theirs
        from transformers import TrainerCallback, TrainingArguments

        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronize()
                ends.append(time.perf_counter())

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=count + 2, save_strategy="no",
            learning_rate=LEARNING_RATE, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused",
            report_to=[], disable_tqdm=True, logging_steps=10**6, use_cpu=self.device.type == "cpu",
            bf16=self.precision == "bf16", torch_compile=self.compiled, dataloader_num_workers=0,
        )  # fmt: skip
        Theirs(self.model, arguments, train_dataset=self.rows, callbacks=[Clock()]).train()
        return ends[-1] - ends[1]


def hf_model(start: Path) -> Any:
    """The transformers model from our folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)


def random_batches(tokens: Path, device: torch.device) -> Any:
    """(tokens, targets) of our loader: every side sees the same ids."""
    config = TrainConfig(sequence_length=SEQUENCE, batch_size=BATCH)
    for batch in make_loader(config, World(), tokens, "train"):
        yield torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(steps: Callable[[int], None], count: int) -> Run:
    """A run of `count` steps as tokens/s."""

    def run() -> float:
        synchronize()
        start = time.perf_counter()
        steps(count)
        synchronize()
        return count * BATCH * SEQUENCE / (time.perf_counter() - start)

    return run


def timed_trainer(trainer: HuggingFaceTrainer, count: int) -> Run:
    return lambda: count * BATCH * SEQUENCE / trainer.seconds(count)


def measure(folder: Path, device: torch.device, arguments: Any) -> list[Case]:
    """All cases: eager and compiled, in the fastest precision that is native."""
    precision = "bf16" if native_bf16(device) else "fp32"
    tokens, start, count = folder / "tokens", folder / "start", arguments.steps
    tokens.mkdir()
    write_tokens(tokens, 64)
    save_model(Transformer(SHAPE, dtype=torch.float32), start)
    ours = timed(Ours(tokens, start, device, precision, False, isolate=False).steps, count)
    loop = timed(PlainLoop(tokens, start, device, precision, False).steps, count)
    theirs = timed_trainer(HuggingFaceTrainer(tokens, start, device, precision, False), count)
    rounds = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    cases = compare(
        f"eager {precision}", "tokens/s", ours, {"plain loop": loop, "transformers.Trainer": theirs},
        bars={"plain loop": 0.97}, **rounds,
    )  # fmt: skip
    if arguments.isolated:
        isolated = timed(Ours(tokens, start, device, precision, False, isolate=True).steps, count)
        cases += compare(f"eager {precision}, documents isolated", "tokens/s", isolated, {"plain loop": loop}, **rounds)
    if not arguments.eager:
        compiled = timed(Ours(tokens, start, device, precision, True, isolate=False).steps, count)
        compiled_theirs = timed_trainer(HuggingFaceTrainer(tokens, start, device, precision, True), count)
        peers = {"transformers.Trainer": theirs, "transformers.Trainer, torch_compile": compiled_theirs}
        bars = {"transformers.Trainer": 1.3, "transformers.Trainer, torch_compile": 1.0}
        # With one warm-up round, our first round after theirs had compiled once took 15 s on a GPU, as if it compiled
        # anew; the cause was not looked into. A second warm-up round, for all sides, keeps it out of the figures.
        rounds["warmup"] = max(2, arguments.warmup)
        cases += compare(f"compiled {precision}", "tokens/s", compiled, peers, bars=bars, **rounds)
    return cases


def main() -> None:
    command = parser("train", __doc__.split("\n")[0])
    command.add_argument("--steps", type=int, default=10, help="optimizer steps of one measurement (default 10)")
    command.add_argument("--eager", action="store_true", help="leave the compiled cases out")
    command.add_argument("--isolated", action="store_true", help="also with attention within documents")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = command.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(Path(folder), resolve_device(arguments.device), arguments)
    finish("train", arguments, cases, packages=["transformers", "accelerate", "numpy"])


if __name__ == "__main__":
    main()
