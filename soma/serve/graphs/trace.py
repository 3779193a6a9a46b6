"""OpenTelemetry spans, where its packages are installed and a provider is set; nothing otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ImportError:  # the gateway extra is not installed
    trace = propagate = None  # type: ignore[assignment]


@contextmanager
def span(name: str, **attributes: str) -> Iterator[None]:
    """A span around the `with`, inside the one that is open; exceptions mark it failed, by their kind alone."""
    if trace is None:
        yield
        return
    with trace.get_tracer("soma.serve").start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as made:
        try:
            yield
        except BaseException as error:
            made.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def propagated() -> dict[str, str]:
    """Headers that let another service continue the trace (W3C traceparent)."""
    headers: dict[str, str] = {}
    if propagate is not None:
        propagate.inject(headers)
    return headers
