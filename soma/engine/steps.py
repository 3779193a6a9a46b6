"""What the engine's thread does: step after step, until there is nothing left to do.

Each step the scheduler spends a budget of tokens on letting requests catch up: chunks of prompts and single tokens of
those that are answering go through the model in one flat batch, over one paged cache. Equal beginnings are computed
once.

Shapes: T tokens of a step, R rows whose logits are wanted, V vocabulary.
"""

import logging
import math
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from soma.engine.adapters import Adapters
from soma.engine.batch import Batch, make_batch
from soma.engine.blocks import BlockPool
from soma.engine.overlap import NOTHING, PLACEHOLDER, UNSETTLED, Flight, can_overlap, draw
from soma.engine.params import TokenLogprob
from soma.engine.request import LATE, Request, TokenEvent
from soma.engine.runner import Runner
from soma.engine.sampling import token_logprobs
from soma.engine.scheduler import Scheduler, Work
from soma.engine.speculate import Speculator, verify

if TYPE_CHECKING:
    from soma.engine.parallel.group import RankGroup

log = logging.getLogger("soma.engine")


class StepLoop:
    """The half of an `Engine` that runs on its thread. `changed` guards what both halves touch."""

    runner: "Runner | RankGroup"
    scheduler: Scheduler[Request]
    pool: BlockPool
    adapters: Adapters
    speculator: Speculator | None
    device: torch.device
    overlap: bool  # plan and deliver while a step computes
    flight: Flight | None  # the step whose tokens were not read yet
    inbox: list[Request]  # submitted, not yet seen by the thread
    closing: bool
    changed: threading.Condition

    @property
    def waiting(self) -> list[Request]:
        """Requests that have no place yet."""
        return [*self.inbox, *self.scheduler.waiting]

    @property
    def running(self) -> list[Request]:
        """Requests that hold a part of the cache."""
        return list(self.scheduler.running)

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while self._admit():
                    self._step()
        except BaseException as error:  # our own fault; nobody may wait for ever on a thread that is gone
            with self.changed:
                self.closing = True
                requests = [*self.running, *self.waiting]
                self.inbox.clear()
                for request in [*self.scheduler.running, *self.scheduler.waiting]:
                    self.scheduler.remove(request)
            for request in requests:
                self.adapters.release(request.adapter)
                self._send(request, request.end("error", f"{type(error).__name__} in the engine"))
            raise

    def _admit(self) -> bool:
        """Wait for work, hand what came to the scheduler, end what was cancelled or is too late; False at the end."""
        with self.changed:
            while not self.waiting and not self.scheduler.running:
                if self.closing:
                    return False
                self.changed.wait()
            now = time.monotonic()
            for request in self.inbox:
                self.scheduler.add(request, now)
            self.inbox.clear()
        for request in [request for request in (*self.running, *self.waiting) if request.cancelled]:
            self._finish(request, "abort")
        for request in self.scheduler.expired(now):
            self._finish(request, "error", LATE)
        return True

    def _step(self) -> None:
        """One step: plan, compute, draw the next tokens, deliver them."""
        now = time.monotonic()
        if self.speculator is not None:
            self.speculator.plan(self.scheduler)
        with self.changed:
            plan = self.scheduler.schedule(now)
        for work in plan:
            work.sequence.scheduled = work.sequence.scheduled or now
        if self.speculator is not None:
            plan = self.speculator.fill(plan)
        if plan:
            self._compute(plan)
        else:
            self._land()
        if plan and self.speculator is not None:
            self.speculator.observe(sum(work.count for work in plan), time.monotonic() - now)

    def _compute(self, plan: list[Work[Request]]) -> None:
        """Run the shares of a step together; if that fails one by one, so that only those at fault end.

        While it runs, the tokens of the step before it are read and delivered, if they are not yet: see `overlap`.
        """
        plan = sorted(plan, key=_slot)  # an adapter's rows side by side
        drawing = [work.sequence for work in plan if work.is_last]
        overlaps = self.overlap and all(can_overlap(work.sequence.params) for work in plan)
        try:
            logits_RV = self.runner.step(self._batch(plan))
            tokens_R = draw(logits_RV, drawing) if overlaps else None
        except Exception as error:
            if self.flight is not None:  # whose requests may be at fault, or over
                self._land()
                plan = [work for work in plan if work.sequence.finish_reason is None]
            if len(plan) > 1:
                for work in plan:
                    self._compute([work])
                    self._land()
            elif plan:
                log.exception("a step failed")
                self._finish(plan[0].sequence, "error", f"{type(error).__name__} in the engine")
            return
        late = self._land()
        with self.changed:
            self.scheduler.commit(
                work for work in plan if work.sequence.finish_reason is None and work.sequence not in late
            )
        if tokens_R is None:
            self._draw(plan, logits_RV, late)
            return
        self.flight = Flight(drawing, tokens_R, logits_RV)
        self.flight.dropped = late
        for request in drawing:
            if request.finish_reason is not None or request in late:
                continue
            if request.generated + 1 < request.max_tokens:
                request.tokens.append(PLACEHOLDER)
                request.pending = 1

    def _land(self) -> set[Request]:
        """Read the tokens of the step in flight and deliver them to those who still want them.

        Gives the requests whose token was not settled there: what was computed since then did not read the right one.
        """
        flight, self.flight = self.flight, None
        late: set[Request] = set()
        if flight is None:
            return late
        for place, (request, token) in enumerate(zip(flight.requests, flight.read(), strict=True)):
            if request.finish_reason is not None or request in flight.dropped:
                continue
            if request.pending:
                request.tokens.pop()
                request.pending = 0
            chosen = None if token == NOTHING else TokenLogprob(token, math.nan)
            if token == UNSETTLED:
                late.add(request)
                chosen = self._sample([request], flight.logits_RV[place : place + 1])[0][0]
            self._take(request, chosen)
        return late

    def _draw(self, plan: list[Work[Request]], logits_RV: Tensor, late: set[Request]) -> None:
        """Draw the next tokens of a step's requests, but for those that are over or `late`, and deliver them."""
        counts = [_rows(work) for work in plan]
        alive = [
            (work, count, end) for work, count, end in zip(plan, counts, np.cumsum(counts).tolist(), strict=True)
            if work.sequence.finish_reason is None and work.sequence not in late
        ]  # fmt: skip
        drawing = [(work.sequence, end - 1 - work.drafted, end) for work, _, end in alive if work.is_last]
        places = [place for _, first, end in drawing for place in range(first, end)]
        last_RV = logits_RV if len(places) == len(logits_RV) else logits_RV[places]
        requests = [request for request, _, _ in drawing]
        chosen = dict(zip(requests, self._sample(requests, last_RV), strict=True))
        for work, rows, end in alive:
            if rows:
                self._accept(work, logits_RV[end - rows : end], chosen.get(work.sequence))

    def _batch(self, plan: list[Work[Request]]) -> Batch:
        """The step's tensors."""
        starts, counts = [work.start for work in plan], [work.count for work in plan]
        rows, end = [], 0
        for work in plan:
            end += work.count
            rows.append(np.arange(end - _rows(work), end, dtype=np.int64))
        batch = make_batch(
            (work.sequence.tokens[work.start : work.start + work.count] + work.sequence.draft[: work.drafted]
             for work in plan), starts, counts,
            [np.frombuffer(work.sequence.table, dtype=np.int32) for work in plan], np.concatenate(rows),
            self.pool.block_size, self.device,
            [work.sequence.adapter.slot if work.sequence.adapter else None for work in plan],
        )  # fmt: skip
        unread = [(work.sequence, end - 1) for work, end in zip(plan, np.cumsum(counts), strict=True)
                  if work.is_last and work.sequence.pending]  # fmt: skip
        if unread:
            assert self.flight is not None
            self.flight.feed(batch.tokens_T, *zip(*unread, strict=True))
        return batch

    def _sample(self, requests: list[Request], logits_RV: Tensor) -> list[list[TokenLogprob | None]]:
        """The next tokens of each request; None among them for those whose own fault it is that there is none."""
        try:
            return verify(requests, logits_RV)
        except Exception:
            if len(requests) > 1:
                rows = logits_RV.split([len(request.draft) + 1 for request in requests])
                return [self._sample([each], mine)[0] for each, mine in zip(requests, rows, strict=True)]
            log.exception("a token could not be drawn")
            return [[None]]

    def _accept(self, work: Work[Request], logits_RV: Tensor, chosen: list[TokenLogprob | None] | None) -> None:
        """Take a request's rows of logits and its next tokens; what goes wrong fails this request and no other."""
        request, drafted = work.sequence, work.drafted
        if drafted and chosen and self.speculator is not None:
            self.speculator.learn(request, drafted, len(chosen) - 1)
        try:
            if request.prompt_logprobs is not None and request.scored < request.prompt_length:
                first, last = max(work.start, request.scored), min(work.start + work.count, request.prompt_length - 1)
                rows_NV = logits_RV[first - work.start : last - work.start]
                ids = request.tokens[first + 1 : last + 1]
                request.prompt_logprobs += token_logprobs(rows_NV, ids, request.params.prompt_logprobs or 0)
                request.scored = work.start + work.count
        except Exception as error:
            log.exception("a request failed")
            self._finish(request, "error", f"{type(error).__name__} in the engine")
            return
        for token in chosen or ():
            self._take(request, token)
            if request.finish_reason is not None:
                return
        if drafted and chosen:
            with self.changed:
                self.scheduler.confirm(request, len(chosen) - 1)

    def _take(self, request: Request, chosen: TokenLogprob | None) -> None:
        """Append a request's next token and deliver it."""
        try:
            if chosen is None:
                raise FloatingPointError("the logits are not numbers, or leave no token to choose")
            event = request.accept(chosen)
        except Exception as error:
            log.exception("a request failed")
            self._finish(request, "error", f"{type(error).__name__} in the engine")
            return
        if event.finish_reason is not None:
            self._remove(request)
        self._send(request, event)

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        self._remove(request)
        self._send(request, request.end(reason, error))

    def _remove(self, request: Request) -> None:
        with self.changed:
            self.scheduler.remove(request)
        self.adapters.release(request.adapter)

    def _send(self, request: Request, event: TokenEvent) -> None:
        """Deliver an event; a listener that fails is cut off and takes nobody with it."""
        try:
            request.deliver(event)
        except Exception:
            log.exception("an event could not be delivered")
            request.cancel()


def _rows(work: Work[Request]) -> int:
    """Rows of logits that a share of a step needs: the last, if it catches up, and those of its draft; all of a prompt
    that is scored."""
    request = work.sequence
    if request.needs_prompt_logits and work.start < request.prompt_length and request.scored < request.prompt_length:
        return work.count
    return work.drafted + 1 if work.is_last else 0


def _slot(work: Work[Request]) -> int:
    """Where a share of a step goes: those without an adapter first, then by adapter."""
    return -1 if work.sequence.adapter is None else work.sequence.adapter.slot
