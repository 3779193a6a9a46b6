"""Speculative decoding: a draft guesses the next tokens, one step of the model checks them all.

Two rules accept a draft, and both leave the model's distribution as it is.

* Coupling. Each place's token is drawn from the model's own distribution with that place's own random number, as it
  would be without a draft, and the draft is accepted as far as it guessed these tokens. So a request gets the very
  tokens that it gets without speculation, whatever was drafted and however long drafts were. Used for n-grams, for
  greedy requests, and for every request that names a seed. The draft model draws with the same random numbers, so
  that the two often agree (a common random number; compare Daliri et al. 2024, arXiv:2408.07978).
* Rejection sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), for a draft model
  and requests without a seed: a token x drawn from q is accepted with probability min(1, p(x)/q(x)), and in place of
  the first one that is not, a token is drawn from max(p - q, 0). No rule accepts more of a draft.

Shapes: R rows of logits, V vocabulary, N drafted tokens, K drafted tokens of one request.
"""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from soma.engine.adjust import Row
from soma.engine.goodput import Acceptance, StepCosts, draft_lengths
from soma.engine.ngram import NgramIndex
from soma.engine.params import TokenLogprob
from soma.engine.request import Request
from soma.engine.sampling import distribution, pick, sample, token_logprobs, uniforms
from soma.engine.scheduler import Scheduler, Work

log = logging.getLogger("soma.engine")

DRAFT_TOKENS = 8
PROBE = 64  # one step of so many goes without drafts, so that it is known what that takes
SMALL, LONGEST_REST = 8, 16  # requests; steps
# Added to a seed: independent random numbers for the same place.
DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = (1 << 60) + 1, (1 << 60) + 2, (1 << 60) + 3


class Proposer(Protocol):
    """Where drafts come from."""

    @property
    def costs(self) -> StepCosts | None:
        """Of a round that gives each request one more token, by their number; None if drafts are free."""
        ...

    def offer(self, request: Request, most: int) -> int:
        """How many tokens could be drafted for it now, at most `most`."""
        ...

    def propose(self, lengths: dict[Request, int]) -> None:
        """Set each request's `draft`, of this length or shorter, and `proposed` where rejection sampling is to be."""
        ...

    def first(self, request: Request) -> int | None:
        """The first token of what was offered, where it is known without work."""
        ...

    def settle(self, request: Request, accepted: int) -> None:
        """Of its draft so many tokens will be in its text."""
        ...


class NgramProposer:
    """Drafts from each request's own text."""

    costs: StepCosts | None = None

    def __init__(self) -> None:
        self.indexes: WeakKeyDictionary[Request, NgramIndex] = WeakKeyDictionary()
        self.offers: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def offer(self, request: Request, most: int) -> int:
        index = self.indexes.setdefault(request, NgramIndex())
        self.offers[request] = index.propose(request.tokens, most)
        return len(self.offers[request])

    def propose(self, lengths: dict[Request, int]) -> None:
        for request, length in lengths.items():
            request.draft = self.offers[request][:length]

    def first(self, request: Request) -> int | None:
        return next(iter(self.offers[request]), None)

    def settle(self, request: Request, accepted: int) -> None:
        pass


class Speculator:
    """Decides how much is drafted for whom, and keeps what that decision needs.

    most: tokens of a draft at most. Use, for each step: `plan` before the scheduler plans, `fill` after it,
    `verify` on the logits, `learn` for each draft that was checked, `observe` at the end.
    """

    def __init__(self, proposer: Proposer, most: int = DRAFT_TOKENS) -> None:
        self.proposer, self.most = proposer, most
        self.costs = StepCosts()
        self.acceptance: WeakKeyDictionary[Request, Acceptance] = WeakKeyDictionary()
        self.guesses: WeakKeyDictionary[Request, tuple[int, int]] = WeakKeyDictionary()  # not checked: place, token
        self.planned = 0
        self.rest = self.resting = 0  # steps without thinking about it, where a large batch drafts nothing
        self.num_draft_tokens = self.num_accepted_tokens = 0
        self.drafting = 0.0  # seconds of the step that went into drafts

    def plan(self, scheduler: Scheduler[Request]) -> None:
        """Set `num_draft` of the running requests."""
        self.planned += 1
        self.drafting = 0.0
        for request in scheduler.running:
            request.num_draft, request.draft, request.proposed = 0, [], None
        ready = [request for request in scheduler.running if may_speculate(request)]
        self.resting -= self.resting > 0
        if not ready or self.resting or self.planned % PROBE == 0:
            return
        most = [self.proposer.offer(request, self._room(request)) for request in ready]
        rates = [self._rate(request) for request in ready]
        waiting = scheduler.waiting if len(scheduler.running) < scheduler.max_running else []
        pending = sum(request.wanted - request.computed for request in (*scheduler.running, *waiting))
        base = min(pending, scheduler.step_tokens)
        lengths = draft_lengths(rates, most, base, scheduler.step_tokens - base, self.costs, self.proposer.costs)
        self.rest = min(2 * self.rest + 1, LONGEST_REST) if len(ready) > SMALL and not any(lengths) else 0
        self.resting = self.rest
        for request, length in zip(ready, lengths, strict=True):
            request.num_draft = length
            if length == 0:
                guess = self.proposer.first(request)
                if guess is not None:
                    self.guesses[request] = request.wanted, guess
                else:
                    self.acceptance[request].fade()

    def fill(self, plan: list[Work[Request]]) -> list[Work[Request]]:
        """The plan with its drafts in the requests, and shares as long as these."""
        lengths = {work.sequence: work.drafted for work in plan if work.drafted}
        if not lengths:
            return plan
        began = time.perf_counter()
        try:
            self.proposer.propose(lengths)
        except Exception:  # a draft is only a guess: without it the step is an ordinary one
            log.exception("drafting failed")
            for request in lengths:
                request.draft, request.proposed = [], None
        self.drafting = time.perf_counter() - began
        return [work._replace(count=work.count - work.drafted + len(work.sequence.draft))
                if work.drafted else work for work in plan]  # fmt: skip

    def learn(self, request: Request, drafted: int, accepted: int) -> None:
        """So much of a draft was right. To be called before these tokens are in the request's text."""
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        self.acceptance[request].learn(drafted, accepted)
        self.proposer.settle(request, accepted)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long, drafts included."""
        self.costs.observe(tokens, seconds - self.drafting)

    def _room(self, request: Request) -> int:
        """A step gives one token more than was drafted."""
        return min(self.most, request.max_tokens - request.generated - 1)

    def _rate(self, request: Request) -> float:
        acceptance = self.acceptance.setdefault(request, Acceptance())
        guess = self.guesses.pop(request, None)
        if guess is not None and request.wanted > guess[0]:
            acceptance.learn(1, int(request.tokens[guess[0]] == guess[1]))
        return acceptance.rate


def may_speculate(request: Request) -> bool:
    """Whether a request is about to make one more token."""
    return request.generated > 0 and request.wanted - request.computed == 1


def rejects(request: Request) -> bool:
    """Whether a draft model's tokens are for rejection sampling: without a seed nobody can expect the same tokens."""
    return request.params.temperature > 0 and request.params.seed is None


# Checking drafts:


def verify(requests: Sequence[Request], logits_RV: Tensor) -> list[list[TokenLogprob | None]]:
    """Each request's next tokens: as much of its draft as is accepted, and one more. None where there is none (NaN).

    logits_RV: for each request in turn the rows behind its last token and behind each token of its draft. A request
    with `proposed` (K, V), the distributions that its draft was drawn from, goes through rejection sampling.
    """
    if not any(request.draft for request in requests):
        return [[token] for token in sample(logits_RV, [Row(request.sampling) for request in requests])]
    rows: list[Row] = []
    starts: list[int] = []
    for request in requests:
        starts.append(len(rows))
        rows += [Row(request.sampling, tuple(request.draft[:i])) for i in range(len(request.draft) + 1)]
    ends = [start + len(request.draft) for start, request in zip(starts, requests, strict=True)]
    rejecting = {
        start: request for start, request in zip(starts, requests, strict=True) if request.proposed is not None
    }
    found = reject(rejecting, rows, logits_RV) if rejecting else {}
    wanted: list[int] = []  # rows to draw from
    for start, end in zip(starts, ends, strict=True):
        if start not in found:
            wanted += range(start, end + 1)
        elif found[start].whole:
            wanted.append(end)
    some_RV = logits_RV if len(wanted) == len(rows) else logits_RV[wanted]
    drawn = dict(zip(wanted, sample(some_RV, [rows[row] for row in wanted]), strict=True))
    result = []
    for start, end, request in zip(starts, ends, requests, strict=True):
        if start in found:
            result.append([*found[start].tokens, *([drawn[end]] if found[start].whole else [])])
        else:
            result.append(agreed(request.draft, [drawn[row] for row in range(start, end + 1)]))
    return result


def agreed(draft: Sequence[int], drawn: Sequence[TokenLogprob | None]) -> list[TokenLogprob | None]:
    """What was drawn, up to the first token that the draft did not guess."""
    for i, (guess, token) in enumerate(zip(draft, drawn, strict=False)):
        if token is None or token.id != guess:
            return list(drawn[: i + 1])
    return list(drawn)


class Judged(NamedTuple):
    """The accepted tokens of a draft; unless that is the whole draft, the token in place of the next one too."""

    tokens: list[TokenLogprob | None]
    whole: bool


def reject(requests: dict[int, Request], rows: Sequence[Row], logits_RV: Tensor) -> dict[int, Judged]:
    """Rejection sampling of drafts. requests: by their first row, as the results."""
    places = [row for start, request in requests.items() for row in range(start, start + len(request.draft))]
    drafted = [token for request in requests.values() for token in request.draft]
    p_NV = distribution(logits_RV[places], [rows[row] for row in places])
    q_NV = torch.cat([request.proposed for request in requests.values() if request.proposed is not None])
    ids_N1 = torch.tensor(drafted, device=p_NV.device)[:, None]
    p_N, q_N = torch.cat((p_NV.gather(1, ids_N1), q_NV.gather(1, ids_N1)), 1).double().cpu().numpy().T
    seeds, positions = [rows[row].state.seed for row in places], [rows[row].position for row in places]
    good_N = uniforms([seed + ACCEPT_STREAM for seed in seeds], positions) * q_N < p_N
    accepted: dict[int, int] = {}
    first = 0
    for start, request in requests.items():
        wrong = (~good_N[first : first + len(request.draft)]).nonzero()[0]
        accepted[start] = int(wrong[0]) if len(wrong) else len(request.draft)
        first += len(request.draft)
    number = {row: n for n, row in enumerate(places)}
    replaced = [start + accepted[start] for start, request in requests.items() if accepted[start] < len(request.draft)]
    at = [number[row] for row in replaced]
    draws = uniforms([seeds[n] + RESIDUAL_STREAM for n in at], [positions[n] for n in at])
    others = dict(zip(replaced, residual(p_NV[at], q_NV[at], torch.from_numpy(draws)), strict=True))
    result: dict[int, Judged] = {}
    for start, request in requests.items():
        tokens: list[int | None] = [*request.draft[: accepted[start]]]
        whole = len(tokens) == len(request.draft)
        if not whole:
            tokens.append(others[start + len(tokens)])
        result[start] = Judged(with_logprobs(request, tokens, logits_RV[start:]), whole)
    return result


def residual(p_NV: Tensor, q_NV: Tensor, uniform_N: Tensor) -> list[int | None]:
    """A token of each row's max(p - q, 0), normalised, at a quantile; None for rows with NaN."""
    if not len(p_NV):
        return []
    rest_NV = (p_NV.double() - q_NV.double()).clamp_(min=0)
    # Nothing is left only where p and q are the same but for rounding.
    cumulative_NV = torch.where((rest_NV.sum(-1, keepdim=True) > 0), rest_NV, p_NV.double()).cumsum(-1)
    tokens_N1 = pick(cumulative_NV, uniform_N.to(p_NV.device)[:, None] * cumulative_NV[:, -1:])
    good_N = cumulative_NV[:, -1].isfinite().tolist()
    return [token if good else None for token, good in zip(tokens_N1[:, 0].tolist(), good_N, strict=True)]


def with_logprobs(request: Request, tokens: Sequence[int | None], logits_KV: Tensor) -> list[TokenLogprob | None]:
    """The tokens, with log-probabilities under the model if the request asks for them."""
    known = [token for token in tokens if token is not None]
    if request.params.logprobs is None:
        found = [TokenLogprob(token, float("nan")) for token in known]
    else:
        found = token_logprobs(logits_KV[: len(known)], known, request.params.logprobs)
    return [*found, *[None] * (len(tokens) - len(known))]
