"""Which store a backend leads to: the identity that new refs keep, and whether two backends have the same objects."""

from __future__ import annotations

import logging

from granite_storage.backends.base import Place, StorageBackend, SupportsIdentity, SupportsPlaces, overlap
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
)
from granite_storage.refs import StoredObjectRef

__all__ = ["Identities", "describe_mismatch", "explain_missing", "identities_of", "may_overlap"]

logger: logging.Logger = logging.getLogger("granite_storage")


class Identities:
    """The identities that new refs keep. No upload fails because a store keeps none."""

    def __init__(self) -> None:
        self._refused: set[str] = set()

    async def current(self, backend_key: str, backend: StorageBackend) -> str | None:
        """Return the identity of a backend's store, which is given one at its first use; None where it has none."""
        if backend_key in self._refused or not isinstance(backend, SupportsIdentity):
            return None
        try:
            return next(iter(await backend.identities(create=True)), None)
        except (BackendUnavailableError, ConfigurationError):
            return None  # the write will meet the same, and say so
        except StorageError as error:
            self._refused.add(backend_key)
            logger.warning(
                "the store of the backend %r can be given no identity, so refs do not say which store they are of: %s",
                backend_key,
                error,
            )
            return None


async def explain_missing(error: ObjectNotFoundError, ref: StoredObjectRef, backend: StorageBackend) -> None:
    """Complete the message of an error about a missing object, once, where the ref was written to another store."""
    if ref.identity is None or ref.identity in str(error) or not isinstance(backend, SupportsIdentity):
        return
    try:
        found = await backend.identities()
    except StorageError:
        return
    if ref.identity not in found:
        error.args = (f"{error}; {describe_mismatch(ref.backend, ref.identity, found[0] if found else None)}", *error.args[1:])


def describe_mismatch(backend_key: str, identity: str, found: str | None) -> str:
    """Say that a backend's key leads to another store than it did, and what to do."""
    written = f"it was written to the store {identity}, and the backend {backend_key!r} leads to"
    if found is None:
        return (
            f"{written} one that has no identity in its marker '.granite-storage' now: its disk is not mounted, or it is another"
            " store, which needs a key of its own"
        )
    return (
        f"{written} the store {found} now: give each store a key of its own, or, where the objects were moved, add {identity} as"
        " a line to the new store's '.granite-storage'"
    )


async def may_overlap(backend: StorageBackend, other: StorageBackend) -> bool | None:
    """Tell whether two backends lead to the same objects; None where one of them does not tell its places."""
    if backend is other:
        return True
    places, others = await _places_of(backend), await _places_of(other)
    return None if places is None or others is None else overlap(places, others)


async def identities_of(backend: StorageBackend) -> tuple[str, ...] | None:
    """Return the identities that a backend's store answers to now; None for a backend that knows none.

    Raises:
        BackendError: The store is out of reach.
    """
    if not isinstance(backend, SupportsIdentity):
        return None
    try:
        return tuple(await backend.identities())
    except AccessDeniedError:  # S3 says so also where there is none, to those who may not list
        return ()


async def _places_of(backend: StorageBackend) -> set[Place] | None:
    """Return all names of a backend's place, its identity among them: a server may be called by names that nobody can compare."""
    if not isinstance(backend, SupportsPlaces):
        return None
    places = set(await backend.places())
    try:
        identities = await identities_of(backend) or ()
    except BackendError:  # it is out of reach, and only the one that is collected has to be
        identities = ()
    for identity in identities:
        store, _, prefix = identity.partition("/")
        places.add(Place(f"identity {store}", tuple(filter(None, prefix.split("/")))))
    return places
