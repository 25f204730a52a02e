"""A folder of another backend, as a backend."""

from __future__ import annotations

from granite_storage.backends._wrapper import WrappedBackend
from granite_storage.backends.base import Place, StorageBackend
from granite_storage.exceptions import ConfigurationError, InvalidLocationError
from granite_storage.locations import check_location, check_segment

__all__ = ["PrefixedBackend"]


class PrefixedBackend(WrappedBackend):
    """Keeps everything under one prefix of another backend, and sees nothing else of it.

    It promises what the inner backend promises, has the same abilities, and costs a string per call. Only `abort_unfinished`
    reaches further: it clears up after the unfinished writes of the whole inner backend. Its identity is that of the inner
    backend with the prefix, so that rows of another prefix are noticed.

    Args:
        inner: The backend behind. Closing this one closes it.
        prefix: Whole segments, such as `tenants/7`: `a` never sees what is under `ab`.

    Attributes:
        inner: The backend behind.
        prefix: The prefix.

    Raises:
        ConfigurationError: The prefix is empty, or a segment of it is not safe.

    Example:
        >>> import asyncio
        >>> from granite_storage.backends.memory import MemoryStorageBackend
        >>> memory = MemoryStorageBackend()
        >>> asyncio.run(PrefixedBackend(memory, "tenants/7").put_bytes("logo.png", b"..."))
        >>> asyncio.run(memory.exists("tenants/7/logo.png"))
        True
    """

    def __init__(self, inner: StorageBackend, prefix: str) -> None:
        super().__init__(inner)
        try:
            check_location(prefix)
            for segment in prefix.split("/"):
                check_segment(segment)
        except InvalidLocationError as error:
            raise ConfigurationError(f"the prefix is not safe: {error}") from error
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"PrefixedBackend({self.inner!r}, {self.prefix!r})"

    def _inside(self, location: str) -> str:
        check_location(location)
        return self._listed(location)

    def _listed(self, text: str) -> str:
        return f"{self.prefix}/{text}"

    def _outside(self, location: str) -> str:
        return location.removeprefix(f"{self.prefix}/")

    def _own_identity(self, identity: str) -> str:
        """Return an identity of the inner store with the prefix; `X//prefix` in its marker says that `X` was what is below."""
        other, is_given, below = identity.partition("//")
        if is_given and below == self.prefix:
            return other
        if is_given and below.startswith(f"{self.prefix}/"):
            return f"{other}//{below.removeprefix(f'{self.prefix}/')}"
        return f"{identity}/{self.prefix}"

    def _own_place(self, place: Place) -> Place:
        return place.below(self.prefix)
