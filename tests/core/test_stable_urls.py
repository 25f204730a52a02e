"""URLs that stay the same for a while: when they change, and how long they work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.base import PresignRequest
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import WrappedBackend
from granite_storage.exceptions import InvalidLocationError, InvalidReferenceError, ScanPendingError, UnknownBackendError
from granite_storage.signing import UrlSigner

HOUR = timedelta(hours=1)
KEYS = {"k1": "a secret of at least thirty-two bytes"}
SECONDS = st.integers(1, 3 * 86400)


class Presigning(WrappedBackend):
    """Answers with what it was asked for."""

    async def presign_get(
        self, location: str, *, expires_in: timedelta, content_type: str | None = None, disposition: str | None = None
    ) -> str:
        return f"one:{location}:{content_type}:{disposition}"


class PresigningMany(Presigning):
    requests: Sequence[PresignRequest] = ()

    async def presign_many(self, requests: Sequence[PresignRequest]) -> Sequence[str]:
        self.requests = requests
        return [f"{request.location}@{request.signed_at}+{request.expires_in}" for request in requests]


def manager_with(**backends: Any) -> StorageManager:
    return StorageManager(
        backends={"memory": MemoryStorageBackend(), **backends},
        policies={"files": StoragePolicy("files", "memory")},
        url_signer=UrlSigner("https://files.example/signed", keys=KEYS),
    )


def ref_at(location: str, backend: str = "memory", **more: Any) -> StoredObjectRef:
    return StoredObjectRef(storage_key="files", backend=backend, location=location, size=1, checksum="", **more)


def sign_at(now: float, location: str, expires_in: int, stable_for: int) -> str:
    """Sign in another process, at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_storage.signing.time.time", lambda: now)
        signer = UrlSigner("https://files.example/signed", keys=KEYS)
        return signer.sign(ref_at(location), expires_in=timedelta(seconds=expires_in), stable_for=timedelta(seconds=stable_for))


def works_at(now: float, url: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_storage.signing.time.time", lambda: now)
        signer = UrlSigner("https://files.example/signed", keys=KEYS)
        return signer.verify(url.rpartition("/")[2]) is not None


@given(st.floats(1.6e9, 2e9), st.sampled_from(["a", "b/c", "caf\u00e9"]), SECONDS, SECONDS)
def test_the_rule(now: float, location: str, expires_in: int, stable_for: int) -> None:
    """One window has one URL, which works for its window and at least as long after it was returned as was asked for."""
    url = sign_at(now, location, expires_in, stable_for)
    assert works_at(now, url)
    assert works_at(now + expires_in - 1, url)
    changes = [
        second
        for second in (1, stable_for // 2, stable_for - 1)
        if sign_at(now + second, location, expires_in, stable_for) != url
    ]
    assert sign_at(now + stable_for, location, expires_in, stable_for) != url
    assert not works_at(now + stable_for + expires_in + 1, url)
    if changes:  # then the window began before
        assert sign_at(now - stable_for + changes[0], location, expires_in, stable_for) == url


def test_the_urls_of_a_page_do_not_change_at_once() -> None:
    now, changed = 1.8e9, set()
    for number in range(20):
        location = f"photo/{number}"
        urls = [sign_at(now + minute * 60, location, 60, 3600) for minute in range(61)]
        assert len(set(urls)) == 2
        changed.add(urls.index(urls[-1]))
    assert len(changed) > 10


async def test_many_of_several_backends() -> None:
    many, one = PresigningMany(MemoryStorageBackend()), Presigning(MemoryStorageBackend())
    async with manager_with(many=many, one=one) as manager:
        refs = [ref_at("a", "many"), ref_at("b"), ref_at("c", "one"), ref_at("d", "many"), ref_at("a", "many")]
        urls = await manager.urls(refs, expires_in=HOUR, disposition="inline")
        assert urls[0] == urls[4] == "a@None+1:00:00"
        assert urls[3] == "d@None+1:00:00"
        assert urls[1].startswith("https://files.example/signed/k1.")
        assert urls[2] == "one:c:application/octet-stream:attachment"
        assert [request.location for request in many.requests] == ["a", "d", "a"]
        assert await manager.urls([], expires_in=HOUR) == []


async def test_a_window_for_a_backend() -> None:
    many = PresigningMany(MemoryStorageBackend())
    async with manager_with(many=many) as manager:
        (url,) = await manager.urls([ref_at("a", "many")], expires_in=HOUR, stable_for=timedelta(days=1))
        (request,) = many.requests
        assert request.expires_in == timedelta(hours=25)
        assert request.signed_at is not None
        assert request.signed_at <= time.time() < request.signed_at + 86400
        assert url == await manager.url(ref_at("a", "many"), expires_in=HOUR, stable_for=timedelta(days=1))


async def test_a_backend_that_cannot() -> None:
    async with manager_with(one=Presigning(MemoryStorageBackend())) as manager:
        with pytest.raises(ConfigurationError, match="stable_for"):
            await manager.url(ref_at("a", "one"), expires_in=HOUR, stable_for=HOUR)


async def test_one_that_cannot_be_signed() -> None:
    async with manager_with() as manager:
        for bad, error in (
            (ref_at("../a"), InvalidLocationError),
            (ref_at("a", "gone"), UnknownBackendError),
            ("a", InvalidReferenceError),
            (ref_at("a", scan={"status": "pending"}), ScanPendingError),
        ):
            with pytest.raises(error):
                await manager.urls([ref_at("b"), bad], expires_in=HOUR)  # type: ignore[list-item]
        for options in (
            {"stable_for": timedelta(0)},
            {"stable_for": timedelta(milliseconds=900)},
            {"stable_for": timedelta(days=7)},
            {"stable_for": timedelta.max},
        ):
            with pytest.raises(ValueError, match="stable_for"):
                await manager.url(ref_at("a"), expires_in=HOUR, **options)
        with pytest.raises(ValueError, match="disposition"):
            await manager.urls([ref_at("b")], expires_in=HOUR, disposition="x")  # type: ignore[arg-type]


def test_synchronous() -> None:
    manager = manager_with()
    with manager.sync as storage:
        urls = storage.urls([ref_at("a"), ref_at("b")], expires_in=HOUR, stable_for=timedelta(days=3))
        assert urls == [storage.url(ref_at(name), expires_in=HOUR, stable_for=timedelta(days=3)) for name in "ab"]
