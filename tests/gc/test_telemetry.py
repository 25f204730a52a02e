"""What a collection records: its span, its errors, and the age of the oldest orphan that it leaves."""

from __future__ import annotations

import pytest
from opentelemetry import trace

from granite_storage.exceptions import CollectionRefusedError
from tests.gc.environment import Crate, GcEnvironment, file
from tests.telemetry import recording

DOCS = {"granite_storage.backend": "store", "granite_storage.storage_key": "docs"}
ORPHAN = {**DOCS, "granite_storage.garbage.kind": "orphan"}


async def test_the_oldest_orphan_that_is_left(plain_env: GcEnvironment) -> None:
    await plain_env.add(Crate(id=1, file=file("a")))
    await plain_env.orphan()
    plain_env.age()
    with recording() as recorded:
        with recorded.tracer.start_as_current_span("request") as request:
            async for _ in plain_env.collector().collection(storage_key="docs"):
                assert not recorded.spans("granite_storage.collect")
                assert trace.get_current_span() is request
        (span,) = recorded.spans("granite_storage.collect")
        assert recorded.attributes(span) == {**DOCS, "granite_storage.outcome": "ok"}
        assert recorded.parent(span) == request.get_span_context().span_id
    ((labels, age),) = recorded.sums("granite_storage.garbage.age")
    assert labels == ORPHAN
    assert 0 < age < 60  # by the time in its name, which the test cannot make older
    assert recorded.unit("granite_storage.garbage.age") == "s"
    with recording() as recorded:
        await plain_env.collect()
    assert recorded.sums("granite_storage.garbage.age") == [(ORPHAN, 0.0)]


async def test_a_refusal_is_an_error(plain_env: GcEnvironment) -> None:
    await plain_env.orphan()
    plain_env.age()
    with recording() as recorded, pytest.raises(CollectionRefusedError):
        await plain_env.collect()
    ((labels, count),) = recorded.sums("granite_storage.operation.errors")
    assert (labels["error.type"], count) == ("granite_storage.exceptions.CollectionRefusedError", 1)
    assert recorded.sums("granite_storage.garbage.age") == []
