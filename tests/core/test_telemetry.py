"""Spans and metrics, recorded by OpenTelemetry's SDK, and what a process without its packages pays."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.trace import StatusCode
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, ContentTooLargeError, ObjectNotFoundError, StorageManager, attachment
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendUnavailableError
from granite_storage.signing import UrlSigner
from granite_storage.testing import FaultInjectingBackend, bound_storage
from tests.core.support import SLOT, chunks_of, manager_on
from tests.orm.derivations import Upper
from tests.telemetry import Recorder, recording

BACKEND = {"granite_storage.backend": "store", "granite_storage.storage_key": "files"}
OK = {**BACKEND, "granite_storage.outcome": "ok"}


class Base(DeclarativeBase):
    pass


class Paper(Base):
    __tablename__ = "telemetry_paper"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("papers", variants={"upper": Upper(when="flush")})


@pytest.fixture
def recorded() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder


@pytest.fixture
def manager() -> StorageManager:
    return manager_on(MemoryStorageBackend(), max_size=10)


async def test_put_open_and_url(recorded: Recorder) -> None:
    signer = UrlSigner("https://example.com/files", keys={"one": "x" * 32})
    plain = manager_on(MemoryStorageBackend())
    manager = StorageManager(backends=plain.backends, policies=plain.policies, url_signer=signer)
    ref = await manager.put_bytes(content=b"bytes", original_filename="secret.txt", **SLOT)
    await manager.put_stream(stream=chunks_of(b"one", b"two"), **SLOT)
    assert await manager.get(ref) == b"bytes"
    async for _ in manager.open(ref, offset=2):
        pass
    await manager.url(ref, expires_in=timedelta(minutes=1))
    assert [span.name for span in recorded.spans()] == [
        *["granite_storage.put"] * 2,
        *["granite_storage.open"] * 2,
        "granite_storage.url",
    ]
    assert [recorded.attributes(span) for span in recorded.spans()] == [
        {**OK, "granite_storage.size": 5},
        {**OK, "granite_storage.size": 6},
        OK,
        OK,
        OK,
    ]
    written, read = ({**BACKEND, "granite_storage.io.direction": direction} for direction in ("write", "read"))
    assert recorded.sums("granite_storage.io") == [(written, 11), (read, 8)]
    assert recorded.unit("granite_storage.io") == "By"
    counts = {
        labels["granite_storage.operation"]: count for labels, count in recorded.counts("granite_storage.operation.duration")
    }
    assert counts == {"put": 2, "open": 2, "url": 1}
    assert recorded.unit("granite_storage.operation.duration") == "s"
    assert recorded.sums("granite_storage.operation.errors") == []


async def test_spans_are_children_of_the_callers(recorded: Recorder, manager: StorageManager) -> None:
    with recorded.tracer.start_as_current_span("request") as request:
        await asyncio.create_task(manager.put_bytes(content=b"bytes", **SLOT))
        with pytest.raises(ContentTooLargeError):
            await manager.put_bytes(content=bytes(11), **SLOT)
        await manager.put_bytes(content=b"bytes", **SLOT)
    assert [recorded.parent(span) for span in recorded.spans("granite_storage.put")] == [request.get_span_context().span_id] * 3


async def test_spans_of_synchronous_callers_are_children_too(recorded: Recorder, manager: StorageManager) -> None:
    def work() -> int:
        with recorded.tracer.start_as_current_span("task") as task:
            ref = manager.sync.put_bytes(content=b"bytes", **SLOT)
            with manager.sync.open(ref) as file:
                assert file.read() == b"bytes"
            manager.sync.close()
            return task.get_span_context().span_id

    task = await asyncio.to_thread(work)
    spans = recorded.spans("granite_storage.put", "granite_storage.open")
    assert [recorded.parent(span) for span in spans] == [task] * 2


async def test_errors_are_recorded_without_what_they_say(recorded: Recorder, manager: StorageManager) -> None:
    ref = await manager.put_bytes(content=b"bytes", original_filename="secret.txt", **SLOT)
    await manager.delete(ref)
    with pytest.raises(ObjectNotFoundError):
        await manager.get(ref)
    (span,) = recorded.spans("granite_storage.open")
    error = {"error.type": "granite_storage.exceptions.ObjectNotFoundError"}
    assert recorded.attributes(span) == {**BACKEND, "granite_storage.outcome": "error", **error}
    assert span.status.status_code is StatusCode.ERROR
    (event,) = span.events
    assert (event.name, dict(event.attributes or {})) == ("exception", {"exception.type": error["error.type"]})
    assert "secret" not in span.to_json()
    labels = {**BACKEND, **error, "granite_storage.outcome": "error", "granite_storage.operation": "open"}
    assert recorded.sums("granite_storage.operation.errors") == [(labels, 1)]


async def test_locations_and_messages_on_request() -> None:
    with recording(has_locations=True) as recorded:
        faults = FaultInjectingBackend(MemoryStorageBackend())
        faults.fail("put_bytes", error=BackendUnavailableError("no answer from https://user:password@s3.example/?sig=abc"))
        with pytest.raises(BackendUnavailableError):
            await manager_on(faults).put_bytes(content=b"bytes", original_filename="name.txt", **SLOT)
        (span,) = recorded.spans("granite_storage.put")
    assert str(recorded.attributes(span)["granite_storage.location"]).endswith("-name.txt")
    assert (span.events[0].attributes or {})["exception.message"] == "no answer from https://s3.example/?..."
    labels, _ = recorded.sums("granite_storage.operation.errors")[0]
    assert "granite_storage.location" not in labels


async def test_a_cancellation_is_no_error(recorded: Recorder) -> None:
    faults = FaultInjectingBackend(MemoryStorageBackend())
    faults.delay("put_bytes", seconds=60)
    task = asyncio.create_task(manager_on(faults).put_bytes(content=b"bytes", **SLOT))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (span,) = recorded.spans("granite_storage.put")
    assert recorded.attributes(span)["granite_storage.outcome"] == "cancelled"
    assert (span.status.status_code, list(span.events)) == (StatusCode.UNSET, [])
    assert recorded.sums("granite_storage.operation.errors") == []


async def test_what_a_flush_does_is_below_its_span(recorded: Recorder) -> None:
    async with bound_storage(Base) as kit:
        with recorded.tracer.start_as_current_span("request") as request:
            async with kit.sessions.begin() as session:
                session.add(Paper(id=1, file=Attachment(b"text")))
        async with kit.sessions.begin() as session:
            await session.get_one(Paper, 1)
    _require_family(recorded, request.get_span_context().span_id)


async def test_a_flush_of_a_synchronous_session(recorded: Recorder) -> None:
    def work() -> int:
        with bound_storage(Base) as kit, recorded.tracer.start_as_current_span("task") as task:
            with kit.sessions.begin() as session:
                session.add(Paper(id=1, file=Attachment(b"text")))
            return task.get_span_context().span_id

    _require_family(recorded, await asyncio.to_thread(work))


def _require_family(recorded: Recorder, outermost: int) -> None:
    (flush,) = recorded.spans("granite_storage.flush")
    (derive,) = recorded.spans("granite_storage.derive")
    original, variant = recorded.spans("granite_storage.put")
    (reading,) = recorded.spans("granite_storage.open")
    assert recorded.parent(flush) == outermost
    assert {recorded.parent(derive), recorded.parent(original)} == {recorded.id(flush)}
    assert {recorded.parent(variant), recorded.parent(reading)} == {recorded.id(derive)}
    assert recorded.attributes(derive)["granite_storage.storage_key"] == "papers"


def run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_wrapped_without_the_package() -> None:
    program = """
import asyncio, json, sys
sys.modules["opentelemetry"] = None
from granite_storage import StorageManager, StoragePolicy
from granite_storage._engine import Engine
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import flush, uploads
from granite_storage.orm.journal.recovery import Recovery
manager = StorageManager(backends={"m": MemoryStorageBackend()}, policies={"files": StoragePolicy("files", "m")})
place = {"storage_key": "files", "model_name": "m", "entity_id": "1", "field_name": "f"}
ref = asyncio.run(manager.put_bytes(content=b"bytes", **place))
assert asyncio.run(manager.get(ref)) == b"bytes"
functions = [Engine.put, Engine._open, Engine.urls, flush.save, uploads.make_variant, Recovery.run]
print(json.dumps([hasattr(function, "__wrapped__") for function in functions]))
"""
    assert run(program) == [False] * 6


@pytest.mark.parametrize("has_meters", [True, False])
@pytest.mark.parametrize("has_tracers", [True, False])
def test_the_api_is_loaded_by_a_manager_and_follows_a_provider_that_is_set_later(has_tracers: bool, has_meters: bool) -> None:
    program = f"""
import asyncio, json, sys
from granite_storage import StorageManager, StoragePolicy, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
before = "opentelemetry" in sys.modules
manager = StorageManager(backends={{"m": MemoryStorageBackend()}}, policies={{"files": StoragePolicy("files", "m")}})
loaded = "opentelemetry.trace" in sys.modules
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
meters = MeterProvider([reader])
if {has_tracers}:
    trace.set_tracer_provider(provider)
if {has_meters}:
    metrics.set_meter_provider(meters)
place = {{"storage_key": "files", "model_name": "m", "entity_id": "1", "field_name": "f"}}
asyncio.run(manager.put_bytes(content=b"bytes", **place))
names = [span.name for span in exporter.get_finished_spans()]
data = reader.get_metrics_data()
found = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else []
print(json.dumps([before, loaded, names, sorted(metric.name for metric in found)]))
"""
    assert run(program) == [
        False,
        True,
        ["granite_storage.put"] * has_tracers,
        ["granite_storage.io", "granite_storage.operation.duration"] * has_meters,
    ]
