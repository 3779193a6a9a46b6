"""OpenTelemetry spans, where its packages are installed and a provider is set; nothing otherwise."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

try:
    from opentelemetry import context, propagate, trace
except ImportError:  # the gateway extra is not installed
    context = trace = propagate = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from soma.serve.calls import Call, Usage

HEADERS = ("traceparent", "tracestate")  # W3C Trace Context


class CallSpan:
    """The span of a call that passed the gates, from there to its end: model and tokens (under OpenTelemetry's GenAI
    names), request id, and what the call is tagged with, as the version of its prompt. Nothing where nobody traces."""

    def __init__(self, call: "Call") -> None:
        self.span = None
        if not is_on():
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


def is_on() -> bool:
    """Whether somebody traces."""
    return trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def continued(headers: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Spans inside belong to the trace that a request's headers name, if they do."""
    given = {name: value for name, value in headers if name in HEADERS}
    if not given:
        yield
        return
    token = context.attach(propagate.extract(given))
    try:
        yield
    finally:
        context.detach(token)


class Continued:
    """ASGI middleware: a request's `traceparent` is the parent of the spans that it makes."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http" or not is_on():
            await self.app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        with continued(headers):
            await self.app(scope, receive, send)


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
