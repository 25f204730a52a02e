"""What a manager is made of, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from granite_storage.backends.base import StorageBackend
from granite_storage.exceptions import (
    BackendError,
    ConfigurationError,
    InvalidReferenceError,
    UnknownBackendError,
    UnknownPolicyError,
)
from granite_storage.locations import check_location
from granite_storage.policies import StoragePolicy
from granite_storage.refs import StoredObjectRef

__all__ = ["Configuration", "require_positive", "require_ref", "require_seconds"]


class Configuration:
    """Backends and policies that fit together.

    Attributes:
        backends: The backends by their keys, read-only.
        policies: The policies by their storage keys, read-only.
    """

    def __init__(self, backends: Mapping[str, StorageBackend], policies: Mapping[str, StoragePolicy]) -> None:
        _require_mapping("backends", backends)
        _require_mapping("policies", policies)
        for key, backend in backends.items():
            _require_backend(key, backend)
        for key, policy in policies.items():
            _require_policy(key, policy, backends)
        self.backends: Mapping[str, StorageBackend] = MappingProxyType(dict(backends))
        self.policies: Mapping[str, StoragePolicy] = MappingProxyType(dict(policies))

    def policy(self, storage_key: str) -> StoragePolicy:
        """Return a policy; `UnknownPolicyError` where there is none of that key."""
        try:
            return self.policies[storage_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.policies)) or "none"
            raise UnknownPolicyError(f"no policy has the storage key {storage_key!r} (there are: {known})") from None

    def backend(self, backend_key: str) -> StorageBackend:
        """Return a backend; `UnknownBackendError` where there is none of that key."""
        try:
            return self.backends[backend_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.backends)) or "none"
            raise UnknownBackendError(f"no backend has the key {backend_key!r} (there are: {known})") from None

    @contextmanager
    def at(self, ref: StoredObjectRef) -> Iterator[StorageBackend]:
        """Give the backend that a ref names, once the ref is found to be one that leads nowhere else."""
        require_ref(ref)
        check_location(ref.location)
        with self.blaming(ref.backend) as backend:
            yield backend

    @contextmanager
    def blaming(self, backend_key: str) -> Iterator[StorageBackend]:
        """Give the backend, and put its key on the errors it raises: a backend does not know what it is called."""
        backend = self.backend(backend_key)
        try:
            yield backend
        except BackendError as error:
            error.backend = error.backend or backend_key
            raise


def _require_mapping(argument: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{argument} must be a mapping by key, not a {type(value).__name__}")


def require_seconds(argument: str, value: object) -> None:
    """Refuse what is no time to wait."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(f"{argument} must be a number of seconds, not {value!r}")


def require_positive(argument: str, value: object) -> None:
    """Refuse what is no number of things, of which there must be some."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{argument} must be a number of at least 1, or None, not {value!r}")


def _require_backend(key: object, backend: object) -> None:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"a backend's key must be a string that is not empty, not {key!r}")
    if isinstance(backend, type):
        raise ConfigurationError(f"the backend {key!r} is the class {backend.__name__}, not an instance of it")
    if not isinstance(backend, StorageBackend):
        raise ConfigurationError(f"the backend {key!r} is a {type(backend).__name__}, which is not a StorageBackend")


def _require_policy(key: object, policy: object, backends: Mapping[str, StorageBackend]) -> None:
    if not isinstance(policy, StoragePolicy):
        raise ConfigurationError(f"the policy {key!r} is a {type(policy).__name__}, not a StoragePolicy")
    if key != policy.storage_key:
        raise ConfigurationError(f"the policy under the key {key!r} has the storage key {policy.storage_key!r}")
    if policy.backend_key not in backends:
        raise UnknownBackendError(
            f"the policy {key!r} names the backend {policy.backend_key!r}, which is not there"
            f" (there are: {', '.join(sorted(backends)) or 'none'})"
        )


def require_ref(ref: object) -> None:
    """Refuse what was not read back as a ref."""
    if not isinstance(ref, StoredObjectRef):
        raise InvalidReferenceError(f"a StoredObjectRef is needed, not {type(ref).__name__}; see StoredObjectRef.from_dict")
