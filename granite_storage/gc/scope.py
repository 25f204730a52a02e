"""Which objects a collection may touch: those below the policy's prefix, by whole segments, and not below another policy's.

Two backends of a manager on one place are refused, by every name of it that is known, though a reference protects its object
whatever backend it names.
"""

from __future__ import annotations

from dataclasses import dataclass

from granite_storage._engine import may_overlap
from granite_storage.exceptions import CollectionRefusedError, InvalidLocationError
from granite_storage.locations import check_location, matches_generated_name
from granite_storage.manager import StorageManager

__all__ = ["CollectionScope", "is_valid", "require_one_key"]

_SLASHES_OF_OURS = 3


@dataclass(frozen=True, slots=True)
class CollectionScope:
    """What a collection may touch: the part of a backend that a policy's objects are in.

    Attributes:
        storage_key: The policy.
        backend: The key of the backend that it writes to.
        prefix: What its locations begin with: empty, or whole segments and a slash.
        others: The prefixes of other policies inside of it; wherever those write now, their old objects may still be here.
        sharing: The policies that write to the same place.
    """

    storage_key: str
    backend: str
    prefix: str
    others: tuple[str, ...]
    sharing: tuple[str, ...]

    @classmethod
    def of(cls, manager: StorageManager, storage_key: str) -> CollectionScope:
        """Return the scope of a policy; raise `UnknownPolicyError` for an unknown one."""
        policy = manager.policy(storage_key)
        prefix = _as_prefix(policy.key_prefix)
        begins = {key: _as_prefix(other.key_prefix) for key, other in manager.policies.items() if key != storage_key}
        others = sorted({begin for begin in begins.values() if begin != prefix and begin.startswith(prefix)})
        sharing = sorted(
            key for key, begin in begins.items() if begin == prefix and manager.policies[key].backend_key == policy.backend_key
        )
        return cls(storage_key, policy.backend_key, prefix, tuple(others), tuple(sharing))

    def has(self, location: str) -> bool:
        """Tell whether a location is in it."""
        return location.startswith(self.prefix) and not location.startswith(self.others)

    def manages(self, location: str) -> bool:
        """Tell whether a location in it has the form that this library generates: model, entity, field and a generated name.

        A deeper location may belong to another program that shares the store and has a prefix of its own.
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
    """Refuse a backend that shares its objects with another backend of the manager.

    Raises:
        CollectionRefusedError: Another backend leads to the same objects.
    """
    backend = manager.backend(backend_key)
    for key, other in manager.backends.items():
        if key != backend_key and await may_overlap(backend, other):
            raise CollectionRefusedError(
                f"the backends {backend_key!r} and {key!r} lead to the same objects, so it is unknown which of them a row refers"
                " to: give the manager one backend for each place, each policy a prefix, and all rows the key of that backend"
            )


def _as_prefix(prefix: str | None) -> str:
    return f"{prefix}/" if prefix else ""
