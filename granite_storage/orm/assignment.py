"""Refusing at once, at the assignment, what an attachment attribute may not hold."""

from __future__ import annotations

import re
import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Mapper, registry

from granite_storage.exceptions import ConfigurationError, InvalidReferenceError
from granite_storage.orm._registry import find_binding
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import slots_of
from granite_storage.orm.types import require_usable

__all__ = ["guard_base", "listen", "release", "require_attachment", "unlisten"]

_SEVERAL = re.compile(
    r"\b(?:list|set|frozenset|tuple|dict|List|Set|FrozenSet|Tuple|Dict|Sequence|MutableSequence|Collection|Iterable|Mapping)\["
)

_guarded: weakref.WeakSet[Mapper[Any]] = weakref.WeakSet()


def listen() -> None:
    """Guard each mapper as it is configured, which is before its first instance."""
    event.listen(Mapper, "mapper_configured", _guard)


def unlisten() -> None:
    """Stop guarding mappers as they are configured."""
    event.remove(Mapper, "mapper_configured", _guard)


def release() -> None:
    """Guard no attribute any more whose base is not bound."""
    for mapper in list(_guarded):
        if not _is_bound(mapper):
            _guarded.remove(mapper)
            for slot in slots_of(mapper):
                attribute = getattr(mapper.class_, slot.key)
                if event.contains(attribute, "set", _check):  # not so for one that was added to the class later
                    event.remove(attribute, "set", _check)


def guard_base(base: Any) -> None:
    """Guard the mappers that were configured before their base was bound."""
    mappers = getattr(base, "registry", None) or getattr(base, "_sa_registry", None)
    if isinstance(mappers, registry):
        for manager in list(mappers._managers):  # `mappers.mappers` raises while an abstract concrete base waits for its classes
            if manager.is_mapped and manager.mapper.configured:
                _guard(manager.mapper)


def require_attachment(value: Any, label: str) -> Attachment | None:
    """Return a value that may be assigned: refs are minted by the manager, and a managed column takes attachments only.

    Raises:
        InvalidReferenceError: It is neither an attachment nor None.
    """
    if value is None or isinstance(value, Attachment):
        return value
    raise InvalidReferenceError(
        f"{label} is a managed attachment column and takes an Attachment or None, not {type(value).__name__}: write"
        " Attachment(content, filename=...), or Attachment.from_upload(upload)"
    )


def _guard(mapper: Mapper[Any], _: Any = None) -> None:
    if mapper in _guarded or not _is_bound(mapper):
        return
    for slot in slots_of(mapper):
        require_usable(slot.column)
        _require_single(mapper, slot.key)
    _guarded.add(mapper)
    for slot in slots_of(mapper):
        event.listen(getattr(mapper.class_, slot.key), "set", _check, raw=True, retval=True, include_key=True)


def _require_single(mapper: Mapper[Any], key: str) -> None:
    """Refuse an attribute that is said to hold several attachments: a column holds one."""
    for kind in mapper.class_.__mro__:
        annotation = vars(kind).get("__annotations__", {}).get(key)
        if annotation is not None:
            if _SEVERAL.search(annotation if isinstance(annotation, str) else _text_of(annotation)):
                raise ConfigurationError(
                    f"{mapper.class_.__name__}.{key} is annotated as several attachments, but a column holds one: give each file"
                    " a row of its own, in a table that the model has a relationship to"
                )
            return


def _text_of(annotation: Any) -> str:
    return repr(annotation).replace("typing.", "").replace("collections.abc.", "")


def _is_bound(mapper: Mapper[Any]) -> bool:
    return any(find_binding(slot.home.table.metadata) is not None for slot in slots_of(mapper))


def _check(state: Any, value: Any, _: Any, initiator: Any, **__: Any) -> Any:
    given = require_attachment(value, f"{state.class_.__name__}.{initiator.key}")
    if given is not None:
        given._note_assignment(state, initiator.key)
    return given
