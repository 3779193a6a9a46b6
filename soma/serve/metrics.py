"""What Prometheus reads from the service, under the names that vLLM's dashboards know."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from soma.base import metrics as names
from soma.engine.engine import Engine


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        label = [names.MODEL_NAME]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, label, registry=self.registry, buckets=buckets).labels(model_name)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, label, registry=self.registry).labels(model_name)

        gauge(names.RUNNING, "Requests in the engine's running set.").set_function(lambda: len(engine.running))
        gauge(names.WAITING, "Requests that wait for a place.").set_function(lambda: len(engine.waiting))
        self.time_to_first_token = histogram(
            names.TIME_TO_FIRST_TOKEN, "Seconds from a request's arrival to its first token.", names.TTFT_BUCKETS
        )
        self.inter_token_latency = histogram(
            names.INTER_TOKEN_LATENCY, "Seconds between a request's tokens.", names.INTER_TOKEN_BUCKETS
        )
        self.end_to_end_latency = histogram(
            names.END_TO_END_LATENCY, "Seconds from a request's arrival to its end.", names.REQUEST_BUCKETS
        )
        self.prompt_tokens = Counter(
            names.PROMPT_TOKENS, "Prompt tokens of accepted requests.", label, registry=self.registry
        ).labels(model_name)
        self.generation_tokens = Counter(names.GENERATION_TOKENS, "Tokens made.", label, registry=self.registry).labels(
            model_name
        )
        finished = Counter(
            names.REQUEST_SUCCESS, "Requests that ended, by reason.", [names.MODEL_NAME, names.FINISHED_REASON],
            registry=self.registry,
        )  # fmt: skip
        self.finished = {reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}
