"""What OpenTelemetry's SDK has recorded of the library, without the providers of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from granite_storage import _telemetry

__all__ = ["Recorder", "recording"]


class Recorder:
    """Spans and metrics."""

    def __init__(self) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self._tracers = TracerProvider(shutdown_on_exit=False)
        self._tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self._tracers.get_tracer("tests")
        self.meter = self._meters.get_meter("tests")
        self._read: dict[str, Any] | None = None

    def close(self) -> None:
        """Keep what was recorded, and end the providers."""
        self._metrics()
        self._tracers.shutdown()
        self._meters.shutdown()

    def spans(self, *names: str) -> list[ReadableSpan]:
        """Return the spans that have ended, those of the names where some are given, in the order of their starts."""
        found = [span for span in self._exporter.get_finished_spans() if not names or span.name in names]
        return sorted(found, key=lambda span: span.start_time or 0)

    def attributes(self, span: ReadableSpan) -> dict[str, object]:
        return dict(span.attributes or {})

    def id(self, span: ReadableSpan) -> int:
        context = span.get_span_context()
        assert context is not None
        return context.span_id

    def parent(self, span: ReadableSpan) -> int | None:
        return None if span.parent is None else span.parent.span_id

    def sums(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Return the labels and the values of a counter or a gauge."""
        return [(dict(point.attributes), point.value) for point in self._points(name)]

    def counts(self, name: str) -> list[tuple[dict[str, Any], int]]:
        """Return the labels of a histogram, and how often each was recorded."""
        return [(dict(point.attributes), point.count) for point in self._points(name)]

    def unit(self, name: str) -> str:
        return str(self._metrics()[name].unit)

    def _points(self, name: str) -> list[Any]:
        metric = self._metrics().get(name)
        return [] if metric is None else list(metric.data.data_points)

    def _metrics(self) -> dict[str, Any]:
        if self._read is None:
            data = self._reader.get_metrics_data()
            scopes = [] if data is None else [scope for one in data.resource_metrics for scope in one.scope_metrics]
            self._read = {metric.name: metric for scope in scopes for metric in scope.metrics}
        return self._read


@contextmanager
def recording(*, has_locations: bool = False) -> Iterator[Recorder]:
    """Record while the block runs."""
    recorder, before = Recorder(), _telemetry._instruments
    _telemetry._instruments = _telemetry.Instruments.of(recorder.tracer, recorder.meter, has_locations=has_locations)
    try:
        yield recorder
    finally:
        _telemetry._instruments = before
        recorder.close()
