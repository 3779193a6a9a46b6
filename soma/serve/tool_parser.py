"""The forms in which models write tool calls, and a parser that reads calls out of an answer as it comes.

Hermes, Qwen   <tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>, again and again
Mistral        [TOOL_CALLS] [{"name": "f", "arguments": {…}}, …]
Llama 3        {"name": "f", "parameters": {…}}; …, as the whole answer
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soma.engine.text import overlap

HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written. Reading: `mark`, `open`, objects with `separator` between them, `close`. Writing: `first`,
    objects with `between` between them, `last`; the arguments are under `key`. Without a mark calls are all there is.
    """

    mark: str
    open: str
    separator: str
    close: str
    first: str
    between: str
    last: str
    key: str = "arguments"
    id_length: int = 24


HERMES = ToolFormat("<tool_call>", "", "", "</tool_call>",
                    "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")  # fmt: skip
# Mistral's templates refuse other ids than nine letters and digits when a call comes back to them.
MISTRAL = ToolFormat("[TOOL_CALLS]", "[", ",", "]", "[TOOL_CALLS] [", ", ", "]", id_length=9)
LLAMA = ToolFormat("", "", ";", "", "", "; ", "", "parameters")


@dataclass(frozen=True)
class Delta:
    """What a piece of an answer adds: text, a call that begins, or more of a call's arguments."""

    content: str = ""
    index: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolParser:
    """Reads the calls out of one answer as it comes. What is no call by its form is text.

    Calls of functions that were not offered are text too: a client could do nothing with them. White space before a
    mark belongs to it.
    """

    def __init__(self, form: ToolFormat, names: set[str], marks: Mapping[int, str]) -> None:
        self.form, self.names, self.marks = form, names, marks
        self.calls = 0
        self.text = ""  # what is not settled yet
        self.skipped = ""  # since the mark: text again if no call follows
        self.sent: int | None = None  # up to where `text` went out as arguments of the open call
        self.ended = False
        self.found: list[Delta] = []
        self.state: Callable[[], bool] = self._before_mark if form.mark else self._open

    def push(self, piece: str, token: int | None = None) -> list[Delta]:
        """Take more of the answer: a token, and the text that it made safe to show."""
        self.text += piece + self.marks.get(-1 if token is None else token, "")
        return self._settle()

    def end(self) -> list[Delta]:
        """The answer is over: what was held back."""
        self.ended = True
        return self._settle()

    def _settle(self) -> list[Delta]:
        while self.state():
            pass
        found, self.found = self.found, []
        return found

    # The states: each takes from `text` what it can, and says whether the next can go on at once.

    def _before_mark(self) -> bool:
        mark = self.form.mark
        place = self.text.find(mark)
        if place >= 0:
            self._say(self.text[:place].rstrip())
            self.text, self.skipped, self.state = self.text[place + len(mark) :], mark, self._open
            return True
        if self.ended:
            return self._plain()
        safe = len(self.text[: len(self.text) - overlap(self.text, mark)].rstrip())
        self._say(self.text[:safe])
        self.text = self.text[safe:]
        return False

    def _plain(self) -> bool:
        """No call can come any more."""
        self._say(self.text if self.calls == 0 else self.text.rstrip())
        self.text, self.state = "", self._plain
        return False

    def _open(self) -> bool:
        self._skip_space()
        if not self.text:
            return self._fail() if self.ended else False
        if not self.text.startswith(self.form.open):
            return self._fail()
        self.skipped += self.form.open
        self.text, self.state = self.text[len(self.form.open) :], self._object
        return True

    def _object(self) -> bool:
        """A call as an object: its name first, so that its arguments can go out as they come, or in any other order."""
        self._skip_space()
        if self.text[:1] not in ("", "{"):
            return self._fail()
        head, whole = HEAD.match(self.text), decode(self.text, 0)
        name = None if head is None else (decode(head[1], 0) or (None, 0))[0]
        if head is not None and name in self.names:
            if self.sent is None:
                self._begin(name)
                self.sent = head.end()
            arguments = decode(self.text, head.end())
            stop = len(self.text) if arguments is None else arguments[1]
            if stop > self.sent:
                self.found.append(Delta(index=self.calls - 1, arguments=self.text[self.sent : stop]))
                self.sent = stop
        elif whole is not None:
            name, given = call_of(whole[0])
            if name not in self.names or given is None:
                return self._fail()
            self._begin(name)
            self.found.append(Delta(index=self.calls - 1, arguments=json.dumps(given, ensure_ascii=False)))
        if whole is None:
            return self._fail() if self.ended else False
        self.text, self.sent, self.state = self.text[whole[1] :], None, self._after
        return True

    def _after(self) -> bool:
        """Behind a call: another one, the end of the calls, or text."""
        self._skip_space()
        for expected, state in ((self.form.separator, self._object), (self.form.close, self._before_mark)):
            if expected and self.text.startswith(expected):
                self.text, self.state = self.text[len(expected) :], state
                return True
        if self.form.close.startswith(self.text):
            if not self.ended:
                return False
            self.text = ""
        return self._fail()

    def _fail(self) -> bool:
        """What looked like a call is text, but for a call that broke off; later marks count again."""
        if self.sent is not None:
            self.text, self.sent = "", None
        self._say(self.skipped)
        self.skipped = ""
        self.state = self._before_mark if self.form.mark else self._plain
        return True

    def _skip_space(self) -> None:
        rest = self.text.lstrip()
        if self.skipped or not self.calls:
            self.skipped += self.text[: len(self.text) - len(rest)]
        self.text = rest

    def _say(self, text: str) -> None:
        if text:
            self.found.append(Delta(content=text))

    def _begin(self, name: str) -> None:
        letters = string.ascii_letters + string.digits
        id = "".join(secrets.choice(letters) for _ in range(self.form.id_length))
        self.found.append(Delta(index=self.calls, id=id if self.form.id_length == 9 else f"call_{id}", name=name))
        self.calls, self.skipped = self.calls + 1, ""


def call_of(value: Any) -> tuple[Any, dict[str, Any] | None]:
    """Name and arguments of an object that may be a call; its arguments may be an object or JSON text of one."""
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):
        given = (decode(given, 0) or (None, 0))[0]
    return value.get("name"), given if isinstance(given, dict) else None


def decode(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value at `start` and where it ends; None while it is not whole."""
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
