"""What Prometheus reads of a service of graphs: its nodes, its limits, and the engines that nodes own."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from soma.base import metrics as names


class GraphMetrics:
    """Of all graphs of a service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("graph", "node")
        self.requests = Counter("soma:graph_node_requests", "Requests that a node has seen the end of.",
                                [*labels, "outcome"], registry=self.registry)  # fmt: skip
        self.seconds = Histogram("soma:graph_node_seconds", "From a request's arrival at a node to its last answer.",
                                 labels, registry=self.registry, buckets=names.REQUEST_BUCKETS)  # fmt: skip

    def observe(self, graph: str, node: str, seconds: float, *, ok: bool) -> None:
        """A node is done with a request."""
        self.requests.labels(graph, node, "ok" if ok else "error").inc()
        self.seconds.labels(graph, node).observe(seconds)


class Together(CollectorRegistry):
    """Several registries as one: families of one name become one family, as Prometheus wants them."""

    def __init__(self, registries: Callable[[], Iterable[CollectorRegistry]]) -> None:
        super().__init__()
        self.registries = registries

    def collect(self) -> Iterator[Metric]:
        """Families, each once."""
        found: dict[str, Metric] = {}
        for registry in self.registries():
            for metric in registry.collect():
                if metric.name in found:
                    found[metric.name].samples.extend(metric.samples)
                else:
                    found[metric.name] = metric
        return iter(found.values())
