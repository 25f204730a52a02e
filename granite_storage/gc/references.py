"""Where references come from: what a collection asks of the database, or of what the caller gave."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from granite_storage.gc.mentions import Mention
from granite_storage.gc.merge import Reference

__all__ = ["ReferenceSource"]


class ReferenceSource(Protocol):
    """All references there are, whatever their storage key."""

    @property
    def at_a_time(self) -> int:
        """How many locations `find_held` takes."""
        ...

    async def require_fit(self, *, accept_restore: bool) -> None:
        """Refuse what could not be relied on.

        Raises:
            CollectionRefusedError: The message says what, and what to do.
        """
        ...

    def in_order(self, backend: str) -> AbstractAsyncContextManager[AsyncIterator[list[Reference]]]:
        """Give all references, whatever backend they name, in the byte order of their locations, in pages; one may come twice.

        Raises:
            CollectionRefusedError: While they are read: something is no reference, or names a backend or a store that is unknown.
        """
        ...

    def find_mentions(self, locations: Sequence[str]) -> AsyncGenerator[Mention, None]:
        """Yield what mentions one of the locations, or could and cannot be looked at, by one look at everything else there is.

        A later mention is not seen, unless it is a reference. A location may be yielded several times.

        Raises:
            CollectionRefusedError: Something could not be read.
        """
        ...

    async def find_held(self, backend: str, locations: Sequence[str]) -> set[str]:
        """Return which of the locations something refers to, or is about to, or a journal knows of; read at this moment.

        A location is held, too, where something refers to another one with its generated id: that is another name of its place.
        """
        ...

    def require_complete(self, storage_keys: Sequence[str]) -> None:
        """Refuse references of one policy where others share its place, once `in_order` was read to its end.

        Raises:
            CollectionRefusedError: No reference of one of these policies was among them.
        """
        ...

    async def settle(self) -> None:
        """Return once all that `find_held` has seen can no longer be undone, by a crash of the database either."""
        ...
