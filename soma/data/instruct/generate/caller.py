"""Requests to an endpoint, side by side, each paid once: journal, retries, budget.

`calls.jsonl` gets a line when a request is sent and one when it is answered, each flushed to the disk. After a `kill
-9` the same command asks the same questions in the same order; what was answered is read from the journal and costs
nothing, what was in flight is asked again, and its first request still counts.

Before a request is sent its worst case (a token for every byte, and all of `max_tokens`) must fit what is left of the
budget beside the worst cases in flight; so a budget is never exceeded. Requests are admitted in their order, so that
the same ones are for any concurrency.
"""

import email.utils
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soma.base.artefact import json_hash
from soma.base.errors import UserError
from soma.base.secrets import redact_url
from soma.data.instruct.generate.settings import Settings

JOURNAL = "calls.jsonl"
TRIES = 6
PATIENCE = 300.0  # seconds for one answer
LONGEST_WAIT = 60.0
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)  # this question alone: too long, or filtered
OVERHEAD = 256  # tokens that a chat template may add


@dataclass(frozen=True)
class Question:
    """One request. `place` tells it apart from the same words asked elsewhere (`round 3, task 2, input`)."""

    place: str
    prompt: str

    def key(self, settings: Settings) -> str:
        """The hash by which it is found in the journal: over all that the answer depends on."""
        return json_hash([settings.model, settings.temperature, settings.max_tokens, self.place, self.prompt])

    @property
    def hash(self) -> str:
        """Of the prompt alone, for the provenance."""
        return json_hash(self.prompt)[:16]


@dataclass(frozen=True)
class Answer:
    """What the model said; None where the endpoint refused the question."""

    text: str | None
    tokens_in: int
    tokens_out: int
    time: str
    host: str
    prompt_hash: str


@dataclass
class Spent:
    """Requests sent (retries and those lost in flight among them), answered, refused, and what they cost."""

    requests: int = 0
    answers: int = 0
    refused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


# Each request in flight, with its index and the worst case of its tokens in and out.
Running = dict[Future[Answer | None], tuple[int, int, int]]


class Caller:
    """Asks questions. `over`: the budget did not allow one; those asked after it in order were not asked either."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings = settings
        self.headers = {"Content-Type": "application/json", **_authorization(settings)}
        base = settings.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.url = f"{base}/v1/chat/completions"
        self.host = urlsplit(self.url).netloc.rpartition("@")[2]
        self.spent, self.over = Spent(), False
        self.answers: dict[str, Answer] = {}
        self.lock = threading.Lock()
        self.path = out / JOURNAL
        self._replay()
        self.file = open(self.path, "ab")  # noqa: SIM115

    def close(self) -> None:
        self.file.close()

    @property
    def cost(self) -> Decimal:
        return self.settings.budget.cost(self.spent.tokens_in, self.spent.tokens_out)

    def ask(self, questions: list[Question]) -> list[Answer | None]:
        """The answers, in order; None from the first that the budget did not allow on. Raises UserError where the
        endpoint cannot be reached, refuses the key, or answers in another form.
        """
        found: list[Answer | None] = [None] * len(questions)
        running: Running = {}
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for index, question in enumerate(questions):
                    known = self.answers.get(question.key(self.settings))
                    if known is not None:
                        found[index] = known
                        continue
                    worst = (len(question.prompt.encode()) + OVERHEAD, self.settings.max_tokens)
                    if self.over or not self._admitted(worst, running, found):
                        self.over = True
                        break
                    running[pool.submit(self._asked, question)] = (index, *worst)
                while running:
                    self._collect(running, found)
            except BaseException:
                for future in running:
                    future.cancel()
                raise
        first = next((index for index, answer in enumerate(found) if answer is None), len(found))
        return found[:first] + [None] * (len(found) - first)

    def _admitted(self, worst: tuple[int, int], running: Running, found: list[Answer | None]) -> bool:
        """Wait until another request may be sent; False where the budget does not allow it, with none in flight."""
        while len(running) >= self.settings.concurrency or not self._fits(worst, running):
            if not running:
                return False
            self._collect(running, found)
        return True

    def _collect(self, running: Running, found: list[Answer | None]) -> None:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            found[running.pop(future)[0]] = future.result()

    def _fits(self, worst: tuple[int, int], running: Running) -> bool:
        budget = self.settings.budget
        with self.lock:
            # A running request may be counted here and among the sent: then it is waited for, and counted once.
            tokens_in = self.spent.tokens_in + worst[0] + sum(cost[1] for cost in running.values())
            tokens_out = self.spent.tokens_out + worst[1] + sum(cost[2] for cost in running.values())
            requests = self.spent.requests + len(running) + 1
        return (
            (budget.requests is None or requests <= budget.requests)
            and (budget.tokens is None or tokens_in + tokens_out <= budget.tokens)
            and (budget.money is None or budget.cost(tokens_in, tokens_out) <= budget.money)
        )

    # --- One request ---

    def _asked(self, question: Question) -> Answer | None:
        """The answer of the endpoint, asked again where it was busy, up to `TRIES` times; None where no request is
        left.
        """
        settings = self.settings
        body = {
            "model": settings.model, "messages": [{"role": "user", "content": question.prompt}],
            "temperature": settings.temperature, "max_tokens": settings.max_tokens,
        }  # fmt: skip
        key = question.key(settings)
        said = ""
        for attempt in range(1, TRIES + 1):
            if not self._may_send(key):
                self.over = True
                return None
            request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                    return self._answered(question, key, json.loads(response.read()))
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read(300).decode(errors='replace')}"
                if error.code in REFUSED:
                    return self._refused(question, key, said)
                if error.code not in RETRIED:
                    raise self._failed(said) from None
                pause = retry_after(error.headers.get("Retry-After"), time.time())
            except (OSError, ValueError) as error:
                said, pause = str(error), None
            if attempt < TRIES:
                time.sleep(min(LONGEST_WAIT, 2.0**attempt / 8 if pause is None else pause))
        raise self._failed(f"{said} (asked {TRIES} times)")

    def _may_send(self, key: str) -> bool:
        """Note that a request is sent, if the budget has one left (tries after the first take what others were
        given).
        """
        limit = self.settings.budget.requests
        with self.lock:
            if limit is not None and self.spent.requests >= limit:
                return False
            self._write({"sent": key})
            return True

    def _answered(self, question: Question, key: str, value: Any) -> Answer:
        try:
            text = value["choices"][0]["message"]["content"] or ""
            usage = value.get("usage") or {}
            tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._failed(f"an answer of another form: {str(value)[:200]}") from None
        budget = self.settings.budget
        if None in tokens and (budget.tokens is not None or budget.money is not None):
            raise self._failed("answers without `usage`: tokens cannot be counted, use --budget-requests")
        return self._keep(question, key, {"text": text, "in": tokens[0] or 0, "out": tokens[1] or 0})

    def _refused(self, question: Question, key: str, said: str) -> Answer:
        return self._keep(question, key, {"text": None, "in": 0, "out": 0, "said": said})

    def _keep(self, question: Question, key: str, facts: dict[str, Any]) -> Answer:
        line = {"key": key, "prompt": question.hash, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._note(line | {"host": self.host} | facts)
        return self.answers[key]

    def _failed(self, said: str) -> UserError:
        return UserError(
            f"{redact_url(self.url)} (model {self.settings.model}): {said}; what was answered is kept, the same "
            "command goes on from there"
        )

    # --- The journal ---

    def _note(self, line: dict[str, Any]) -> None:
        with self.lock:
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        if "sent" in line:
            self.spent.requests += 1
            return
        self.spent.answers += line["text"] is not None
        self.spent.refused += line["text"] is None
        self.spent.tokens_in += line["in"]
        self.spent.tokens_out += line["out"]
        facts = (line[name] for name in ("text", "in", "out", "time", "host", "prompt"))
        self.answers[line["key"]] = Answer(*facts)

    def _replay(self) -> None:
        """Read the journal; a line that the end of the process cut off is taken out."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._count(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}, line {number}: not a line of a journal; was it edited?") from None


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _authorization(settings: Settings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(f"--api-key-env {settings.api_key_env}: this variable is not set")
    return {"Authorization": f"Bearer {key}"}
