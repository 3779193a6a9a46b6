"""The figures of an engine and the times of requests, as Prometheus reads them."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from soma.serve.metrics import Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}


def request(**changes: Any) -> Any:
    times = {"arrived": 100.0, "scheduled": 100.5, "first_token": 102.0, "ended": 110.0, "finish_reason": "stop",
             "replica": 0}  # fmt: skip
    return SimpleNamespace(**{**times, **changes})


def test_the_engine_is_asked_when_prometheus_asks() -> None:
    values = {"running": 3, "waiting": 2, "kv_cache_usage": 0.25, "prefix_cache_queries": 100,
              "prefix_cache_hits": 64, "preemptions": 1, "draft_tokens": 80, "accepted_tokens": 50}  # fmt: skip
    metrics = Metrics(SimpleNamespace(stats=lambda: values), "m")  # type: ignore[arg-type]
    names = {
        "running": "num_requests_running", "waiting": "num_requests_waiting", "kv_cache_usage": "kv_cache_usage_perc",
        "prefix_cache_queries": "prefix_cache_queries_total", "prefix_cache_hits": "prefix_cache_hits_total",
        "preemptions": "num_preemptions_total", "draft_tokens": "spec_decode_num_draft_tokens_total",
        "accepted_tokens": "spec_decode_num_accepted_tokens_total",
    }  # fmt: skip
    for _ in range(2):
        found = samples(metrics)
        assert {key: found[f"vllm:{name}"] for key, name in names.items()} == values
        values["prefix_cache_hits"] = 80


def test_where_the_time_of_a_request_went() -> None:
    metrics = Metrics(SimpleNamespace(stats=dict), "m")  # type: ignore[arg-type]
    metrics.observe_times([request(), request(finish_reason="abort"), request(scheduled=None)])
    found = samples(metrics)
    for name, seconds in (("queue", 0.5), ("prefill", 1.5), ("decode", 8.0)):
        assert found[f"vllm:request_{name}_time_seconds_count"] == 1
        assert found[f"vllm:request_{name}_time_seconds_sum"] == pytest.approx(seconds)


def test_several_engines_have_samples_of_their_own() -> None:
    def engine(running: int) -> Any:
        return SimpleNamespace(stats=lambda: {"running": running, "prefix_cache_hits": 10 * running})

    metrics = Metrics(SimpleNamespace(engines=[engine(1), engine(2)]), "m")
    metrics.observe_times([request(replica=1)])
    metrics[1].finished["stop"].inc()
    found = {
        (sample.name, sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.labels.get("finished_reason", "stop") == "stop"
    }
    assert [found["vllm:num_requests_running", each] for each in "01"] == [1, 2]
    assert [found["vllm:prefix_cache_hits_total", each] for each in "01"] == [10, 20]
    assert [found["vllm:request_queue_time_seconds_count", each] for each in "01"] == [0, 1]
    assert [found["vllm:request_success_total", each] for each in "01"] == [0, 1]
