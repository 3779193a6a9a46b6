"""One call as the request log keeps it: what was asked, what was said, and when."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from soma.serve.calls import Call, Usage

MOST_BYTES = 4 << 20  # of text that one record holds; longer ones are not kept
PROMPT_VERSION = "prompt"  # the tag of a call that names its prompt template and version


class Record:
    """Filled by who answers the call: `asked` before, `said` for every piece. A row for each answer comes of it.

    `is_sampled`: kept anyway; others are kept if feedback comes for them.
    """

    def __init__(self, call: Call, *, is_sampled: bool) -> None:
        self.call, self.is_sampled = call, is_sampled
        self.time, self.begun, self.first, self.ended = time.time(), time.monotonic(), 0.0, 0.0
        self.messages: list[Any] | None = None
        self.prompts: list[str] = []
        self.per_prompt = 1  # answers to each prompt
        self.is_stream = False
        self.texts: dict[int, list[str]] = {}
        self.reasons: dict[int, str] = {}
        self.raw: list[bytes] = []
        self.size = 0
        self.usage = Usage()

    def asked(
        self, *, messages: list[Any] | None = None, prompts: Sequence[str] = (), n: int = 1, stream: bool = False
    ) -> None:  # fmt: skip
        """The conversation, or the prompts with `n` answers to each."""
        self.messages, self.prompts, self.per_prompt, self.is_stream = messages, list(prompts), n, stream
        self.size += sum(map(len, self.prompts)) + (len(json.dumps(messages)) if messages else 0)

    def said(self, index: int, text: str, reason: str | None = None) -> None:
        """A piece of an answer; `reason` with the last."""
        self.first = self.first or time.monotonic()
        if text and self.size < MOST_BYTES:
            self.texts.setdefault(index, []).append(text)
            self.size += len(text)
        if reason is not None:
            self.reasons[index] = reason

    def heard(self, data: bytes) -> None:
        """Bytes of an upstream's answer; they are looked at when the call is over, by the writer's thread."""
        self.first = self.first or time.monotonic()
        if self.size < MOST_BYTES:
            self.raw.append(data)
            self.size += len(data)

    def _listen(self) -> None:
        """Read what was heard: one JSON body, or server-sent events."""
        data, self.raw = b"".join(self.raw), []
        bodies = [line[5:] for line in data.split(b"\n") if line.startswith(b"data:")] if self.is_stream else [data]
        for body in bodies:
            with suppress(ValueError):  # [DONE], and what was cut off
                self._answered(json.loads(body))

    def _answered(self, value: Any) -> None:
        """The body of an answer to chat, completions or responses, or one event of a stream."""
        if not isinstance(value, Mapping):
            return
        choices = value.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping):
                found = choice.get("message") or choice.get("delta") or {}
                text = choice.get("text") or (found.get("content") if isinstance(found, Mapping) else "")
                index = choice.get("index")
                self._said(index if isinstance(index, int) else 0, text, choice.get("finish_reason"))
        if value.get("type") == "response.output_text.delta" and isinstance(value.get("delta"), str):
            self._said(0, value["delta"], None)
        if value.get("type") in ("response.completed", "response.incomplete"):
            self.reasons[0] = "stop" if value["type"] == "response.completed" else "length"
        for item in value["output"] if isinstance(value.get("output"), list) else ():
            for part in (item.get("content") or ()) if isinstance(item, Mapping) else ():
                if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                    self._said(0, part["text"], "stop")

    def _said(self, index: int, text: Any, reason: Any) -> None:
        if isinstance(text, str) and text:
            self.texts.setdefault(index, []).append(text)
        if isinstance(reason, str):
            self.reasons[index] = reason

    def end(self, usage: Usage) -> None:
        """The call is over."""
        self.ended, self.usage = time.monotonic(), usage

    @property
    def is_whole(self) -> bool:
        """Whether there is something to keep: a question that fits."""
        return bool(self.messages or self.prompts) and self.size < MOST_BYTES

    def rows(self) -> list[dict[str, Any]]:
        """A row for each answer, as `writer.REQUESTS` has them. Tokens and times are those of the request."""
        self._listen()
        call, usage = self.call, self.usage
        shared = {
            "request_id": call.id, "time": round(self.time * 1e6), "route": call.route, "model": call.model,
            "key_id": call.caller.key_id if call.caller else None, "team": call.caller.team if call.caller else None,
            "prompt_version": call.tags.get(PROMPT_VERSION), "tags": json.dumps(call.tags, sort_keys=True),
            "stream": self.is_stream, "outcome": usage.outcome, "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens, "cached_tokens": usage.cached_tokens,
            "first_token_ms": (self.first - self.begun) * 1e3 if self.first else None,
            "total_ms": (self.ended - self.begun) * 1e3,
        }  # fmt: skip
        messages = None if self.messages is None else json.dumps(self.messages, ensure_ascii=False)
        return [
            {
                **shared, "choice": choice, "messages": messages,
                "prompt": self.prompts[choice // self.per_prompt] if choice // self.per_prompt < len(self.prompts)
                else None,
                "completion": "".join(self.texts.get(choice, ())), "finish_reason": self.reasons.get(choice),
            }
            for choice in sorted(self.texts.keys() | self.reasons.keys()) or [0]
        ]  # fmt: skip


def asked_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a body of /v1/chat/completions, /v1/completions or /v1/responses asks, as `Record.asked` takes it. Prompts
    given as token ids have no text here."""
    n = value["n"] if isinstance(value.get("n"), int) else 1
    found: dict[str, Any] = {"n": n, "stream": value.get("stream") is True}
    if isinstance(value.get("messages"), list):
        return {**found, "messages": [as_text(message) for message in value["messages"]]}
    if "input" in value and isinstance(value["input"], str | list):
        given = value["input"]
        turns = [{"role": "user", "content": given}] if isinstance(given, str) else [as_text(each) for each in given]
        first = value.get("instructions")
        before = [{"role": "system", "content": first}] if isinstance(first, str) else []
        return {**found, "messages": before + turns}
    prompt = value.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
    return {**found, "prompts": [each for each in prompts if isinstance(each, str)]}


def as_text(message: Any) -> Any:
    """A message with the texts of its parts joined, where all parts are texts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    return {**message, "content": "".join(texts)} if all(isinstance(text, str) for text in texts) else message  # type: ignore[arg-type]
