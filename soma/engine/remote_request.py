"""A request of an engine process, as the front keeps it: ids come from there, the text is made here."""

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from soma.engine.params import SamplingParams
from soma.engine.request import Request, TokenEvent
from soma.engine.text import StopScanner
from soma.model.tokenizer import Tokenizer


class ProcessRequest(Request):
    """A request whose tokens are made in the engine process, and whose text is made here."""

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, max_tokens: int, tokenizer: Tokenizer,
        send_cancel: Callable[["ProcessRequest"], None], deliver: Callable[[TokenEvent], None] | None,
    ) -> None:  # fmt: skip
        self.prompt_ids, self.params, self.max_tokens = prompt_ids, params, max_tokens
        self.decoder, self.scanner = tokenizer.stream_decoder(), StopScanner(params.stop)
        self.events = queue.SimpleQueue()
        self.deliver = deliver or self.events.put
        self.send_cancel = send_cancel
        self.number = -1
        self.chosen: str | None = None  # its adapter
        self.options: dict[str, Any] = {}  # those of `submit_all`
        self.made: list[int] = []
        self.cancelled = False
        self.finish_reason: str | None = None
        self.prompt_logprobs = None
        self.arrived = time.monotonic()
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None

    def cancel(self) -> None:
        if not self.cancelled and self.finish_reason is None:
            self.cancelled = True
            self.send_cancel(self)

    def with_text(self, event: TokenEvent) -> TokenEvent:
        """The event with what became safe to show; a stop string ends the request here."""
        if event.id is not None:
            self.made.append(event.id)
            self.first_token = self.first_token or time.monotonic()
        text, reason = "", event.finish_reason
        if event.id is not None and not event.is_end:
            text = self.scanner.push(self.decoder.push(event.id))
            reason = "stop" if self.scanner.stopped else reason
        if reason in ("stop", "length", "abort"):
            text += self.scanner.push(self.decoder.flush()) + self.scanner.flush()
            reason = "stop" if self.scanner.stopped else reason
        if reason is not None:
            self.finish_reason, self.ended = reason, time.monotonic()
        return replace(event, text=text, finish_reason=reason) if text or reason else event
