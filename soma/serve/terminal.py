"""`soma chat`: a conversation in the terminal, on an engine in this process."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.errors import RequestError
from soma.engine.load import load_engine
from soma.engine.params import SamplingParams
from soma.engine.prompts import encode_prompt
from soma.engine.request import Request
from soma.model.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer"
# A model's text must not move the cursor or rename the window: control characters are shown as their pictures (␛).
CONTROL: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROL |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0))}


class Conversation:
    """Turns so far and how they become a prompt: by the chat template, or as plain text where there is none."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.turns: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation with `text` as the user's next words; of `text` alone for a base model."""
        if not self.tokenizer.has_chat_template:
            return encode_prompt(self.tokenizer, text)
        before = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.encode_chat([*before, *self.turns, {"role": "user", "content": text}], True)

    def shorten(self) -> bool:
        """Forget the oldest question and answer; False if there is none."""
        forgot = bool(self.turns)
        del self.turns[:2]
        return forgot

    def add(self, text: str, answer: str) -> None:
        """Remember a question and its answer."""
        if self.tokenizer.has_chat_template:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def chat(
    model_ref: str | Path, *, max_tokens: int = 512, temperature: float = 0.7, seed: int | None = None,
    system: str | None = None, precision: str = "auto", device: str = "auto", read: TextIO | None = None,
    write: TextIO | None = None, notes: TextIO | None = None,
) -> None:  # fmt: skip
    """Talk with a model until the input ends or `/exit`.

    Answers go to `write` (standard output), everything else to `notes` (standard error), so that a pipe gets answers
    alone. One line is one message. A model without a chat template continues each line as plain text.
    Raises UserError: no such model, impossible settings.
    """
    read, write, notes = read or sys.stdin, write or sys.stdout, notes or sys.stderr
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
    engine, tokenizer, name = load_engine(model_ref, precision=precision, device=device)
    try:
        conversation = Conversation(tokenizer, system)
        kind = "chat" if tokenizer.has_chat_template else "no chat template: it continues the text that you give it"
        _note(notes, f"{name} ({kind}). {HELP}.")
        for line in _lines(read, notes):
            if line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
                _note(notes, "The conversation is forgotten.")
            elif line in ("/help", "/?"):
                _note(notes, HELP)
            elif line.strip():
                _answer(engine, conversation, line, params, write, notes)
    except KeyboardInterrupt:  # neither while an answer is made nor while a line is typed
        if not read.isatty():
            raise
    finally:
        engine.close()


def _note(notes: TextIO, text: str) -> None:
    print(text, file=notes, flush=True)


def _lines(read: TextIO, notes: TextIO) -> Iterator[str]:
    """Lines of a pipe, or what a person types (with editing and history where readline is there)."""
    if not read.isatty():
        for line in read:
            yield line.rstrip("\n")
        return
    if read is sys.stdin:
        try:
            import readline  # noqa: F401  (input() uses it)
        except ImportError:
            _note(notes, "no readline: lines cannot be edited with the arrow keys")
    while True:
        try:
            yield input("> ") if read is sys.stdin else read.readline().rstrip("\n")
        except EOFError:
            print(file=notes)
            return
        except KeyboardInterrupt:
            _note(notes, "\n(/exit or Ctrl-D ends the conversation)")


def _answer(
    engine: Engine, conversation: Conversation, text: str, params: SamplingParams, write: TextIO, notes: TextIO
) -> None:
    """Stream one answer; remember it, stopped or not, unless it failed."""
    started = time.perf_counter()
    try:
        request = _submit(engine, conversation, text, params, notes)
    except UserError as error:
        _note(notes, f"error: {error}")
        return
    answer, tokens, first, reason = "", 0, 0.0, ""
    with _interrupts(request):
        for event in request:
            first = first or time.perf_counter()
            tokens += event.id is not None
            write.write(event.text.translate(CONTROL) if write.isatty() else event.text)
            write.flush()
            answer += event.text
            reason = event.finish_reason or ""
            if event.error:
                _note(notes, f"\nerror: {event.error}")
    write.write("\n")
    write.flush()
    seconds = time.perf_counter() - first
    rate = f"{(tokens - 1) / seconds:.1f} tokens/s, " if tokens > 1 and seconds > 0 else ""
    end = {"length": ", token limit reached", "abort": ", stopped"}.get(reason, "")
    _note(notes, f"[{rate}{tokens} tokens, first after {(first - started) * 1000:.0f} ms{end}]")
    if reason != "error":
        conversation.add(text, answer)


def _submit(engine: Engine, conversation: Conversation, text: str, params: SamplingParams, notes: TextIO) -> Request:
    """Submit the conversation; if it has outgrown the context, forget its oldest turns, then shorten the answer."""
    while True:
        prompt = conversation.prompt(text)
        try:
            return engine.submit(prompt, params)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            if conversation.shorten():
                _note(notes, "(the context is full: the oldest turns are forgotten)")
            elif error.param == "max_tokens":
                params = replace(params, max_tokens=engine.max_length - len(prompt))
            else:
                raise


@contextmanager
def _interrupts(request: Request) -> Iterator[None]:
    """Let Ctrl-C stop this request instead of the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: request.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
