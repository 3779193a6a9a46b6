"""What Prometheus reads from the service, under the names that vLLM's dashboards know."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from soma.base import metrics as names
from soma.engine.request import FINISH_REASONS, Request
from soma.engine.stats import members, stats_of

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
    (names.DRAFT_TOKENS, "Tokens drafted by speculation.", "draft_tokens"),
    (names.ACCEPTED_TOKENS, "Drafted tokens that the model agreed to.", "accepted_tokens"),
)
LABELS = (names.MODEL_NAME, names.ENGINE)
TIMES = ("arrived", "scheduled", "first_token", "ended")  # of a request, on the monotonic clock


class EngineCollector(Collector):
    """The engines' own figures, asked for when Prometheus asks."""

    def __init__(self, engines: Sequence[Any], model_name: str) -> None:
        self.engines, self.model_name = engines, model_name

    def collect(self) -> Iterator[Metric]:
        values = [stats_of(engine) for engine in self.engines]
        for rows, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, text, key in rows:
                made = family(name, text, labels=LABELS)
                for number, each in enumerate(values):
                    made.add_metric([self.model_name, str(number)], each[key])
                yield made


@dataclass(frozen=True)
class EngineMetrics:
    """What the front observes of one engine's requests."""

    time_to_first_token: Histogram
    inter_token_latency: Histogram
    end_to_end_latency: Histogram
    queue_time: Histogram
    prefill_time: Histogram
    decode_time: Histogram
    prompt_tokens: Counter
    generation_tokens: Counter
    finished: dict[str, Counter]


class Metrics:
    """The metrics of one service, in a registry of their own; those of one engine by `metrics[number]`."""

    def __init__(self, engine: Any, model_name: str) -> None:
        self.registry = CollectorRegistry()
        engines = members(engine)
        self.registry.register(EngineCollector(engines, model_name))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, LABELS, registry=self.registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [*LABELS, *labels], registry=self.registry)

        plain: dict[str, Any] = {
            "time_to_first_token": histogram(
                names.TIME_TO_FIRST_TOKEN, "Seconds from a request's arrival to its first token.", names.TTFT_BUCKETS
            ),
            "inter_token_latency": histogram(
                names.INTER_TOKEN_LATENCY, "Seconds between a request's tokens.", names.INTER_TOKEN_BUCKETS
            ),
            "end_to_end_latency": histogram(
                names.END_TO_END_LATENCY, "Seconds from a request's arrival to its end.", names.REQUEST_BUCKETS
            ),
            "queue_time": histogram(names.QUEUE_TIME, "Seconds that a request waited.", names.REQUEST_BUCKETS),
            "prefill_time": histogram(
                names.PREFILL_TIME, "Seconds from a request's place to its first token.", names.REQUEST_BUCKETS
            ),
            "decode_time": histogram(
                names.DECODE_TIME, "Seconds from a request's first token to its last.", names.REQUEST_BUCKETS
            ),
            "prompt_tokens": counter(names.PROMPT_TOKENS, "Prompt tokens of accepted requests."),
            "generation_tokens": counter(names.GENERATION_TOKENS, "Tokens made."),
        }
        finished = counter(names.REQUEST_SUCCESS, "Requests that ended, by reason.", names.FINISHED_REASON)
        self.engines = [
            EngineMetrics(
                **{key: metric.labels(model_name, str(number)) for key, metric in plain.items()},
                finished={reason: finished.labels(model_name, str(number), reason) for reason in FINISH_REASONS},
            )
            for number in range(len(engines))
        ]

    def __getitem__(self, number: int) -> EngineMetrics:
        return self.engines[number]

    def observe_times(self, requests: Iterable[Request]) -> None:
        """Where the time of requests went that ran to their end."""
        for request in requests:
            times: list[Any] = [getattr(request, name, None) for name in TIMES]
            if None not in times and request.finish_reason in ("stop", "length"):
                arrived, scheduled, first, ended = times
                metrics = self[request.replica]
                metrics.queue_time.observe(scheduled - arrived)
                metrics.prefill_time.observe(first - scheduled)
                metrics.decode_time.observe(ended - first)
