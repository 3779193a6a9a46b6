"""Tokens that are drawn on the device and read one step late, so that planning and delivery overlap the step in flight.

Step n + 1 is planned as if every request goes on: the token that step n draws for it is a placeholder in its list, and
its id goes from step n's result into step n + 1's input without leaving the device. Only then is it read, and whether
it ends the request is seen; what step n + 1 computes for a request that has ended is dropped. So it is where the
`WIDTH` likeliest tokens do not settle what top-k or top-p keeps: the host then draws, and the request waits for step
n + 2. This is for requests whose next token depends on nothing but the logits; others are drawn before the next step
is planned.

Shapes: R requests that draw a token in a step, V vocabulary, T tokens of a step.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from soma.engine.adjust import Row
from soma.engine.batch import to_device
from soma.engine.params import SamplingParams
from soma.engine.request import Request
from soma.engine.sampling import WIDTHS, Settings, draw_filtered, draw_whole, kinds

PLACEHOLDER = 0
NOTHING = -1  # in place of a token where the logits hold a NaN or leave no token to choose
UNSETTLED = -2  # in place of a token that the host has to draw
WIDTH = WIDTHS[-1]


def can_overlap(params: SamplingParams) -> bool:
    """Whether tokens can be drawn from the logits alone, and nothing is asked but the token."""
    if params.logprobs is not None or params.prompt_logprobs is not None:
        return False
    return not (params.logit_bias or params.bad_words or params.uses_penalties or params.guided is not None)


def draw(logits_RV: Tensor, requests: Sequence[Request]) -> Tensor:
    """The next token of each request, int64 (R) on the device, as `sampling.sample` draws it, or NOTHING, or UNSETTLED.

    Reads nothing on the host. A request's place in its random numbers counts its placeholder.
    """
    best_R, tokens_R = logits_RV.max(-1)
    rows = [Row(request.sampling, (PLACEHOLDER,) * request.pending) for request in requests]
    for drawn, is_filtered in zip(kinds(rows), (False, True), strict=True):
        if not drawn:
            continue
        (places,) = to_device([np.array(drawn, dtype=np.int64)], logits_RV.device)
        x_FV = (logits_RV if len(drawn) == len(logits_RV) else logits_RV[places]).float()
        settings = Settings.of([rows[i] for i in drawn], logits_RV.device)
        if is_filtered:
            tokens_F, short_F = draw_filtered(x_FV, settings, WIDTH)
            tokens_F = torch.where(short_F, UNSETTLED, tokens_F)
        else:
            tokens_F = draw_whole(x_FV, settings)
        tokens_R = tokens_R.index_copy(0, places, tokens_F)
    return torch.where(best_R.isfinite(), tokens_R, NOTHING)


class Flight:
    """The tokens (R) of `requests` that a step has drawn from its logits (R, V), on their way to the host."""

    def __init__(self, requests: list[Request], tokens_R: Tensor, logits_RV: Tensor) -> None:
        self.requests, self.tokens_R, self.logits_RV = requests, tokens_R, logits_RV
        self.dropped: set[Request] = set()  # whose row is of no use: what the step read for them was not their token
        self.place = {request: place for place, request in enumerate(requests)}
        self.host_R = tokens_R
        self.arrived: torch.cuda.Event | None = None
        if tokens_R.is_cuda:
            self.host_R = torch.empty_like(tokens_R, device="cpu", pin_memory=True)
            self.host_R.copy_(tokens_R, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def feed(self, tokens_T: Tensor, requests: Sequence[Request], places: Sequence[int]) -> None:
        """Put the tokens of `requests` at their places among a step's tokens, which hold placeholders there."""
        sources = np.array([self.place[request] for request in requests], dtype=np.int64)
        sources_R, places_R = to_device([sources, np.array(places, dtype=np.int64)], tokens_T.device)
        tokens_T[places_R] = self.tokens_R[sources_R].clamp_(min=0)

    def read(self) -> list[int]:
        """The tokens, when they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host_R.tolist()
