"""The receipt of a stored object, kept as JSON in a row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, NoReturn, Self

from granite_storage.exceptions import InfectedObjectError, InvalidReferenceError, ScanPendingError

__all__ = [
    "ReadOnlyDict",
    "ReadOnlyList",
    "StoredObjectRef",
    "canonical_checksum",
    "is_held",
    "iter_refs",
    "read_only",
    "require_scanned",
    "storable",
]

_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_DEPTH = 32
_MOST_VALUES = 10_000
_MOST_CHARACTERS = 1 << 20
_MOST_BITS = 1024
_LARGEST_SIZE = (1 << 63) - 1
_IDENTITY = "identity"
_JSON_PARTS = ("media", "scan")
PARTS = (*_JSON_PARTS, "variants", "recipe")
"""What a ref may say beside the nine fields."""


def _refuse_change(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("a stored object's ref is read-only; make a new one with dataclasses.replace()")


class _Immutable:
    """Is its own copy."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self


class ReadOnlyDict(_Immutable, dict[str, Any]):
    """A dict that cannot be changed in place: a change of a receipt would silently be lost."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class ReadOnlyList(_Immutable, list[Any]):
    """A list that cannot be changed in place."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(ReadOnlyDict, _name, _refuse_change)
for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert"):
    setattr(ReadOnlyList, _name, _refuse_change)
for _name in ("pop", "remove", "reverse", "sort"):
    setattr(ReadOnlyList, _name, _refuse_change)


class _UnknownKeys(_Immutable):
    """Holds the keys that a newer version wrote, outside the dataclass's fields, so that writing the ref again keeps them."""

    __slots__ = ("_unknown",)
    _unknown: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredObjectRef(_UnknownKeys):
    """The receipt of one stored object.

    A ref is immutable, compared by its fields, hashed by its object's address, and contains no handle and no secret.

    Attributes:
        storage_key: The policy it was written under, such as `avatars`.
        backend: The backend's key in the manager, such as `local` or `s3`.
        location: The object's address inside the backend.
        size: Bytes written.
        checksum: `sha256:<64 lower-case hex digits>`; empty if it is unknown, as in refs from other sources.
        content_type: The media type that the writer gave.
        original_filename: The client's file name, without path and control characters.
        created_at: When the object was stored: ISO 8601, UTC, microseconds.
        extra: The caller's own keys and the backend's, such as `bucket`; read-only.
        media: Properties detected from the content, such as `type`, `width` and `height`; never a client's declaration. None if
            nothing inspected it. Read-only, and like `scan` left out of the JSON if it is None.
        scan: The verdict of a virus scanner: `status` (`clean`, `pending`, `infected` or `failed`), `by` and `at`; None if it
            was not scanned.
        variants: The refs of the objects that were derived from this one, by the names of the variants; read-only. A variant
            has no variants itself. None if there are none.
        recipe: The digest of the recipe that made a variant; None for other objects.

    Refs are equal if the first nine fields are equal, whatever the others are.

    Example:
        >>> ref = StoredObjectRef("avatars", "local", "user/42/avatar/x.png", 3, "")
        >>> StoredObjectRef.from_dict(ref.to_dict()) == ref
        True
    """

    storage_key: str
    backend: str
    location: str
    size: int
    checksum: str
    content_type: str | None = None
    original_filename: str | None = None
    created_at: str | None = None
    extra: dict[str, Any] | None = None
    media: Mapping[str, Any] | None = field(default=None, compare=False)
    scan: Mapping[str, Any] | None = field(default=None, compare=False)
    variants: Mapping[str, StoredObjectRef] | None = field(default=None, compare=False)
    recipe: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_unknown", ReadOnlyDict())
        for name in ("extra", *_JSON_PARTS):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, read_only(value, name))
        if self.variants is not None:
            object.__setattr__(self, "variants", _variants(self.variants))

    @property
    def identity(self) -> str | None:
        """The identity of the store that the object was written to; None if it had none, or an older version wrote the ref.

        It is not one of the fields and is ignored in comparisons, because it does not describe the object. In the row it is
        stored beside them, under the key `identity`.
        """
        found = self._unknown.get(_IDENTITY)
        return found if isinstance(found, str) else None

    def with_identity(self, identity: str | None) -> Self:
        """Return the same ref with another identity, or with none."""
        unknown = {**self._unknown, _IDENTITY: identity}
        if identity is None:
            del unknown[_IDENTITY]
        return type(self)._rebuilt(_values_of(self), ReadOnlyDict(unknown))

    def with_variants(self, variants: Mapping[str, StoredObjectRef] | None) -> Self:
        """Return the same ref with other variants, or with none."""
        values = dict(zip(_NAMES, _values_of(self), strict=True)) | {"variants": variants or None}
        return type(self)._rebuilt(values.values(), self._unknown)

    def __hash__(self) -> int:
        return hash((self.backend, self.location))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (_values_of(self), dict(self._unknown))

    @classmethod
    def _rebuilt(cls, values: Iterable[Any], unknown: Mapping[str, Any]) -> Self:
        ref = cls(*values)
        object.__setattr__(ref, "_unknown", read_only(unknown, "an unknown key"))
        return ref

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: Any) -> Any:
        """Let pydantic take a ref that a manager has minted, and none of a client's; in JSON a ref is what `to_dict` returns.

        The schema is written out, as a dict is all that it is: this module does without pydantic.
        """
        as_json = {"type": "function-plain", "function": cls.to_dict, "when_used": "json"}
        return {"type": "function-plain", "function": {"type": "no-info", "function": _require_minted}, "serialization": as_json}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        text, optional = {"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}
        properties: dict[str, Any] = dict.fromkeys(("storage_key", "backend", "location", "checksum"), text)
        properties |= {"size": {"type": "integer", "minimum": 0}}
        properties |= dict.fromkeys(("content_type", "original_filename", "created_at"), optional)
        properties |= {"extra": {"anyOf": [{"type": "object"}, {"type": "null"}]}}
        parts = {name: {"type": "object"} for name in (*_JSON_PARTS, "variants")} | {"recipe": text}
        required = list(properties)
        return {"type": "object", "title": "StoredObjectRef", "properties": properties | parts, "required": required}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, including unknown keys that were read."""
        known = {name: getattr(self, name) for name in _FIELDS}
        parts: dict[str, Any] = {name: _plain(part) for name in _JSON_PARTS if (part := getattr(self, name)) is not None}
        if self.variants is not None:
            parts["variants"] = {name: variant.to_dict() for name, variant in self.variants.items()}
        if self.recipe is not None:
            parts["recipe"] = self.recipe
        return {**_plain(self._unknown), **known, "extra": _plain(self.extra), **parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a ref that this, an older or a newer version has written.

        Missing optional fields are None and a missing checksum is unknown. Unknown keys are kept, and `to_dict` returns them.
        The time is normalized. Locations are checked when they are used, not here.

        Raises:
            InvalidReferenceError: It is not a ref; the message names the invalid field.
        """
        if not isinstance(data, Mapping):
            raise InvalidReferenceError(f"a ref must be a mapping, not {type(data).__name__}")
        parts: dict[str, Any] = {name: data[name] for name in _JSON_PARTS if isinstance(data.get(name), Mapping)}
        if data.get("variants") is not None:
            parts["variants"] = _read_variants(data["variants"])
        if isinstance(data.get("recipe"), str):
            parts["recipe"] = data["recipe"]
        ref = cls(
            storage_key=_text(data, "storage_key"),
            backend=_text(data, "backend"),
            location=_text(data, "location"),
            size=_size(data.get("size")),
            checksum=_checksum(data.get("checksum")),
            content_type=_optional_text(data, "content_type"),
            original_filename=_optional_text(data, "original_filename"),
            created_at=_timestamp(data.get("created_at")),
            extra=_extra(data.get("extra")),
            **parts,
        )
        unknown = {key: value for key, value in data.items() if key not in _FIELDS and key not in parts}
        object.__setattr__(ref, "_unknown", read_only(unknown, "an unknown key"))
        return ref


_NAMES = tuple(item.name for item in fields(StoredObjectRef))
_FIELDS = tuple(name for name in _NAMES if name not in PARTS)
_values_of: Callable[[StoredObjectRef], tuple[Any, ...]] = attrgetter(*_NAMES)


def _require_minted(value: object) -> StoredObjectRef:
    if not isinstance(value, StoredObjectRef):
        raise ValueError("a StoredObjectRef comes from a StorageManager or from a column of refs, never from a client")
    return value


def require_scanned(ref: StoredObjectRef) -> None:
    """Raise an error if a scanner has not scanned an object yet, or has found something in it.

    Raises:
        ScanPendingError: It is held back until it is judged.
        InfectedObjectError: Something was found in it.
    """
    if ref.scan is None:
        return
    match ref.scan.get("status"):
        case "clean" | "failed":  # a policy that accepts what could not be scanned has accepted it
            return
        case "infected":
            raise InfectedObjectError(f"a virus scanner has found something in the object {ref.location!r}, which is not served")
        case _:
            raise ScanPendingError(f"the object {ref.location!r} is not served until a virus scanner has scanned it")


def is_held(ref: StoredObjectRef) -> bool:
    """Return whether an object is held back until a scanner has judged it."""
    return ref.scan is not None and ref.scan.get("status") == "pending"


def iter_refs(ref: StoredObjectRef) -> Iterator[StoredObjectRef]:
    """Yield every object that a ref names: its own, and those of its variants.

    Whatever deletes, keeps, moves or counts the objects of a value goes through this function, or through
    `granite_storage.orm.columns.variants_in` in SQL, so that no variant is forgotten.
    """
    yield ref
    if ref.variants is not None:
        yield from ref.variants.values()


def canonical_checksum(checksum: object) -> str:
    """Return a checksum in the form that refs hold, `sha256:` and 64 lower-case hex digits.

    Raises:
        InvalidReferenceError: It is of another algorithm or not a checksum at all.
    """
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum.lower()):
        raise InvalidReferenceError(f"checksum must be 'sha256:' and 64 hex digits, not {_shown(checksum)}")
    return checksum.lower()


def read_only(value: Mapping[str, Any], name: str) -> ReadOnlyDict:
    """Return a read-only copy of a mapping of JSON values, bounded in depth and size.

    Raises:
        InvalidReferenceError: It holds something that JSON does not, is nested too deeply, or is too large.
    """
    if isinstance(value, ReadOnlyDict):
        return value
    if not isinstance(value, Mapping):
        raise InvalidReferenceError(f"{name} must be a mapping, not {type(value).__name__}")
    frozen: ReadOnlyDict = _Freezer(name).freeze(value, 0)
    return frozen


_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


def storable(value: Mapping[str, Any], name: str) -> ReadOnlyDict:
    """Do as `read_only`, and refuse what PostgreSQL cannot store in JSON, on every database.

    Raises:
        InvalidReferenceError: As `read_only`, or a text contains a NUL character or a lone surrogate.
    """
    kept = read_only(value, name)
    if any(_UNSTORABLE.search(text) for text in _texts(kept)):
        raise InvalidReferenceError(f"{name} contains a NUL character or a lone surrogate, which PostgreSQL cannot store in JSON")
    return kept


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield key
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


class _Freezer:
    """Copies JSON values into read-only ones, within the bounds of one ref."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values_left = _MOST_VALUES
        self.characters_left = _MOST_CHARACTERS

    def freeze(self, value: Any, depth: int) -> Any:
        self.values_left -= 1
        if depth > _MOST_DEPTH or self.values_left < 0:
            raise InvalidReferenceError(f"{self.name} has more than {_MOST_VALUES} values or {_MOST_DEPTH} levels")
        match value:
            case str():
                return self._counted(value)
            case Mapping():
                return ReadOnlyDict({self._key(key): self.freeze(item, depth + 1) for key, item in value.items()})
            case list() | tuple():
                return ReadOnlyList([self.freeze(item, depth + 1) for item in value])
            case None | bool():
                return value
            case int() if value.bit_length() <= _MOST_BITS:
                return value
            case float() if math.isfinite(value):
                return value
            case int():
                raise InvalidReferenceError(f"{self.name} holds an integer of {value.bit_length()} bits, more than {_MOST_BITS}")
            case float():
                raise InvalidReferenceError(f"{self.name} holds {value!r}, which JSON cannot represent")
            case _:
                raise InvalidReferenceError(
                    f"{self.name} holds a value of type {type(value).__name__} that JSON cannot represent"
                )

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise InvalidReferenceError(f"{self.name} has a key that is not a string: {_shown(key)}")
        return self._counted(key)

    def _counted(self, text: str) -> str:
        self.characters_left -= len(text)
        if self.characters_left < 0:
            raise InvalidReferenceError(f"{self.name} has more than {_MOST_CHARACTERS} characters")
        return text


def _rebuild(values: Iterable[Any], unknown: Mapping[str, Any]) -> StoredObjectRef:
    return StoredObjectRef._rebuilt(values, unknown)


def _plain(value: Any) -> Any:
    match value:
        case str() | None:
            return value
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _variants(variants: Mapping[str, StoredObjectRef]) -> ReadOnlyDict:
    """Return a read-only copy of the variants of a ref, which have no variants of their own."""
    if isinstance(variants, ReadOnlyDict):
        return variants
    for name, variant in variants.items():
        if not isinstance(name, str) or not name or not isinstance(variant, StoredObjectRef):
            raise InvalidReferenceError(f"variants maps names to refs, not {_shown(name)} to {_shown(variant)}")
        if variant.variants is not None:
            raise InvalidReferenceError(f"the variant {_shown(name)} has variants of its own")
    return ReadOnlyDict(variants)


def _read_variants(value: object) -> dict[str, StoredObjectRef]:
    """Read the variants in the JSON of a ref.

    Unlike other parts, these are not passed over where this version cannot read them: their objects would be taken for orphans.
    """
    if not isinstance(value, Mapping):
        raise InvalidReferenceError(f"variants must be a mapping, not {type(value).__name__}")
    variants: dict[str, StoredObjectRef] = {}
    for name, data in value.items():
        if isinstance(data, Mapping) and data.get("variants") is not None:
            raise InvalidReferenceError(f"the variant {_shown(name)} has variants of its own")
        try:
            variants[name] = StoredObjectRef.from_dict(data)
        except InvalidReferenceError as error:
            raise InvalidReferenceError(f"the variant {_shown(name)} is not a ref: {error}") from error
    return variants


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidReferenceError(f"{name} must be a non-empty string, not {_shown(value)}")
    return value


def _optional_text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidReferenceError(f"{name} must be a string or null, not {_shown(value)}")
    return value


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_SIZE:
        raise InvalidReferenceError(f"size must be a number of bytes, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """Return a value for a message; of a nested value or a long number, only its type."""
    match value:
        case str():
            return repr(value[:120])
        case None | bool() | float():
            return repr(value)
        case int() if value.bit_length() <= _MOST_BITS:
            return repr(value)[:120]
        case _:
            return type(value).__name__


def _checksum(value: object) -> str:
    return "" if value is None or value == "" else canonical_checksum(value)


def _extra(value: object) -> dict[str, Any] | None:
    return None if value is None else read_only(value, "extra")  # type: ignore[arg-type]  # checked there


def _timestamp(value: object) -> str | None:
    if value is None:
        return None
    try:
        return canonical_timestamp(_moment(value))
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidReferenceError(f"created_at must be an ISO 8601 time, not {_shown(value)}") from error


def _moment(value: object) -> datetime:
    match value:
        case bool():
            raise ValueError("a boolean is not a time")
        case int() | float():
            return datetime.fromtimestamp(value, UTC)
        case str():
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        case _:
            raise ValueError("neither a string nor a number")


def canonical_timestamp(moment: datetime) -> str:
    """Return an aware time in the one form that refs hold: UTC, with microseconds."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
