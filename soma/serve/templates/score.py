"""Testing prompts: every case against an OpenAI-compatible service, the scores beside the prompt, versions compared."""

import asyncio
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import comb, sqrt
from pathlib import Path
from typing import Any

import aiohttp

from soma.base.errors import UserError
from soma.serve.templates.config import Case, Expectation
from soma.serve.templates.library import SCORES, Library
from soma.serve.templates.template import Rendered, Template
from soma.serve.v2.callables import find

TIMEOUT = 300.0  # seconds for one answer
Z95 = 1.959964  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Score:
    """One case of one run; a line of scores.jsonl. `case`: what was asked and expected, to pair versions by."""

    run: str  # when it began, UTC
    prompt: str  # NAME@VERSION+HASH
    model: str
    url: str
    case: str
    score: float  # 0 to 1
    answer: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float


def score_of(expect: Expectation, answer: str, variables: dict[str, Any], folder: Path) -> float:
    """0 to 1. Raises UserError: the callable is not there, or gives no such number."""
    if expect.exact is not None:
        return float(answer.strip() == expect.exact.strip())
    if expect.contains is not None:
        wanted = [expect.contains] if isinstance(expect.contains, str) else expect.contains
        return float(all(each in answer for each in wanted))
    if expect.regex is not None:
        return float(re.search(expect.regex, answer) is not None)
    assert expect.call is not None
    made = find(expect.call, folder)(answer, variables)
    if not isinstance(made, bool | int | float) or not 0 <= made <= 1:
        raise UserError(f"{expect.call}: gave {made!r}; expected a bool or a number from 0 to 1")
    return float(made)


def case_id(case: Case) -> str:
    """The case as JSON, the same for every version."""
    value = {"variables": case.variables, "expect": case.expect.model_dump(exclude_none=True)}
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def run_tests(
    library: Library, reference: str, url: str, model: str, *, key: str | None = None, parallel: int = 4
) -> list[Score]:  # fmt: skip
    """Run the tests of a prompt against the service at `url` (up to and with /v1) and add the scores to scores.jsonl.

    Raises UserError: no such prompt, no tests, a case that the prompt cannot be filled with, a service that refuses.
    """
    template = library.get(reference)
    cases = library.tests(template.name).cases
    prompts = [template.render(case.variables, embed=library.embed, count=library.count) for case in cases]
    scores = asyncio.run(_ask_all(template, cases, prompts, url.rstrip("/"), model, key, parallel, library.folder))
    lines = "".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores)
    with open(library.folder / template.name / SCORES, "ab") as file:
        file.write(lines.encode())  # one write: two runs at once do not mix
        file.flush()
        os.fsync(file.fileno())
    return scores


async def _ask_all(
    template: Template, cases: Sequence[Case], prompts: Sequence[Rendered], url: str, model: str, key: str | None,
    parallel: int, folder: Path,
) -> list[Score]:  # fmt: skip
    run, slots = datetime.now(UTC).isoformat(timespec="milliseconds"), asyncio.Semaphore(parallel)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = aiohttp.ClientTimeout(total=TIMEOUT)

    async def one(session: aiohttp.ClientSession, case: Case, prompt: Rendered) -> Score:
        async with slots:
            begun = time.monotonic()
            answer, usage = await ask(session, url, model, prompt, template.file.parameters)
            seconds = time.monotonic() - begun
        given = template.variables(case.variables)
        score = await asyncio.to_thread(score_of, case.expect, answer, given, folder / template.name)
        return Score(run, prompt.label, model, url, case_id(case), score, answer, usage.get("prompt_tokens"),
                     usage.get("completion_tokens"), round(seconds, 4))  # fmt: skip

    async with aiohttp.ClientSession(headers=headers, timeout=limits) as session:
        tasks = [asyncio.create_task(one(session, case, made)) for case, made in zip(cases, prompts, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Rendered, parameters: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The answer to a prompt, and its usage. Raises UserError."""
    is_text = prompt.messages is None
    body = {"model": model, **parameters, **({"prompt": prompt.text} if is_text else {"messages": prompt.messages})}
    path = "/completions" if is_text else "/chat/completions"
    try:
        async with session.post(url + path, json=body, allow_redirects=False) as answer:
            said = await answer.json(content_type=None)
            if answer.status != 200:
                words = said.get("error", {}).get("message") if isinstance(said, dict) else None
                raise UserError(f"{url}: status {answer.status}: {words or 'no reason given'}")
            choice = said["choices"][0]
            return str((choice["text"] if is_text else choice["message"]["content"]) or ""), said.get("usage") or {}
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UserError(f"{url}: does not answer ({type(error).__name__})") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url}: its answer is not OpenAI's") from error


def scores(library: Library, name: str) -> list[Score]:
    """All lines of a prompt's scores.jsonl, oldest first. Raises UserError."""
    path = library.folder / name / SCORES
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Score(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: no line of scores: {error}") from None
    return found


@dataclass(frozen=True)
class Standing:
    """How a version did in its last run with a model. low, high: Wilson's 95 % interval of the mean score. better,
    worse: cases on which it scored above, below the version before it, on cases that both had; p: of the exact sign
    test over these (McNemar's), None for the first."""

    prompt: str
    model: str
    run: str
    cases: int
    mean: float
    low: float
    high: float
    prompt_tokens: float | None  # mean
    is_current: bool  # the file is what it was
    better: int = 0
    worse: int = 0
    p: float | None = None


def compare(library: Library, name: str, model: str | None = None) -> list[Standing]:
    """The last run of every version and model, by model and version. Raises UserError where there is none."""
    if name not in library.templates:
        library.get(name)
    last: dict[tuple[str, int, str], list[Score]] = {}
    for score in scores(library, name):
        if model is not None and score.model != model:
            continue
        version = int(score.prompt.partition("@")[2].partition("+")[0])
        rows = last.setdefault((score.model, version, score.prompt), [])
        if rows and rows[0].run != score.run:
            rows.clear()
        rows.append(score)
    if not last:
        raise UserError(f"{name}: no version was tested yet; see `soma prompt test`")
    standings: list[Standing] = []
    before: tuple[str, dict[str, float]] | None = None
    for (of_model, version, label), rows in sorted(last.items()):
        made = {row.case: row.score for row in rows}
        better = worse = 0
        p = None
        if before is not None and before[0] == of_model:
            pairs = [(made[case], before[1][case]) for case in made.keys() & before[1].keys()]
            better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            p = sign_test(better, worse)
        before = (of_model, made)
        template = library.templates[name].get(version)
        mean = sum(row.score for row in rows) / len(rows)
        known = [row.prompt_tokens for row in rows if row.prompt_tokens is not None]
        low, high = wilson(mean, len(rows))
        standings.append(
            Standing(label, of_model, rows[0].run, len(rows), mean, low, high,
                     sum(known) / len(known) if known else None, template is not None and template.label == label,
                     better, worse, p)
        )  # fmt: skip
    return standings


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's interval at 95 %. 8 of 10: 0.490 to 0.943 (Wilson 1927, Agresti & Coull 1998)."""
    middle = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of the exact sign test. 5 better, 0 worse: 0.0625."""
    n = better + worse
    tail = sum(comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)
