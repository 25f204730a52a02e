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
from granite_storage.orm.columns import AttachmentType, require_usable, slots_of

__all__ = ["guard_base", "listen", "release", "require_attachment", "require_single", "require_sound", "unlisten"]

_SEVERAL = re.compile(
    r"\b(?:list|set|frozenset|tuple|dict|List|Set|FrozenSet|Tuple|Dict|Sequence|MutableSequence|Collection|Iterable|Mapping)\["
)

_guarded: weakref.WeakSet[Mapper[Any]] = weakref.WeakSet()

# What is wrong with mappers that were declared after their base was bound: SQLAlchemy raises that once, and goes on.
_refused: weakref.WeakKeyDictionary[Mapper[Any], str] = weakref.WeakKeyDictionary()


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
            _refused.pop(mapper, None)
            for slot in slots_of(mapper):
                attribute = getattr(mapper.class_, slot.key)
                if event.contains(attribute, "set", _check):  # not so for one that was added to the class later
                    event.remove(attribute, "set", _check)


def require_single(base: Any) -> None:
    """Refuse a base that has an attribute which is said to hold several attachments, whether its mapper is configured or not.

    Raises:
        ConfigurationError: It has; nothing was guarded.
    """
    for mapper in _mappers_of(base):
        for key, column in mapper.columns.items():  # its attributes would configure it
            refusal = _refusal(mapper, key) if isinstance(column.type, AttachmentType) else None
            if refusal is not None:
                raise ConfigurationError(refusal)


def guard_base(base: Any) -> None:
    """Guard the mappers that were configured before their base was bound."""
    for mapper in _mappers_of(base):
        if mapper.configured:
            _guard(mapper)


def require_sound(mapper: Mapper[Any]) -> None:
    """Refuse a mapper that was refused when it was configured.

    Raises:
        ConfigurationError: It was, for what it says.
    """
    refusal = _refused.get(mapper) if _refused else None
    if refusal is not None:
        raise ConfigurationError(refusal)


def _mappers_of(base: Any) -> list[Mapper[Any]]:
    mappers = getattr(base, "registry", None) or getattr(base, "_sa_registry", None)
    if not isinstance(mappers, registry):
        return []
    # `mappers.mappers` raises while an abstract concrete base waits for its classes
    return [manager.mapper for manager in list(mappers._managers) if manager.is_mapped]


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
    _guarded.add(mapper)
    for slot in slots_of(mapper):
        event.listen(getattr(mapper.class_, slot.key), "set", _check, raw=True, retval=True, include_key=True)
    try:
        for slot in slots_of(mapper):
            require_usable(slot.column)
            refusal = _refusal(mapper, slot.key)
            if refusal is not None:
                raise ConfigurationError(refusal)
    except ConfigurationError as error:
        _refused[mapper] = str(error)
        raise


def _refusal(mapper: Mapper[Any], key: str) -> str | None:
    """Return what is wrong with an attribute that is said to hold several attachments: a column holds one."""
    for kind in mapper.class_.__mro__:
        annotation = vars(kind).get("__annotations__", {}).get(key)
        if annotation is not None:
            if _SEVERAL.search(annotation if isinstance(annotation, str) else _text_of(annotation)):
                return (
                    f"{mapper.class_.__name__}.{key} is annotated as several attachments, but a column holds one: give each file"
                    " a row of its own, in a table that the model has a relationship to"
                )
            return None
    return None


def _text_of(annotation: Any) -> str:
    return repr(annotation).replace("typing.", "").replace("collections.abc.", "")


def _is_bound(mapper: Mapper[Any]) -> bool:
    return any(find_binding(slot.column_type.table.metadata) is not None for slot in slots_of(mapper))


def _check(state: Any, value: Any, _: Any, initiator: Any, **__: Any) -> Any:
    require_sound(state.mapper)
    given = require_attachment(value, f"{state.class_.__name__}.{initiator.key}")
    if given is not None:
        given._state.note_assignment(state, initiator.key)
    return given
