"""Which objects a policy may collect: those below its prefix, by whole segments, that are not below another policy's.

And where they are: two backends on one place are refused, by every name of it that is known, though a reference protects its
object under whatever backend it names.
"""

from __future__ import annotations

from dataclasses import dataclass

from granite_storage.backends.base import Place, StorageBackend, SupportsIdentity, SupportsPlaces, overlap
from granite_storage.exceptions import AccessDeniedError, BackendError, CollectionRefusedError, InvalidLocationError
from granite_storage.locations import check_location, matches_generated_name
from granite_storage.manager import StorageManager

__all__ = ["Territory", "identities_of", "is_valid", "may_overlap", "require_one_key"]

_SLASHES_OF_OURS = 3


@dataclass(frozen=True, slots=True)
class Territory:
    """The part of a backend that a policy's objects are in.

    Attributes:
        storage_key: The policy.
        backend: The key of the backend that it writes to.
        prefix: What its locations begin with: empty, or whole segments and a slash.
        others: What the locations of other policies begin with that lie inside; wherever those write now, their old objects may
            still be here.
        sharing: The policies that write to the very same place.
    """

    storage_key: str
    backend: str
    prefix: str
    others: tuple[str, ...]
    sharing: tuple[str, ...]

    @classmethod
    def of(cls, manager: StorageManager, storage_key: str) -> Territory:
        """Return the territory of a policy; `UnknownPolicyError` where there is none."""
        policy = manager.policy(storage_key)
        prefix = _begin(policy.key_prefix)
        begins = {key: _begin(other.key_prefix) for key, other in manager.policies.items() if key != storage_key}
        others = sorted({begin for begin in begins.values() if begin != prefix and begin.startswith(prefix)})
        sharing = sorted(
            key for key, begin in begins.items() if begin == prefix and manager.policies[key].backend_key == policy.backend_key
        )
        return cls(storage_key, policy.backend_key, prefix, tuple(others), tuple(sharing))

    def has(self, location: str) -> bool:
        """Tell whether a location is in it."""
        return location.startswith(self.prefix) and not location.startswith(self.others)

    def is_ours(self, location: str) -> bool:
        """Tell whether a location in it has the form that this library gives: model, entity, field and a generated name.

        What lies deeper may be of another program that shares the store and has a prefix of its own.
        """
        return (
            location.count("/", len(self.prefix)) == _SLASHES_OF_OURS and matches_generated_name(location) and is_valid(location)
        )


def is_valid(location: str) -> bool:
    """Tell whether a location may be used at all."""
    try:
        check_location(location)
    except InvalidLocationError:
        return False
    return True


async def require_one_key(manager: StorageManager, backend_key: str) -> None:
    """Refuse a backend whose objects another backend of the manager has, too.

    Raises:
        CollectionRefusedError: There is one.
    """
    backend = manager.backend(backend_key)
    for key, other in manager.backends.items():
        if key != backend_key and await may_overlap(backend, other):
            raise CollectionRefusedError(
                f"the backends {backend_key!r} and {key!r} lead to the same objects, so it is unknown which of them a row means:"
                " give the manager one backend for each place, with policies that have prefixes, and let all rows name that one"
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


def _begin(prefix: str | None) -> str:
    return f"{prefix}/" if prefix else ""
