"""The training loop, resumable to the last bit.

Decisions that rest on a clock (a smaller number of steps) are written to the work folder before they are used, so that
a killed run takes the same ones again.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soma.base import progress
from soma.base.artefact import read_json, write_json
from soma.base.errors import UserError
from soma.model.formulas import flops_per_token
from soma.model.tokenizer import Tokenizer
from soma.train.balance import RouterBalance
from soma.train.checkpoint import Checkpoints, last_whole
from soma.train.compute import Compute, fast_attention, peak_memory
from soma.train.config import TrainConfig, TuneConfig
from soma.train.guard import DivergenceGuard, TimeGuard
from soma.train.journal import Journal
from soma.train.objective import Objective
from soma.train.optim import set_learning_rate
from soma.train.parallel.apply import Parallel
from soma.train.peak import matmul_peak
from soma.train.samples import continue_texts
from soma.train.scaler import LossScaler
from soma.train.schedule import learning_rate
from soma.train.snapshot import PATIENCE
from soma.train.stamps import has_dropout, stamp
from soma.train.world import World


class DivergenceError(UserError):
    """The loss is not finite or has diverged. The message names the step, the batch and the last good checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """What a training stage did. Losses in nats per token (per pair for preferences)."""

    model: Path
    steps: int
    planned_steps: int
    limited: bool  # max_seconds took steps away
    stopped_early: bool
    tokens: int  # positions trained on
    loss: float
    validation_loss: float | None
    parameters: int
    flops_per_token: float
    seconds: float
    tokens_per_second: float
    matmul_peak: float
    mfu: float
    peak_memory_bytes: int
    documents_left_out: int  # longer than sequence_length
    documents_truncated: int  # ended after the last answer that fits


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint keeps besides tensors, loader and random state."""

    done: int = 0
    tokens: int = 0
    last_loss: float = float("nan")
    last_validation: float | None = None
    validated_at: int = -1
    best_validation: float = float("inf")
    best_step: int | None = None
    without_gain: int = 0
    train_seconds: float = 0.0
    spent: float = 0.0
    interval_losses: list[float] = field(default_factory=list)
    interval_seconds: float = 0.0
    interval_tokens: int = 0


class Trainer:
    """One run of the loop. `run()` trains from the newest whole checkpoint to the end."""

    def __init__(
        self, config: TrainConfig, work: Path, *, parallel: Parallel, objective: Objective, loader: Any,
        validation: Any, steps: int, compute: Compute, tokenizer: Tokenizer, identity: str, world: World,
        journal: Journal,
    ) -> None:  # fmt: skip
        self.config, self.work, self.objective = config, work, objective
        self.parallel, self.model = parallel, (model := parallel.model)
        self.loader, self.validation, self.compute, self.tokenizer = loader, validation, compute, tokenizer
        self.identity, self.world, self.journal = identity, world, journal
        self.planned = self.steps = steps
        self.at = Progress()
        self.optimizers = parallel.optimizers(config, compute)
        self.balance = RouterBalance(model, config.router_bias_rate, world)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.has_dropout = has_dropout(model)
        gradients = torch.device("cpu") if world.mesh.layout.cpu_offload else compute.device
        self.scaler = LossScaler(gradients, compute.precision == "fp16", world.size)
        self.divergence = DivergenceGuard(config.divergence_factor, config.divergence_steps)
        self.clock = TimeGuard(config.max_seconds or float("inf"))
        self.checkpoints = Checkpoints(
            work / "checkpoints", config.keep_checkpoints, world, config.background_checkpoints
        )
        self.checkpoints.group()  # now: what watches the groups is to know it
        self.microbatch = config.microbatch_size or config.batch_size // world.data_size
        self.validation_start = validation.state_dict() if validation is not None else None
        self.flops = flops_per_token(model.config, config.sequence_length)
        self.peak = matmul_peak(compute.device, compute.dtype)
        self.stopped_early = False

    # --- The loop ---

    def run(self) -> None:
        """Train to the end: to `steps`, an early stop, or where max_seconds cuts."""
        self.resume()
        try:
            self.train_steps()
        except RuntimeError:  # a rank may be lost, and it with what its checkpoint waits for
            raise
        except BaseException:  # what was being saved is saved; what went wrong with it matters no more
            with suppress(Exception):
                self.checkpoints.wait(PATIENCE)
            raise
        self.checkpoints.wait()
        if self.at.validated_at != self.at.done:
            self.evaluate()
        if self.config.early_stop and self.at.best_step not in (None, self.at.done):
            assert self.at.best_step is not None
            with self.parallel.loading():
                self.checkpoints.load_weights(self.at.best_step, self.model)
            self.at.last_validation = self.at.best_validation

    def train_steps(self) -> None:
        """Step after step, with what comes after each."""
        self.model.train()
        with progress.current().task("train", total=self.steps, unit="steps") as task:
            task.skip(self.at.done)
            while self.at.done < self.steps and not self.stopped_early:
                started = time.perf_counter()
                self.train_step()
                trained = time.perf_counter()
                self.at.done += 1
                self.after_step()
                self.clock.record(trained - started, time.perf_counter() - trained)
                self.limit_time()
                task.total = self.steps
                task.advance(1, loss=round(self.at.last_loss, 4))

    def train_step(self) -> None:
        """One optimizer step over a whole batch."""
        started = time.perf_counter()
        batch = self.parallel.own(self.next_batch())
        count = self.global_count(batch)
        total = torch.zeros((), device=self.compute.device)
        one = self.scaler.scale(torch.ones((), device=self.compute.device))
        parts = list(self.objective.parts(batch, self.microbatch))
        with fast_attention(self.compute.device):
            for number, part in enumerate(parts, 1):
                self.parallel.begin(last=number == len(parts))
                total += self.objective.backward(part, one / count, one * (self.microbatch / self.config.batch_size))
        self.parallel.finish()
        rate = learning_rate(self.config, self.at.done, self.steps)
        set_learning_rate(self.optimizers, rate)
        figures = [self.world.sum(total) / count, self.clip().to(total.device)]
        self.scaler.step(self.optimizers)
        self.balance.step()
        self.model.zero_grad(set_to_none=True)
        # A GPU is waited for once, with all of the step launched. A run that ends here has lost its weights by this
        # update, and its checkpoints have not.
        loss, norm = torch.stack(figures).tolist()
        self.stop_if_diverged(self.divergence.check(loss), batch)
        if not self.scaler.enabled and not np.isfinite(norm):
            self.stop_if_diverged(f"the gradient norm is {norm}", batch)
        self.count_step(loss, norm, rate, time.perf_counter() - started)

    def next_batch(self) -> Any:
        """This data rank's next batch; its tokens are named where something asks for that."""
        batch = next(self.loader)
        return stamp(batch, self.config.seed, self.at.done, self.world.data_rank) if self.has_dropout else batch

    def global_count(self, batch: Any) -> Tensor:
        """What the loss of this step is divided by, over all ranks: so unequal masks weigh as in one large batch. It
        stays on the device: nobody waits for it."""
        count = torch.full((), self.objective.count(batch), dtype=torch.int64, device=self.compute.device)
        return self.world.sum(count).clamp(min=1)

    def clip(self) -> Tensor:
        """Clip the global gradient norm; returns it as it was before."""
        self.scaler.unscale(self.optimizers)
        limit = self.config.grad_clip or float("inf")
        return self.parallel.clip(self.parameters, limit)

    def count_step(self, loss: float, norm: float, rate: float, seconds: float) -> None:
        """Keep the step's figures and write the log line of an interval."""
        at, tokens = self.at, self.config.tokens_per_step()
        at.last_loss, at.tokens = loss, at.tokens + tokens
        at.train_seconds += seconds
        at.interval_seconds += seconds
        at.interval_tokens += tokens
        at.interval_losses.append(loss)
        step = at.done + 1
        if step % self.config.log_every and step != self.steps:
            return
        speed = at.interval_tokens / at.interval_seconds
        self.journal.write(
            "train",
            step,
            loss=float(np.mean(at.interval_losses)),
            learning_rate=rate,
            grad_norm=norm,
            tokens=at.tokens,
            tokens_per_second=speed,
            mfu=speed * self.flops / (self.peak * self.world.size),
            flops_per_token=self.flops,
            peak_memory_bytes=peak_memory(),
            seconds=at.train_seconds,
        )
        at.interval_losses, at.interval_seconds, at.interval_tokens = [], 0.0, 0

    def after_step(self) -> None:
        """Evaluation and checkpoint, where they are due."""
        config, done = self.config, self.at.done
        is_best = False
        if config.evaluate_every and done % config.evaluate_every == 0:
            is_best = self.evaluate()
        due = config.checkpoint_every and done % config.checkpoint_every == 0
        if due or (config.early_stop and is_best):
            self.save()
        if config.early_stop and self.at.without_gain >= config.early_stop:
            progress.current().note(
                f"early stop at step {done}: the held-out loss has not gained for {self.at.without_gain} evaluations; "
                f"the weights of step {self.at.best_step} are kept"
            )
            self.stopped_early = True

    # --- Evaluation ---

    def evaluate(self) -> bool:
        """Held-out loss and samples, into the log. Whether the loss is the best so far."""
        at, config = self.at, self.config
        loss = self.validation_loss() if self.validation is not None else None
        at.validated_at = at.done
        self.model.eval()
        if config.sample_prompts:
            is_chat = isinstance(config, TuneConfig) and self.tokenizer.has_chat_template
            texts = continue_texts(
                self.parallel, self.tokenizer, config.sample_prompts, config.sample_tokens, config.sample_temperature,
                config.seed, self.compute.device, is_chat,
            )  # fmt: skip
            for prompt, text in zip(config.sample_prompts, texts, strict=True):
                self.journal.write("sample", at.done, prompt=prompt, text=text)
        self.model.train()
        if loss is None:
            return False
        at.last_validation = loss
        self.journal.write("evaluate", at.done, validation_loss=loss)
        if loss < at.best_validation:
            at.best_validation, at.best_step, at.without_gain = loss, at.done, 0
            return True
        at.without_gain += 1
        return False

    def validation_loss(self) -> float | None:
        """Mean loss over the first `evaluate_batches` batches of the validation split, the same ones every time."""
        self.validation.load_state_dict(self.validation_start)
        sums = torch.zeros(2, dtype=torch.float64, device=self.compute.device)
        self.model.eval()
        for _, whole in zip(range(self.config.evaluate_batches), self.validation, strict=False):
            batch = self.parallel.own(whole)
            sums[1] += self.objective.count(batch)
            for part in self.objective.parts(batch, self.microbatch):
                sums[0] += self.objective.loss(part)
        self.model.train()
        total, count = self.world.sum(sums).tolist()
        return total / count if count else None

    # --- Guards ---

    def stop_if_diverged(self, reason: str | None, batch: Any) -> None:
        """Raise DivergenceError if there is a reason to, with the batch written to the work folder."""
        if reason is None:
            return
        with suppress(Exception):
            self.checkpoints.wait(PATIENCE)  # so that the message names it
        step = self.at.done + 1
        rank = "" if self.world.is_main else f"-rank-{self.world.rank}"
        path = self.work / f"bad-batch-step-{step}{rank}.npz"
        np.savez(path, allow_pickle=False, **batch_arrays(batch))
        position = json.dumps(self.loader.state_dict(), default=str)
        raise DivergenceError(
            f"stopped at step {step}: {reason}. Its batch is in {path} (loader position after it: {position}). "
            f"{last_whole(self.checkpoints)} Lower learning_rate (now {self.config.learning_rate:g}), lengthen warmup, "
            "or look at the batch"
        )

    def limit_time(self) -> None:
        """Another number of steps when max_seconds says so, or when a killed run had decided so at this step."""
        decisions = self.decisions()
        taken = dict(decisions["steps"])
        if taken and self.at.done <= max(taken):  # a killed run has been here
            self.steps = taken.get(self.at.done, self.steps)
            return
        closing = self.config.evaluate_batches / 3  # a forward pass is a third of a step
        steps = self.world.agree(self.clock.decide(self.at.done, self.steps, self.planned, closing))
        if steps is None:
            return
        decisions["steps"].append([self.at.done, steps])
        if self.world.is_main:
            write_json(self.work / "decisions.json", decisions)
        progress.current().note(
            f"max_seconds {self.config.max_seconds:g}: {steps} steps in place of {self.steps}, at this machine's speed"
        )
        self.journal.write("note", self.at.done, text=f"{steps} steps in place of {self.steps}")
        self.steps = steps

    def decisions(self) -> dict[str, Any]:
        """What this run has decided so far: `steps` is a list of [at step, new total]."""
        path = self.work / "decisions.json"
        return read_json(path) if path.exists() else {"steps": []}

    # --- Checkpoints ---

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.at.spent = self.clock.spent
        self.checkpoints.save(
            self.at.done,
            self.model,
            self.optimizers,
            {
                "identity": self.identity,
                "progress": asdict(self.at),
                "loader": self.loader.state_dict(),
                "scaler": self.scaler.state_dict(),
                "divergence": self.divergence.state(),
                "log_bytes": self.journal.size(),
            },
            best=self.at.best_step if self.config.early_stop else None,
        )

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        step = self.checkpoints.newest()
        if step is None:
            self.journal.start(0)
            return
        with self.parallel.loading():
            run = self.checkpoints.load(step, self.model, self.optimizers)
        if run["identity"] != self.identity:
            raise UserError(
                f"{self.work}: its checkpoints are of another run (model, data or settings differ): give another work "
                "folder, or remove this one to start anew"
            )
        self.at = Progress(**run["progress"])
        self.loader.load_state_dict(run["loader"])
        self.scaler.load_state_dict(run["scaler"])
        self.divergence.restore(run["divergence"])
        self.journal.start(run["log_bytes"])
        self.clock.spent = self.at.spent
        for at, steps in self.decisions()["steps"]:
            if at <= step:
                self.steps = steps
        self.stopped_early = bool(self.config.early_stop) and self.at.without_gain >= self.config.early_stop
        progress.current().note(f"resumed at step {step} of {self.steps}")

    def result(self, model: Path) -> TrainResult:
        """The figures of the finished run."""
        speed = self.at.tokens / max(self.at.train_seconds, 1e-9)
        return TrainResult(
            model=model,
            steps=self.at.done,
            planned_steps=self.planned,
            limited=bool(self.decisions()["steps"]),
            stopped_early=self.stopped_early,
            tokens=self.at.tokens,
            loss=self.at.last_loss,
            validation_loss=self.at.last_validation,
            parameters=self.parallel.count_parameters(),
            flops_per_token=self.flops,
            seconds=self.clock.spent,
            tokens_per_second=speed,
            matmul_peak=self.peak,
            mfu=speed * self.flops / (self.peak * self.world.size),
            peak_memory_bytes=peak_memory(),
            documents_left_out=self.loader.left_out,
            documents_truncated=getattr(self.loader, "truncated", 0),
        )


def batch_arrays(batch: Any) -> dict[str, np.ndarray]:
    """A batch's arrays by name, for a file: those of a preference batch with `chosen_` and `rejected_` before."""
    if hasattr(batch, "chosen"):
        both = (("chosen", batch.chosen), ("rejected", batch.rejected))
        return {f"{side}_{name}": array for side, half in both for name, array in batch_arrays(half).items()}
    return {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "document_ids")}
