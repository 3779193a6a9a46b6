"""Engines that draft as much as they can, whatever it costs."""

import random
from typing import Any

from soma.engine import speculate
from soma.engine.draft import DraftModel
from soma.engine.engine import Engine
from soma.engine.request import Request
from soma.engine.speculate import NgramProposer, Speculator
from soma.model.transformer import Transformer


class Always(Speculator):
    def plan(self, scheduler: Any) -> None:
        self.planned = self.rest = self.resting = 0
        super().plan(scheduler)
        for request in scheduler.running:
            if speculate.may_speculate(request):
                request.num_draft = self.proposer.offer(request, self._room(request))


def draft_always(engine: Engine, draft: "str | Transformer | Guesses", most: int = 4) -> None:
    """draft: "ngram", a model with the engine's vocabulary, or guesses."""
    proposer: Any = NgramProposer() if draft == "ngram" else draft
    if isinstance(draft, Transformer):
        proposer = DraftModel(draft, engine.config.vocab_size, engine.pool.num_blocks, engine.pool.block_size, 512)
    engine.speculator = Always(proposer, most)


class Guesses:
    """A `Proposer` that knows the answers, and gets about every third token wrong."""

    costs = None

    def __init__(self, answers: dict[tuple[int, ...], list[int]], vocab_size: int, seed: int = 0) -> None:
        self.answers, self.vocab_size, self.draw = answers, vocab_size, random.Random(seed)

    def offer(self, request: Request, most: int) -> int:
        return max(0, min(most, len(self.answers[tuple(request.prompt_ids)]) - request.generated))

    def propose(self, lengths: dict[Request, int]) -> None:
        for request, length in lengths.items():
            right = self.answers[tuple(request.prompt_ids)][request.generated :][:length]
            wrong = [self.draw.random() < 0.3 for _ in right]
            request.draft = [
                self.draw.randrange(self.vocab_size) if bad else token for bad, token in zip(wrong, right, strict=True)
            ]

    def first(self, request: Request) -> int | None:
        return None

    def settle(self, request: Request, accepted: int) -> None:
        pass
