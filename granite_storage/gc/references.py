"""Where a collection reads references: the protocol, and the references that a callable returns."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, TypeAlias

from granite_storage._engine import describe_mismatch, identities_of
from granite_storage._tasks import shielded, shielded_cleanup
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.mentions import Mention
from granite_storage.gc.merge import Reference, SortedSpool, take_page
from granite_storage.locations import generated_id
from granite_storage.manager import StorageManager
from granite_storage.orm.references import named_in, references_among
from granite_storage.refs import StoredObjectRef, iter_refs


class ReferenceSource:
    """All references, whatever their storage key, for one collection of one backend's objects."""

    @property
    def batch_size(self) -> int:
        """The most locations that `find_references` takes."""
        raise NotImplementedError

    async def require_fit(self, *, allow_restored_database: bool) -> None:
        """Raise `CollectionRefusedError` if the references cannot be relied on; by default they can.

        Raises:
            CollectionRefusedError: The message says what, and what to do.
        """

    def in_order(self) -> AbstractAsyncContextManager[AsyncIterator[list[Reference]]]:
        """Yield pages of all references, whatever backend they name, in the byte order of their locations; one may come twice.

        Raises:
            CollectionRefusedError: While they are read: a value is not a reference, or names an unknown backend or store.
        """
        raise NotImplementedError

    async def find_mentions(self, locations: Sequence[str]) -> AsyncGenerator[Mention, None]:
        """Search everything else once; yield what mentions one of the locations, or may and cannot be searched.

        A later mention is not seen, unless it is a reference. A location may be yielded several times. By default there is
        nothing else to search.

        Raises:
            CollectionRefusedError: Something could not be read.
        """
        for none in tuple[Mention, ...]():
            yield none

    async def find_references(self, locations: Sequence[str]) -> set[str]:
        """Return the locations that are referenced at this moment, or are known to a journal, in one snapshot.

        A location also counts as referenced by a reference to another one with its generated id, which is another name for it.
        """
        raise NotImplementedError

    def require_complete(self, storage_keys: Sequence[str]) -> None:
        """Refuse references of one policy where others share its place, once `in_order` was read to its end; by default none.

        Raises:
            CollectionRefusedError: No reference of one of these policies was among them.
        """

    async def make_durable(self) -> None:
        """Return once all that `find_references` has seen survives a crash of the database.

        By default it is so at once: the application has committed the references.
        """


# The references of applications without attachment columns.


IterReferences: TypeAlias = Callable[
    [], Iterable[StoredObjectRef | None] | AsyncIterable[StoredObjectRef | None] | Awaitable[Iterable[StoredObjectRef | None]]
]
"""Returns all references at that moment, each with its variants; it is called several times in a collection.

An iterator that is not read to its end is closed by its `aclose` or `close`.
"""


class GivenReferences(ReferenceSource):
    """The references that a callable returns.

    Args:
        manager: The manager, which must have every backend that the refs name.
        iter_references: Returns an iterable or an async iterable of refs; None among them is skipped.
        backend: The key of the backend whose objects are collected.
    """

    def __init__(self, manager: StorageManager, iter_references: IterReferences, backend: str) -> None:
        self._manager = manager
        self._iter_references = iter_references
        self._backend = backend
        self._storage_keys: set[str] = set()

    @property
    def batch_size(self) -> int:
        """The most locations that `find_references` takes: each call reads all references."""
        return 10_000

    @asynccontextmanager
    async def in_order(self) -> AsyncIterator[AsyncIterator[list[Reference]]]:
        """Yield the locations of all references, sorted on disk."""
        self._storage_keys.clear()
        identities = await identities_of(self._manager._engine.backend(self._backend))
        async with SortedSpool() as spool:
            async with aclosing(self._refs()) as refs:
                async for ref in refs:
                    for one in iter_refs(ref):
                        is_here = one.backend == self._backend
                        self._require_understood(one, identities if is_here else None)
                        if is_here:
                            self._storage_keys.add(one.storage_key)
                        for location in _locations(one):
                            await spool.add(location, is_here)
            yield spool.pages()

    async def find_references(self, locations: Sequence[str]) -> set[str]:
        """Return the locations that are referenced now, by reading all references again."""
        wanted = {*locations, *filter(None, map(generated_id, locations))}
        held: set[str] = set()
        async with aclosing(self._refs()) as refs:
            async for ref in refs:
                named = (location for one in iter_refs(ref) for location in _locations(one))
                held.update(found for found in named if found in wanted or generated_id(found) in wanted)
        return references_among(locations, held)

    def require_complete(self, storage_keys: Sequence[str]) -> None:
        """Refuse policies that share a place, where the references of one of them are missing."""
        missing = sorted(set(storage_keys) - self._storage_keys)
        if missing:
            raise CollectionRefusedError(
                f"iter_references returned no reference of the policies {', '.join(missing)}, whose objects are in the same"
                " place: return all references, or give each policy a key_prefix of its own"
            )

    def _require_understood(self, ref: StoredObjectRef, identities: Sequence[str] | None) -> None:
        if ref.backend not in self._manager._engine.backends:
            known = ", ".join(sorted(self._manager._engine.backends))
            raise CollectionRefusedError(
                f"iter_references returned a reference to {ref.location[:120]!r} on the backend {ref.backend[:120]!r}, which the"
                f" manager does not have (there are: {known}): give the manager that backend"
            )
        if identities is not None and ref.identity is not None and ref.identity not in identities:
            mismatch = describe_mismatch(ref.backend, ref.identity, next(iter(identities), None))
            raise CollectionRefusedError(
                f"iter_references returned a reference to {ref.location[:120]!r} in another store: {mismatch}"
            )

    async def _refs(self) -> AsyncGenerator[StoredObjectRef, None]:
        given: Any = self._iter_references()
        if inspect.isawaitable(given):
            given = await given
        is_async = isinstance(given, AsyncIterable)
        items: Any = aiter(given) if is_async else iter(given)
        try:
            async for ref in items if is_async else _read_in_thread(items):
                if isinstance(ref, StoredObjectRef):
                    yield ref
                elif ref is not None:
                    raise CollectionRefusedError(
                        f"iter_references must return instances of StoredObjectRef, not a {type(ref).__name__}"
                    )
        finally:
            await shielded_cleanup(_close(items, is_async=is_async), "closing what iter_references returned")


async def _read_in_thread(items: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield what an ordinary iterator does, which may read from a database or a file, and so may block."""
    while page := await shielded(asyncio.to_thread(take_page, items)):
        for item in page:
            yield item


async def _close(items: Any, *, is_async: bool) -> None:
    """Close an iterator that can be closed, as a generator can: one that was not read to its end may hold a connection."""
    close: Callable[[], Any] | None = getattr(items, "aclose", None) or getattr(items, "close", None)
    if close is None:
        return
    closing = close() if is_async else await asyncio.to_thread(close)
    if inspect.isawaitable(closing):
        await closing


def _locations(ref: StoredObjectRef) -> Iterator[str]:
    yield ref.location
    yield from named_in(ref.extra)
