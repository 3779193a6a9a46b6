"""Real requests, as a user's program would send them: through the openai client, streamed, with the clock running."""

import math
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

from soma.base.errors import UserError

PERCENTILES = (50, 90, 99)


def probe(
    base_url: str, prompts: Sequence[str], *, model: str | None = None, max_tokens: int = 96, temperature: float = 0.0,
    concurrency: int = 1, api_key: str = "none",
) -> dict[str, Any]:  # fmt: skip
    """Send one request per prompt, `concurrency` at once, and measure.

    Prompts are user messages where the model has a chat template and plain texts where not. Model None: the first that
    the service names. Returns what goes into JSON: `requests` (prompt, answer, finish_reason, error, ttft_seconds,
    itl_seconds (mean), e2e_seconds, prompt_tokens, completion_tokens, tokens_per_second) in the order of the prompts,
    and over those that succeeded `percentiles` of the times, output `tokens_per_second` of all together, counts.
    Raises UserError if the openai package is absent or the service cannot be reached.
    """
    try:
        import openai
    except ImportError:
        raise UserError("the probe uses the openai client: pip install 'somacube[quickstart]'") from None

    client = openai.OpenAI(base_url=base_url.rstrip("/") + "/v1", api_key=api_key, max_retries=2, timeout=600)
    try:
        entry = client.models.list().data[0] if model is None else client.models.retrieve(model)
    except openai.OpenAIError as error:
        raise UserError(f"{base_url}: the service does not name its models ({error})") from None
    is_chat = bool(getattr(entry, "chat_template", True))
    rows: list[dict[str, Any]] = [{} for _ in prompts]
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(prompts)):
        todo.put(place)

    def work() -> None:
        while True:
            try:
                place = todo.get_nowait()
            except queue.Empty:
                return
            rows[place] = _one(client, entry.id, prompts[place], is_chat, max_tokens, temperature)

    started = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(min(concurrency, len(prompts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    client.close()
    return {
        "model": entry.id, "chat": is_chat, "concurrency": concurrency, "max_tokens": max_tokens,
        "temperature": temperature, "seconds": seconds, "requests": rows, **summary(rows, seconds),
    }  # fmt: skip


def _one(client: Any, model: str, prompt: str, is_chat: bool, max_tokens: int, temperature: float) -> dict[str, Any]:
    """One streamed request; what went wrong stands in `error`."""
    import openai

    common: dict[str, Any] = {
        "model": model, "max_tokens": max_tokens, "temperature": temperature, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    row: dict[str, Any] = {"prompt": prompt, "answer": "", "finish_reason": None, "error": None}
    started = time.perf_counter()
    first = last = math.nan
    usage = None
    try:
        if is_chat:
            chunks = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **common)
        else:
            chunks = client.completions.create(prompt=prompt, **common)
        for chunk in chunks:
            usage = chunk.usage or usage
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            text = (choice.delta.content if is_chat else choice.text) or ""
            if text:
                last = time.perf_counter()
                first = last if math.isnan(first) else first
            row["answer"] += text
            row["finish_reason"] = choice.finish_reason or row["finish_reason"]
    except openai.OpenAIError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    made = usage.completion_tokens if usage else 0
    between = (last - first) / (made - 1) if made > 1 else math.nan
    row |= {
        "ttft_seconds": _number(first - started), "itl_seconds": _number(between), "e2e_seconds": seconds,
        "prompt_tokens": usage.prompt_tokens if usage else 0, "completion_tokens": made,
        "tokens_per_second": made / seconds,
    }  # fmt: skip
    return row


def _number(value: float) -> float | None:
    """JSON has no NaN: what was not measured is null."""
    return None if math.isnan(value) else value


def summary(rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Percentiles over the requests that succeeded, and throughput of all of them together."""
    good = [row for row in rows if row["error"] is None]
    percentiles = {}
    for name in ("ttft_seconds", "itl_seconds", "e2e_seconds"):
        values = sorted(row[name] for row in good if row[name] is not None)
        if values:
            percentiles[name] = {f"p{share}": percentile(values, share) for share in PERCENTILES}
            percentiles[name]["mean"] = statistics.fmean(values)
    made = sum(row["completion_tokens"] for row in good)
    return {
        "percentiles": percentiles, "succeeded": len(good), "failed": len(rows) - len(good),
        "completion_tokens": made, "tokens_per_second": made / seconds if seconds else 0.0,
    }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """Percentile of sorted values by linear interpolation, as numpy's default: 90 % of [1, 2, 3, 4] is 3.7."""
    place = (len(values) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
