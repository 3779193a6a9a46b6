"""OpenTelemetry spans, where its packages are installed and a provider is set; nothing otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

try:
    from opentelemetry import propagate, trace
except ImportError:  # the gateway extra is not installed
    trace = propagate = None  # type: ignore[assignment]


if TYPE_CHECKING:
    from soma.serve.calls import Call, Usage


class CallSpan:
    """The span of a call that passed the gates, from there to its end: model and tokens (under OpenTelemetry's GenAI
    names), request id, and what the call is tagged with, as the version of its prompt. Nothing where nobody traces."""

    def __init__(self, call: "Call") -> None:
        self.span = None
        if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return
        tags = {f"soma.{name}": value for name, value in call.tags.items()}
        told = {"gen_ai.request.model": call.model, "soma.route": call.route, "soma.request_id": call.id, **tags}
        self.span = trace.get_tracer("soma.serve").start_span("call", attributes=told)

    def end(self, usage: "Usage") -> None:
        """The call used this."""
        if self.span is None:
            return
        for name, value in (
            ("gen_ai.usage.input_tokens", usage.prompt_tokens), ("gen_ai.usage.output_tokens", usage.completion_tokens),
            ("soma.outcome", usage.outcome),
        ):  # fmt: skip
            self.span.set_attribute(name, value)
        if usage.outcome == "error":
            self.span.set_status(trace.StatusCode.ERROR)
        self.span.end()


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
