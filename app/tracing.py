"""OpenTelemetry traces: one span per request, with a child span for each stage of an answer.

Off unless an endpoint is set, which needs the extra `otel`. Tracers are per service, not global. Spans contain ids,
numbers and routes, never questions or documents. Start at `Tracing.request`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import NoOpTracerProvider, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.settings import SettingsError

_TIMEOUT_S = 2  # of one export, which bounds how long a hanging collector delays shutdown
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Creates spans and exports them in the background; export failures are logged and the spans dropped."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: base URL of an OTLP/HTTP collector; None: no spans. Raises SettingsError."""
        self._tracer: Tracer = NoOpTracerProvider().get_tracer("jamba-rag")
        self.close: Callable[[], None] = lambda: None
        if endpoint is not None:
            self._tracer, self.close = _exporting_tracer(endpoint)

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of a request, current within the block; continues the caller's trace, if any."""
        parent = _PROPAGATOR.extract(headers)
        with self._tracer.start_as_current_span(method, context=parent, kind=SpanKind.SERVER) as span:
            yield span

    def stage(self, name: str, start_s: float, end_s: float, **attributes: str | int | float) -> None:
        """Record a stage of the current request, between these values of `time.perf_counter()`."""
        now_s, now_ns = time.perf_counter(), time.time_ns()
        start_ns, end_ns = (now_ns - int((now_s - at) * 1e9) for at in (start_s, end_s))
        span = self._tracer.start_span(name, start_time=start_ns, attributes=attributes)
        span.end(end_ns)

    def current_trace_id(self) -> str | None:
        """Hexadecimal id of the current trace, for the log."""
        context = trace.get_current_span().get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else None


def _exporting_tracer(endpoint: str) -> tuple[Tracer, Callable[[], None]]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            "JAMBA_RAG_TELEMETRY__OTLP_ENDPOINT is set, but the OpenTelemetry SDK is not installed; "
            "pip install 'jamba-rag[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "jamba-rag"}))
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("jamba-rag"), provider.shutdown
