"""What Prometheus reads from the service, under the names that vLLM's dashboards know."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from soma.base import metrics as names
from soma.engine.process import EngineProcess
from soma.engine.request import Request
from soma.engine.stats import stats_of

if TYPE_CHECKING:
    from soma.engine.engine import Engine

# name, what it says, key in the engine's figures
GAUGES = (
    (names.RUNNING, "Requests in the engine's running set.", "running"),
    (names.WAITING, "Requests that wait for a place.", "waiting"),
    (names.KV_CACHE_USAGE, "Share of the key/value cache in use, 0 to 1.", "kv_cache_usage"),
)
COUNTERS = (
    (names.PREFIX_CACHE_QUERIES, "Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
    (names.PREFIX_CACHE_HITS, "Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
    (names.PREEMPTIONS, "Requests put back into the queue because the cache was full.", "preemptions"),
)
TIMES = ("arrived", "scheduled", "first_token", "ended")  # of a request, on the monotonic clock


class EngineCollector(Collector):
    """The engine's own figures, asked for when Prometheus asks."""

    def __init__(self, engine: "Engine | EngineProcess", model_name: str) -> None:
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterator[Metric]:
        values = self.engine.stats() if isinstance(self.engine, EngineProcess) else stats_of(self.engine)
        for name, text, key in GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=[names.MODEL_NAME])
            gauge.add_metric([self.model_name], values[key])
            yield gauge
        for name, text, key in COUNTERS:
            counter = CounterMetricFamily(name, text, labels=[names.MODEL_NAME])
            counter.add_metric([self.model_name], values[key])
            yield counter


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self, engine: "Engine | EngineProcess", model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        label = [names.MODEL_NAME]

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, label, registry=self.registry, buckets=buckets).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, label, registry=self.registry).labels(model_name)

        self.time_to_first_token = histogram(
            names.TIME_TO_FIRST_TOKEN, "Seconds from a request's arrival to its first token.", names.TTFT_BUCKETS
        )
        self.inter_token_latency = histogram(
            names.INTER_TOKEN_LATENCY, "Seconds between a request's tokens.", names.INTER_TOKEN_BUCKETS
        )
        self.end_to_end_latency = histogram(
            names.END_TO_END_LATENCY, "Seconds from a request's arrival to its end.", names.REQUEST_BUCKETS
        )
        self.queue_time = histogram(names.QUEUE_TIME, "Seconds that a request waited.", names.REQUEST_BUCKETS)
        self.prefill_time = histogram(
            names.PREFILL_TIME, "Seconds from a request's place to its first token.", names.REQUEST_BUCKETS
        )
        self.decode_time = histogram(
            names.DECODE_TIME, "Seconds from a request's first token to its last.", names.REQUEST_BUCKETS
        )
        self.prompt_tokens = counter(names.PROMPT_TOKENS, "Prompt tokens of accepted requests.")
        self.generation_tokens = counter(names.GENERATION_TOKENS, "Tokens made.")
        finished = Counter(
            names.REQUEST_SUCCESS, "Requests that ended, by reason.", [names.MODEL_NAME, names.FINISHED_REASON],
            registry=self.registry,
        )  # fmt: skip
        self.finished = {reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}

    def observe_times(self, requests: Iterable[Request]) -> None:
        """Where the time of requests went that ran to their end."""
        for request in requests:
            times: list[Any] = [getattr(request, name, None) for name in TIMES]
            if None not in times and request.finish_reason in ("stop", "length"):
                arrived, scheduled, first, ended = times
                self.queue_time.observe(scheduled - arrived)
                self.prefill_time.observe(first - scheduled)
                self.decode_time.observe(ended - first)
