"""References that the caller gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from granite_storage import StorageGarbageCollector, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import merge
from granite_storage.gc import references as gc_references
from granite_storage.gc.merge import SortedSpool
from granite_storage.orm import iter_model_storage_refs
from tests.gc.environment import POLICIES, AgedBackend, Crate, GcEnvironment, file


class Shed:
    """Objects and the references that an application keeps somewhere."""

    def __init__(self, policies: Any = POLICIES) -> None:
        self.store = AgedBackend()
        self.manager = StorageManager(backends={"store": self.store}, policies=policies)
        self.refs: list[Any] = []
        self.reads = 0

    async def put(self, storage_key: str = "docs", **options: Any) -> StoredObjectRef:
        return await self.manager.put_bytes(
            storage_key=storage_key, model_name="m", entity_id="1", field_name="f", content=b"abc", **options
        )

    def given(self) -> list[Any]:
        self.reads += 1
        return self.refs

    async def collect(self, iter_references: Any = None, storage_key: str = "docs") -> Any:
        self.store.passed = timedelta(days=3)
        collector = StorageGarbageCollector(self.manager, iter_references or self.given, max_deleted_share=1.0)
        return await collector.collect(storage_key=storage_key, dry_run=False)

    async def locations(self) -> set[str]:
        return {info.location async for info in self.store.iter_objects()}


async def _agen(refs: list[Any]) -> AsyncIterator[Any]:
    for ref in refs:
        yield ref


async def _awaitable(refs: list[Any]) -> list[Any]:
    return refs


@pytest.mark.parametrize("form", [list, iter, _agen, _awaitable], ids=["iterable", "iterator", "async iterator", "awaitable"])
async def test_every_form(form: Any) -> None:
    shed = Shed()
    shed.refs = [None, await shed.put(), await shed.put(), None]
    await shed.put()
    report = await shed.collect(lambda: form(shed.refs))
    assert (report.scanned, report.referenced, report.deleted) == (3, 2, 1)
    assert await shed.locations() == {ref.location for ref in shed.refs if ref}


async def test_an_iterator_that_blocks_is_read_in_a_thread() -> None:
    shed = Shed()
    shed.refs = [await shed.put()]
    threads: set[str] = set()

    def blocking() -> Iterator[Any]:
        threads.add(threading.current_thread().name)
        yield from shed.refs

    await shed.collect(blocking)
    assert threading.current_thread().name not in threads


async def test_they_are_read_anew_before_anything_is_deleted() -> None:
    shed = Shed()
    shed.refs = [await shed.put()]
    late = await shed.put()

    def given() -> list[Any]:
        shed.reads += 1
        return [*shed.refs, late] if shed.reads > 1 else shed.refs

    report = await shed.collect(given)
    assert (report.deleted, report.referenced_on_recheck) == (0, 1)
    assert late.location in await shed.locations()


async def test_what_is_no_ref_stops_the_run() -> None:
    shed = Shed()
    shed.refs = [await shed.put(), {"location": "docs/x"}]
    await shed.put()
    with pytest.raises(CollectionRefusedError, match="dict"):
        await shed.collect()
    assert len(await shed.locations()) == 2


async def test_an_error_of_the_iterator_stops_the_run() -> None:
    shed = Shed()
    ref = await shed.put()
    await shed.put()

    def given() -> Iterator[Any]:
        yield ref
        raise OSError("the database is gone")

    with pytest.raises(OSError, match="gone"):
        await shed.collect(given)
    assert len(await shed.locations()) == 2


async def test_policies_in_one_place_of_which_only_one_was_given() -> None:
    """The other's objects would all be taken for orphans."""
    shed = Shed({key: StoragePolicy(key, "store") for key in ("docs", "images")})
    shed.refs = [await shed.put()]
    await shed.put("images")
    with pytest.raises(CollectionRefusedError, match="no reference of the policies images"):
        await shed.collect()
    shed.refs.append(await shed.put("images"))
    assert (await shed.collect()).deleted == 1


async def test_the_references_of_a_policy_alone_do_where_it_has_a_prefix() -> None:
    shed = Shed()
    shed.refs = [await shed.put()]
    others = [await shed.put(key) for key in ("docs2", "nested", "bare")]
    await shed.put()
    assert (await shed.collect()).deleted == 1
    assert {ref.location for ref in others} <= await shed.locations()
    shed.refs = [others[2]]
    assert (await shed.collect(storage_key="bare")).scanned == 1


async def test_derived_objects() -> None:
    shed = Shed()
    derived = await shed.put()
    shed.refs = [await shed.put(extra={"thumbnail": derived.location})]
    assert (await shed.collect()).referenced == 2


async def test_with_the_references_of_models(plain_env: GcEnvironment) -> None:
    await plain_env.add(Crate(id=1, file=file("a")))
    orphan = await plain_env.orphan()
    plain_env.age()

    async def references() -> AsyncIterator[StoredObjectRef]:
        async with plain_env.sessions() as session, aclosing(iter_model_storage_refs(session, Crate, "file")) as refs:
            async for ref in refs:
                yield ref

    report = await plain_env.collector(iter_references=references).collect(storage_key="docs", dry_run=False)
    assert report.deleted == 1
    assert orphan.location not in await plain_env.locations()


@pytest.mark.case("RB-08")
@pytest.mark.parametrize("kind", ["async generator", "generator", "async iterator", "awaitable"])
@pytest.mark.parametrize("wrong", ["no ref", "unknown backend"])
async def test_what_is_read_in_part_is_closed(kind: str, wrong: str) -> None:
    """It may hold a connection. The error keeps its frames, and so whatever they refer to."""
    shed = Shed()
    ref = await shed.put()
    bad = "no ref" if wrong == "no ref" else replace(ref, backend="gone")
    closed: list[str] = []

    async def agen() -> AsyncIterator[Any]:
        try:
            for item in [ref, bad, *[ref] * 5000]:
                yield item
        finally:
            await asyncio.sleep(0)
            closed.append("agen")

    def gen() -> Iterator[Any]:
        try:
            yield from [ref, bad, *[ref] * 5000]
        finally:
            closed.append("gen")

    class Closable:
        def __init__(self) -> None:
            self.items = agen()

        def __aiter__(self) -> Closable:
            return self

        async def __anext__(self) -> Any:
            return await anext(self.items)

        async def close(self) -> None:
            await self.items.aclose()  # type: ignore[attr-defined]

    async def later() -> AsyncIterator[Any]:
        return agen()

    given = {"async generator": agen, "generator": gen, "async iterator": Closable, "awaitable": later}[kind]
    with pytest.raises(CollectionRefusedError) as refused:
        await shed.collect(given)
    assert len(closed) == 1
    assert refused.value.__traceback__ is not None


@pytest.mark.case("RB-08")
async def test_what_is_read_in_part_is_closed_where_a_recheck_fails() -> None:
    shed = Shed()
    ref = await shed.put()
    await shed.put()
    opened, closed = [0], [0]

    async def given() -> AsyncIterator[Any]:
        opened[0] += 1
        try:
            yield ref
            yield "no ref" if opened[0] == 2 else ref
            yield ref
        finally:
            closed[0] += 1

    with pytest.raises(CollectionRefusedError) as refused:
        await shed.collect(given)
    assert (opened, closed) == ([2], [2])
    assert refused.value.__traceback__ is not None


@pytest.mark.case("RB-08")
async def test_a_cancelled_run_closes_what_it_reads() -> None:
    shed = Shed()
    ref = await shed.put()
    closed, reached = asyncio.Event(), asyncio.Event()

    async def given() -> AsyncIterator[Any]:
        try:
            while True:
                yield ref
                reached.set()
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            closed.set()

    run = asyncio.create_task(shed.collect(given))
    await reached.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert closed.is_set()


@pytest.mark.case("RB-08")
async def test_closing_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shed = Shed()
    ref = await shed.put()
    monkeypatch.setattr(gc_references, "shielded_cleanup", partial(gc_references.shielded_cleanup, timeout=0.05))

    async def given() -> AsyncIterator[Any]:
        try:
            yield ref
            yield "no ref"
            yield ref
        finally:
            await asyncio.sleep(60)

    async with asyncio.timeout(10):
        with pytest.raises(CollectionRefusedError, match="StoredObjectRef"):
            await shed.collect(given)
    assert "closing what iter_references returned" in caplog.text


@pytest.mark.case("RB-08")
async def test_an_error_while_closing_does_not_hide_the_refusal(caplog: pytest.LogCaptureFixture) -> None:
    shed = Shed()
    ref = await shed.put()

    async def given() -> AsyncIterator[Any]:
        try:
            yield ref
            yield "no ref"
            yield ref
        finally:
            raise OSError("the connection is gone")

    with pytest.raises(CollectionRefusedError, match="StoredObjectRef"):
        await shed.collect(given)
    assert "closing what iter_references returned failed" in caplog.text


async def test_sorting_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_IN_MEMORY", 10)
    monkeypatch.setattr(merge, "_RUN_PAGE", 3)
    monkeypatch.setattr(merge, "PAGE", 7)
    texts = [f"{number * 7919 % 101:03}\U0001f600" for number in range(101)] + ["\ud800", "a\nb", ""]
    items = [(text, number % 3 == 0) for number, text in enumerate(texts)]
    async with SortedSpool() as sorting:
        for item in items:
            await sorting.add(*item)
        found = [item async for page in sorting.pages() for item in page]
    assert found == sorted(items)
