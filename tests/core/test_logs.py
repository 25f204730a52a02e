"""The fields of log records: which backend, policy and object each concerns."""

from __future__ import annotations

import logging

import pytest

from granite_storage import BackendUnavailableError
from granite_storage._telemetry import fields_of
from granite_storage.backends.memory import MemoryStorageBackend
from tests.core.support import SLOT, manager_on

logger = logging.getLogger("granite_storage")


def fields(record: logging.LogRecord) -> tuple[object, ...]:
    return record.__dict__["backend"], record.__dict__["storage_key"], record.__dict__["location"]


async def test_of_what_is_given(caplog: pytest.LogCaptureFixture) -> None:
    manager = manager_on(MemoryStorageBackend())
    ref = await manager.put_bytes(content=b"bytes", **SLOT)
    prepared = manager._engine.prepare(**SLOT)
    logger.warning("of a ref", extra=fields_of(ref))
    logger.warning("of an upload", extra=fields_of(prepared))
    logger.warning("of names", extra=fields_of(backend="other"))
    logger.warning("of nothing")
    assert [fields(record) for record in caplog.records] == [
        ("store", "files", ref.location),
        ("store", "files", prepared.location),
        ("other", None, None),
        (None, None, None),
    ]


def test_of_the_error_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    error = BackendUnavailableError("no answer", backend="store", location="a/b")
    logger.warning("failed: %s", error)
    logger.warning("failed", exc_info=error)
    logger.warning("failed: %s", error, extra=fields_of(location="given"))
    assert [fields(record) for record in caplog.records] == [
        ("store", None, "a/b"),
        ("store", None, "a/b"),
        ("store", None, "given"),
    ]


async def test_a_formatter_can_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(backend)s %(storage_key)s %(location)s"))
    logger.addHandler(handler)
    try:
        logger.warning("anything")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "WARNING None None None\n"
