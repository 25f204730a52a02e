"""Which binding serves which metadata: the one place where an attachment finds its manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

from granite_storage.exceptions import UnboundAttachmentError

if TYPE_CHECKING:
    from sqlalchemy import MetaData

    from granite_storage.orm._interfaces import Binding

__all__ = ["active_bindings", "add", "binding_for", "find_binding", "remove", "unbound_message"]

_bindings: list[Binding] = []


def add(binding: Binding) -> bool:
    """Enter a binding, before older ones of the same metadata; return whether it is the only one."""
    _bindings.append(binding)
    return len(_bindings) == 1


def remove(binding: Binding) -> bool:
    """Take a binding out, which brings an older one of the same metadata back; return whether it was the last one."""
    if binding not in _bindings:
        return False
    _bindings.remove(binding)
    return not _bindings


def active_bindings() -> list[Binding]:
    """Return the bindings in force: for each metadata the newest."""
    newest = {id(binding.metadata): binding for binding in _bindings}
    return list(newest.values())


def find_binding(metadata: MetaData) -> Binding | None:
    """Return the newest binding of a metadata, or None."""
    for binding in reversed(_bindings):
        if binding.metadata is metadata:
            return binding
    return None


def binding_for(metadata: MetaData, what: str) -> Binding:
    """Return the newest binding of a metadata.

    Raises:
        UnboundAttachmentError: `bind_storage` was not called for it.
    """
    binding = find_binding(metadata)
    if binding is None:
        raise UnboundAttachmentError(unbound_message(metadata, what))
    return binding


def unbound_message(metadata: MetaData, what: str) -> str:
    """Return what to do where a metadata has no binding; a base may have classes below it that have a metadata of their own."""
    bound = sorted({binding.base_name for binding in active_bindings()})
    if not bound:
        return f"{what} has no storage manager: call bind_storage(Base, manager) for its declarative base at start-up"
    return (
        f"{what} has no storage manager: its MetaData is none of those that bind_storage was called for ({', '.join(bound)});"
        " call bind_storage once more, with the class that has this MetaData"
    )
