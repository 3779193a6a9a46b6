"""The two shapes of OpenAI's answers, whole and in chunks: chat completions and text completions."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from soma.engine.params import TokenLogprob
from soma.engine.request import Request, TokenEvent
from soma.serve.prompts import TokenNames


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, names: TokenNames, model: str, *, logprobs: bool) -> None:
        self.names, self.model, self.wants_logprobs = names, model, logprobs
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def envelope(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What every answer and chunk has around its choices."""
        head = {"id": self.id, "object": object_, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def start(self, index: int, request: Request) -> dict[str, Any] | None:
        """The first chunk of a choice, if it has one of its own."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk of an event; None if there is nothing to say."""
        logprobs = self.logprobs([event])
        if not event.text and not (logprobs and logprobs["content"]):
            return None
        return self._chunk(index, {"content": event.text}, logprobs, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk(index, {}, None, reason)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope(self.chunk_object, [choice])

    def choice(self, index: int, events: Sequence[TokenEvent], request: Request) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": "".join(event.text for event in events), "refusal": None}
        reason = events[-1].finish_reason
        return {"index": index, "message": message, "logprobs": self.logprobs(events), "finish_reason": reason}

    def logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """OpenAI's chat log-probabilities; end-of-text tokens have none."""
        if not self.wants_logprobs:
            return None
        content = [
            {**self._token(token, known.logprob), "top_logprobs": [self._token(*pair) for pair in known.top]}
            for token, known in event_rows(events)
            if known is not None
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.names.text_of(token), "logprob": finite(logprob), "bytes": list(self.names.bytes_of(token)),
        }  # fmt: skip


class CompletionFormat(ChatFormat):
    """text_completion, streamed or not."""

    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, names: TokenNames, model: str, *, logprobs: bool) -> None:
        super().__init__(names, model, logprobs=logprobs)
        self.echoed: dict[int, str] = {}
        self.offsets: dict[int, int] = {}  # of the next token in each choice's text

    def echo(self, index: int, text: str) -> None:
        """Put the prompt before choice `index`."""
        self.echoed[index] = text

    def start(self, index: int, request: Request) -> dict[str, Any] | None:
        if index not in self.echoed:
            return None
        return self._text(index, self.echoed[index], self._logprobs(index, prompt_rows(request)), None)

    def chunk(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        logprobs = self._logprobs(index, event_rows([event]))
        if not event.text and not (logprobs and logprobs["tokens"]):
            return None
        return self._text(index, event.text, logprobs, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._text(index, "", None, reason)

    def _text(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self.envelope(self.chunk_object, [choice])

    def choice(self, index: int, events: Sequence[TokenEvent], request: Request) -> dict[str, Any]:
        text = self.echoed.get(index, "") + "".join(event.text for event in events)
        rows = [*(prompt_rows(request) if index in self.echoed else []), *event_rows(events)]
        logprobs = self._logprobs(index, rows)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}

    def _logprobs(self, index: int, rows: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any] | None:
        """OpenAI's older log-probabilities: parallel lists, the first token of a text has none."""
        if not self.wants_logprobs:
            return None
        tokens, values, tops, offsets = [], [], [], []
        for token, known in rows:
            text = self.names.text_of(token)
            tokens.append(text)
            values.append(None if known is None else finite(known.logprob))
            tops.append(None if known is None else self._top(known))
            offsets.append(self.offsets.setdefault(index, 0))
            self.offsets[index] += len(text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, row: TokenLogprob) -> dict[str, float]:
        """Alternatives by their text; of two tokens with the same text the likelier counts."""
        top: dict[str, float] = {}
        for token, logprob in row.top:
            top.setdefault(self.names.text_of(token), finite(logprob))
        return top


def prompt_rows(request: Request) -> list[tuple[int, TokenLogprob | None]]:
    """A prompt's tokens with their log-probabilities, which the engine has once it made the first token."""
    known = request.prompt_logprobs or [None] * len(request.prompt_ids)
    return list(zip(request.prompt_ids, known, strict=True))


def event_rows(events: Sequence[TokenEvent]) -> list[tuple[int, TokenLogprob]]:
    """The tokens made, without those that end a text."""
    return [
        (event.id, TokenLogprob(event.id, event.logprob, event.top_logprobs))
        for event in events
        if event.id is not None and not event.is_end
    ]


def finite(logprob: float) -> float:
    """JSON has no -Infinity: a token of probability 0 gets OpenAI's -9999."""
    return logprob if math.isfinite(logprob) else -9999.0
