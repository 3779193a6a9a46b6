"""Drafts from a smaller model of the same vocabulary.

It has a paged cache of its own with the target's block numbers: a block that holds some tokens' keys and values in the
target's cache holds the same tokens' in the draft's, so that tables, shared beginnings and preemption are the target's.
What stands in the draft's cache decides how well it guesses, never what is accepted: where blocks have left the
target's sliding window before the draft model came to them, it goes on without them.

Shapes: S requests, V vocabulary.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from soma.base.errors import UserError
from soma.engine.adjust import Row, SamplingState
from soma.engine.batch import make_batch
from soma.engine.goodput import StepCosts
from soma.engine.paged import PagedCache
from soma.engine.request import Request
from soma.engine.runner import Runner
from soma.engine.sampling import distribution, sample
from soma.engine.speculate import DRAFT_STREAM, rejects
from soma.model.folder import local_folder
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer

LAG = 32  # tokens that a round takes along; what lies further behind is computed before


@dataclass
class Progress:
    """How far the draft model is with one request."""

    computed: int = 0
    marked: int = 0  # blocks that are whole and that others may use
    preemptions: int = 0
    state: SamplingState | None = None  # for draws that are independent of the target's


class DraftModel:
    """A `Proposer` for `soma.engine.speculate`.

    vocab_size: the target's; the draft model may have more or fewer rows that stand for no token. step_tokens: of a
    step that catches up, at most.
    """

    def __init__(
        self, model: Transformer, vocab_size: int, num_blocks: int, block_size: int, step_tokens: int, *,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        self.cache = PagedCache(model.config, num_blocks, block_size, model.dtype, model.device)
        self.runner = Runner(model, self.cache, backend=backend)
        self.context, self.size, self.step_tokens = model.config.max_position_embeddings, block_size, step_tokens
        self.device, self.vocab_size = model.device, vocab_size
        self.costs = StepCosts()
        self.progress: WeakKeyDictionary[Request, Progress] = WeakKeyDictionary()
        self.holds: list[bytes | None] = [None] * num_blocks  # names of blocks that are whole in this cache

    def offer(self, request: Request, most: int) -> int:
        return max(0, min(most, self.context - request.wanted))

    def first(self, request: Request) -> int | None:
        return None

    def propose(self, lengths: dict[Request, int]) -> None:
        """Draft token by token, for all requests together."""
        self._catch_up(list(lengths))
        active = [request for request in lengths if request.wanted - self._at(request).computed <= LAG]
        given: dict[Request, list[Tensor]] = {request: [] for request in active}
        for depth in range(max(lengths.values())):
            active = [request for request in active if lengths[request] > depth]
            if not active:
                break
            began = time.perf_counter()
            self._draw(active, self._forward(active), given)
            self.costs.observe(len(active), time.perf_counter() - began)
            active = [request for request in active if len(request.draft) > depth]
        for request, parts in given.items():
            request.proposed = torch.cat(parts) if parts else None

    def _draw(self, active: Sequence[Request], logits_SV: Tensor, given: dict[Request, list[Tensor]]) -> None:
        """One more token of each draft, and the distributions of those for rejection sampling."""
        rows = [Row(self._state(request), tuple(request.draft)) for request in active]
        tokens = sample(logits_SV, rows)
        random = [i for i, request in enumerate(active) if rejects(request)]
        q_SV = distribution(logits_SV[random], [rows[i] for i in random]) if random else None
        for i, (request, token) in enumerate(zip(active, tokens, strict=True)):
            if token is None:
                continue
            request.draft.append(token.id)
            if q_SV is not None and i in random:
                given[request].append(q_SV[random.index(i)][None])

    def _state(self, request: Request) -> SamplingState:
        """The request's sampling; where drafts are for rejection sampling, with random numbers of their own."""
        if not rejects(request):
            return request.sampling
        progress = self._at(request)
        if progress.state is None:
            progress.state = copy.copy(request.sampling)  # what was made stays common to both
            progress.state.seed += DRAFT_STREAM
        return progress.state

    # The cache:

    def _at(self, request: Request) -> Progress:
        """How far a request is; blocks that hold its next tokens already are skipped, as are those that left the
        target's window."""
        progress = self.progress.setdefault(request, Progress())
        if progress.preemptions != request.preemptions:
            progress.computed, progress.marked, progress.preemptions = 0, 0, request.preemptions
        progress.marked = max(progress.marked, request.first_block)
        progress.computed = max(progress.computed, request.first_block * self.size)
        while progress.computed % self.size == 0 and progress.computed + self.size <= request.computed:
            block = progress.computed // self.size
            if block >= request.published or self.holds[request.table[block]] != request.names[block]:
                break
            progress.computed += self.size
            progress.marked = block + 1
        return progress

    def _catch_up(self, requests: Sequence[Request]) -> None:
        """Compute what lies far behind, as far as one step goes; the rest waits for the next time."""
        budget, shares = self.step_tokens, []
        for request in requests:
            progress = self._at(request)
            count = min(request.computed - progress.computed, budget)
            if request.wanted - progress.computed > LAG and count > 0:
                shares.append((request, request.tokens[progress.computed : progress.computed + count]))
                budget -= count
        if shares:
            self._run(shares)

    def _forward(self, active: Sequence[Request]) -> Tensor:
        """The logits (S, V) behind each request's text and draft."""
        return self._run([(request, (request.tokens + request.draft)[self._at(request).computed :])
                          for request in active])  # fmt: skip

    def _run(self, shares: Sequence[tuple[Request, list[int]]]) -> Tensor:
        """Append tokens to the cache; the logits behind the last of each share."""
        starts, counts = [self.progress[request].computed for request, _ in shares], [len(ids) for _, ids in shares]
        for (request, ids), start in zip(shares, starts, strict=True):
            for block in range(start // self.size, (start + len(ids) - 1) // self.size + 1):
                self.holds[request.table[block]] = None
        batch = make_batch(
            (ids for _, ids in shares), starts, counts, [np.frombuffer(request.table, dtype=np.int32)
            for request, _ in shares], np.cumsum(counts) - 1, self.size, self.device,
        )  # fmt: skip
        logits_SV = self.runner.step(batch)
        for (request, _), start, count in zip(shares, starts, counts, strict=True):
            progress = self.progress[request]
            progress.computed = start + count
            for block in range(progress.marked, min(progress.computed // self.size, request.published)):
                self.holds[request.table[block]] = request.names[block]
                progress.marked = block + 1
        missing = self.vocab_size - logits_SV.size(1)  # rows that no token of the tokenizer needs
        return F.pad(logits_SV, (0, missing), value=-torch.inf) if missing > 0 else logits_SV[:, : self.vocab_size]

    def settle(self, request: Request, accepted: int) -> None:
        """What of the last draft was not accepted is not in the text."""
        progress = self.progress[request]
        progress.computed = min(progress.computed, request.wanted + accepted)


def load_draft(ref: str | Path, target: Transformer, tokenizer: Any) -> Transformer:
    """The draft model of a folder or reference, in the target's dtype and on its device.

    Raises UserError if it does not have the target's vocabulary.
    """
    directory = local_folder(ref)
    mine = Tokenizer.load(directory)
    if mine.inner.get_vocab() != tokenizer.inner.get_vocab():
        raise UserError(f"draft model {ref}: it has another vocabulary than the model; drafts need the same tokenizer")
    return load_model(directory, target.dtype, target.device)
