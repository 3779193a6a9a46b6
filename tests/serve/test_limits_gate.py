"""What a limit says to clients, what it counts, and how a call settles; and the same through a real service."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_tools import LONG, call, metric
from limit_oracle import Oracle

from soma.base.errors import UserError
from soma.serve.calls import Call, Caller, Usage
from soma.serve.errors import ApiError, respond
from soma.serve.limits.config import LimitsConfig, Rule, read_limits
from soma.serve.limits.gate import LimitsGate, LimitsHold, span
from soma.serve.running import running_service


class Clock:
    now = 1_790_000_000_000

    def __call__(self) -> int:
        return self.now


def gate_of(*rules: dict[str, Any]) -> tuple[LimitsGate, Clock]:
    clock = Clock()
    return LimitsGate(LimitsConfig.model_validate({"rules": list(rules)}), clock), clock


def call_of(key: str | None = "a", **more: Any) -> Call:
    caller = None if key is None else Caller(key, team=f"team-{key}")
    return Call(**{"route": "/v1/completions", "model": "m", "address": "203.0.113.9", "caller": caller, **more})


def enter(gate: LimitsGate, call: Call) -> LimitsHold | None:
    return asyncio.run(gate.enter(call))


def refused(gate: LimitsGate, call: Call) -> ApiError:
    with pytest.raises(ApiError) as caught:
        enter(gate, call)
    return caught.value


MINUTE = {"name": "rpm", "limit": 2, "window": "1m", "algorithm": "fixed_window", "per": ["key"]}


def test_what_the_client_is_told() -> None:
    gate, clock = gate_of(MINUTE, {"name": "tpm", "limit": 100, "window": "1m", "unit": "tokens"})
    clock.now = 1_790_000_000_000 // 60_000 * 60_000 + 20_500
    hold = enter(gate, call_of(prompt_tokens=10, max_tokens=20))
    assert hold is not None
    assert hold.headers == {
        "x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "39.5s",
        "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "70", "x-ratelimit-reset-tokens": "18s",
    }  # fmt: skip
    enter(gate, call_of())
    error = refused(gate, call_of())
    response = respond(error)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "40"  # rounded up: 39 would be refused again
    assert response.headers["retry-after-ms"] == "39500"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert "`rpm`" in error.message
    assert "2 requests in 1m0s for each key; try again in 39.5s" in error.message
    clock.now += 39_499
    refused(gate, call_of())
    clock.now += 1
    assert enter(gate, call_of()) is not None
    assert gate.refused.labels("rpm")._value.get() == 2


def test_retry_after_is_the_first_moment() -> None:
    """For each algorithm, at both sides of it."""
    for algorithm in ("fixed_window", "sliding_window_log", "sliding_window_counter", "token_bucket"):
        gate, clock = gate_of({"name": "r", "limit": 3, "window": "7s", "algorithm": algorithm})
        for _ in range(3):
            enter(gate, call_of())
            clock.now += 311
        wait = int(refused(gate, call_of()).headers["retry-after-ms"])
        clock.now += wait - 1
        refused(gate, call_of())
        clock.now += 1
        assert enter(gate, call_of()) is not None


def test_too_large_to_ever_pass() -> None:
    gate, _ = gate_of({"name": "tpm", "limit": 100, "unit": "tokens"})
    error = refused(gate, call_of(prompt_tokens=90, max_tokens=11))
    assert error.retry_after is None
    assert error.headers["x-should-retry"] == "false"  # the openai client obeys it
    assert "101 tokens" in error.message


@pytest.mark.parametrize(
    ("per", "same", "other"),
    [
        ("key", {}, {"key": "b"}), ("team", {"caller": Caller("b", team="team-a")}, {"key": "b"}),
        ("address", {}, {"address": "203.0.113.10"}), ("model", {}, {"model": "n"}),
        ("route", {}, {"route": "/v1/embeddings"}),
        ("address", {"address": "2001:db8::1"}, {"address": "2001:db8:0:1::1"}),
    ],
)  # fmt: skip
def test_whose_count(per: str, same: dict[str, Any], other: dict[str, Any]) -> None:
    gate, _ = gate_of({"name": "r", "limit": 1, "per": [per]})
    first = {"address": "2001:db8::ffff"} if "2001:db8::1" in same.values() else {}
    enter(gate, call_of(**first))
    refused(gate, call_of(**same))
    assert enter(gate, call_of(**other)) is not None


def test_over_everything_and_only_some() -> None:
    gate, _ = gate_of({"name": "all", "limit": 2}, {"name": "small", "limit": 1, "only": {"model": ["m"]}})
    enter(gate, call_of())
    assert "`small`" in refused(gate, call_of("b")).message
    enter(gate, call_of("b", model="n"))
    assert "`all`" in refused(gate, call_of("c", model="n")).message


def test_all_or_nothing() -> None:
    """What one rule refuses costs nothing in the others."""
    gate, _ = gate_of({"name": "wide", "limit": 10}, {"name": "narrow", "limit": 1, "per": ["key"]})
    for _ in range(5):
        with suppress(ApiError):
            enter(gate, call_of())
    other = enter(gate, call_of("b"))
    assert other is not None
    assert gate.memory.counts[next(key for key in gate.memory.counts if key.startswith("wide"))].state()[0] == 8


@pytest.mark.parametrize(
    ("usage", "tokens", "requests"),
    [(Usage(10, 5), 15, 1), (Usage(10, 90), 100, 1), (Usage(10, 3, outcome="abort"), 13, 1),
     (Usage(outcome="error"), 0, 1), (Usage(outcome="refused"), 0, 0), (Usage(10, 300), 310, 1)],
)  # fmt: skip
def test_settled_on_what_was_used(usage: Usage, tokens: int, requests: int) -> None:
    gate, _ = gate_of(
        {"name": "tpm", "limit": 1000, "unit": "tokens", "algorithm": "sliding_window_log"},
        {"name": "rpm", "limit": 1000, "algorithm": "fixed_window"},
        {"name": "n", "limit": 1, "algorithm": "concurrency"},
    )  # fmt: skip

    async def run() -> LimitsHold | None:
        hold = await gate.enter(call_of(prompt_tokens=10, max_tokens=90))
        assert hold is not None
        assert hold.headers["x-ratelimit-remaining-tokens"] == "900"
        with pytest.raises(ApiError, match="1 calls at once"):
            await gate.enter(call_of())
        await hold.leave(usage)
        return await gate.enter(call_of())

    hold = asyncio.run(run())
    assert hold is not None
    assert hold.headers["x-ratelimit-remaining-tokens"] == str(1000 - tokens)
    assert hold.headers["x-ratelimit-remaining-requests"] == str(1000 - requests - 1)


def test_the_queue_of_a_leaky_bucket() -> None:
    """Calls leave it at its rate; one that gives up while it waits was never there."""
    gate, _ = gate_of({"name": "r", "limit": 20, "window": "1s", "burst": 3, "algorithm": "leaky_bucket"})

    async def run() -> None:
        loop = asyncio.get_running_loop()
        begun, ends = loop.time(), []

        async def one() -> None:
            await gate.enter(call_of())
            ends.append(loop.time() - begun)

        tasks = [asyncio.create_task(one()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await gate.enter(call_of())
        assert caught.value.headers["retry-after-ms"] == "50"
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert len(ends) == 2
        assert ends[1] >= 0.05
        count = next(iter(gate.memory.counts.values()))
        assert count.state()[0] == 1

    asyncio.run(run())


def test_a_reload_goes_on_counting() -> None:
    gate, _ = gate_of(MINUTE)
    enter(gate, call_of())
    asyncio.run(gate.replace(LimitsConfig.model_validate({"rules": [{**MINUTE, "limit": 4}]})))
    hold = enter(gate, call_of())
    assert hold is not None
    assert hold.headers["x-ratelimit-remaining-requests"] == "2"
    asyncio.run(gate.replace(LimitsConfig()))
    assert enter(gate, call_of()) is None


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0ms"), (20, "20ms"), (1500, "1.5s"), (360_000, "6m0s"), (86_400_000, "24h0m0s"), (61_001, "1m1.001s")],
)  # fmt: skip
def test_spans(ms: int, text: str) -> None:
    assert span(ms) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: [{name: r, limit: 0}]", "rules.0.limit: Input should be greater"),
        ("rules: [{name: r, limit: 1, window: soon}]", "rules.0.window: 'soon' is no span of time"),
        ("rules: [{name: r, limit: 1, algorithm: fixed_window, burst: 2}]", "burst: fixed_window has none"),
        ("rules: [{name: r, limit: 1, algorithm: concurrency, unit: tokens}]", "concurrency counts calls"),
        ("rules: [{name: r, limit: 1}, {name: r, limit: 2}]", "two are named 'r'"),
        ("rules: [{name: r, limit: 10000000001, window: 30d}]", "must stay below"),
        ("limits: {rulez: []}", "rulez: Extra inputs"),
        ("[1]", "expected keys and values"),
        ("{", "limits.yaml"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_limits(file)
    assert words in str(caught.value)
    assert "limits.yaml" in str(caught.value)


def test_a_service_with_limits(tiny_folder: Path, tmp_path: Path) -> None:
    """Headers on answers and streams, tokens given back when the client leaves, addresses behind the named proxy."""
    file = tmp_path / "limits.yaml"
    file.write_text(
        "limits:\n  rules:\n"
        "  - {name: per-address, limit: 2, window: 1d, algorithm: sliding_window_log, per: [address]}\n"
        "  - {name: tokens, limit: 5000, window: 1d, unit: tokens, algorithm: sliding_window_log}\n"
    )
    with running_service(tiny_folder, limits=str(file), trusted_proxies=["127.0.0.1"], in_process=True) as url:
        body = {**LONG, "max_tokens": 4, "prompt": [5, 6]}

        def ask(address: str, **changes: Any) -> httpx.Response:
            headers = {"X-Forwarded-For": f"10.9.9.9, {address}"}
            return httpx.post(url + "/v1/completions", json={**body, **changes}, headers=headers, trust_env=False)

        first = ask("198.51.100.1")
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-tokens"] == str(5000 - 6)
        assert ask("198.51.100.1", stream=True).headers["x-ratelimit-remaining-requests"] == "0"
        assert ask("198.51.100.1").status_code == 429
        assert ask("198.51.100.1", prompt=[10**6]).status_code == 400
        headers = {"X-Forwarded-For": "198.51.100.2"}
        with httpx.stream("POST", url + "/v1/completions", json={**body, "max_tokens": 3000, "stream": True},
                          headers=headers, trust_env=False, timeout=60) as answer:  # fmt: skip
            assert answer.headers["x-ratelimit-remaining-tokens"] == str(5000 - 12 - 3002)
            next(answer.iter_lines())
        for _ in range(200):
            left = int(ask(f"198.51.100.{100 + _ % 100}").headers["x-ratelimit-remaining-tokens"])
            if left > 2500:
                break
        assert left > 2500  # most of the 3,000 came back
        assert metric(url, "soma:limits_refused_total", rule="per-address") == 1
        assert call(url, "GET", "/health")[0] == 200


def test_the_oracle_has_no_rule_of_its_own() -> None:
    """A worked number: half of the window has passed, so half of the last window's four counts."""
    rule = Rule(name="r", limit=10, window="10s", unit="tokens", algorithm="sliding_window_counter")
    oracle = Oracle(rule)
    oracle.add(5_000, "a", 4)
    assert oracle.remaining(15_000) == 8
