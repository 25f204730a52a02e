"""Several files of one row, in an order: a generated table of files, and the list that its relationship loads."""

from __future__ import annotations

import math
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, SupportsIndex, TypeAlias, cast

from sqlalchemy import JSON, BigInteger, Column, ForeignKeyConstraint, Integer, Table, Text, UniqueConstraint, func, select
from sqlalchemy import cast as sql_cast
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import (
    InstanceState,
    Mapped,
    Mapper,
    PassiveFlag,
    Relationship,
    RelationshipProperty,
    Session,
    aliased,
    object_session,
    registry,
    relationship,
)
from sqlalchemy.orm.attributes import instance_dict, instance_state
from sqlalchemy.orm.collections import collection
from sqlalchemy.orm.exc import DetachedInstanceError

from granite_storage._documentation import Page
from granite_storage._engine import require_positive
from granite_storage._words import count_of
from granite_storage.derived import Effect, Recipe
from granite_storage.exceptions import CollectionFullError, ConfigurationError
from granite_storage.inspection.base import Validator
from granite_storage.orm._util import connection_of
from granite_storage.orm.attachment import Attachment, LazySerializer, UploadFile, core_schema_of, fields_schema, instance_schema
from granite_storage.orm.columns import READ_ONLY_FOR_DTOS, AttachmentType, primary_key_of, value_in
from granite_storage.orm.locking import read_rows, take_write_lock
from granite_storage.streams import ByteSource

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema
    from sqlalchemy import ColumnElement, Connection
    from sqlalchemy.orm import InstrumentedAttribute, QueryableAttribute


# The keys by which the files of a row are ordered.
#
# A file that is appended gets the time, so that no transaction needs the rows of another one: two of them never wait for each
# other, and neither is lost. A file that is moved gets a key between those of its neighbours. Equal keys are ordered by the
# primary key, so that the order is total whatever is written concurrently.


_TICKS = 1 << 20
"""In a millisecond: 63 bits are enough until the year 2248."""
_STEP = 1 << 16
"""Between files that are appended at once: so often can the room between two be halved before neighbours get new keys."""
_DAY = 86_400_000 * _TICKS  # clocks differ by less: a key that is further ahead is a mistake, and concerns its list only
_SMALLEST, _LARGEST = -(1 << 63), (1 << 63) - 1
_lock = threading.Lock()
_latest = 0


def _next_position(after: int = 0) -> int:
    """Return a key after all that this process has made, and after another one."""
    global _latest
    with _lock:
        now = time.time_ns() // 1_000_000 * _TICKS
        _latest = max(now, _latest + _STEP, min(after, now + _DAY) + _STEP)
        return min(max(_latest, after + _STEP), _LARGEST)


def _arrange(files: Sequence[AttachedFile]) -> None:
    """Give as few files as possible another key, so that the keys increase in the order of the list."""
    if not all(isinstance(file, AttachedFile) for file in files):
        return  # no instance has the list yet; its assignment makes the rows
    if len(set(files)) < len(files):
        return  # an exchange is half done; the flush arranges what it has led to
    known = {i: key for i, file in enumerate(files) if (key := _position_of(file)) is not None}
    kept = _longest_increasing(known)
    start = 0
    while start < len(files):
        if start in kept:
            start += 1
            continue
        stop = next((i for i in range(start, len(files)) if i in kept), len(files))
        start, stop, positions = _between(files, start, stop)
        for file, position in zip(files[start:stop], positions, strict=True):
            file.position = position
        start = stop


def _between(files: Sequence[AttachedFile], start: int, stop: int) -> tuple[int, int, Iterable[int]]:
    """Return keys for a part of a list between those of its neighbours; a neighbour without room becomes a member of the part."""
    while True:
        low = _position_of(files[start - 1]) if start else None
        high = _position_of(files[stop]) if stop < len(files) else None
        count = stop - start
        if high is None:
            return start, stop, [low := _next_position(low or 0) for _ in range(count)]
        if low is None:
            if high - count * _STEP >= _SMALLEST:
                return start, stop, range(high - count * _STEP, high, _STEP)
            stop += 1
            continue
        step = (high - low) // (count + 1)
        if step > 0:
            return start, stop, range(low + step, low + step * (count + 1), step)
        start, stop = max(start - 1, 0), min(stop + 1, len(files))


def _longest_increasing(keys: Mapping[int, int]) -> set[int]:
    """Return the indices of as many files as possible that are in the order of their keys already; equal keys are in none."""
    tails: list[tuple[int, int, Any]] = []  # by length: the last key of files in order, the smallest, its index, and those before
    for index, key in keys.items():
        length = bisect_left(tails, (key,))
        tails[length : length + 1] = [(key, index, tails[length - 1] if length else None)]
    kept: set[int] = set()
    last = tails[-1] if tails else None
    while last is not None:
        kept.add(last[1])
        last = last[2]
    return kept


def _is_ordered(files: Iterable[AttachedFile]) -> bool:
    """Return whether the keys that are known are in the order of the files."""
    latest: tuple[float, float] = (0, 0)
    for file in files:
        position, identity = _position_of(file), _id_of(file)
        if position is None and identity is not None:
            continue
        key = (position or 0, math.inf if identity is None else identity)
        if position is None or key <= latest:
            return False
        latest = key
    return True


def _position_of(file: AttachedFile) -> int | None:
    """Return the key of a file where it is known: an expired one is not loaded, which an async application could not await."""
    position: int | None = instance_dict(file).get("position")
    return position


def _id_of(file: AttachedFile) -> int | None:
    identity = instance_state(file).identity
    return None if identity is None else cast(int, identity[0])


# The files and their list.


class AttachedFile:
    """A file of a collection: a row of the table that `attachments` generates, of a class that `file_class` returns.

    Attributes:
        id: The primary key.
        file: The attachment; assign another one to replace the file, which displaces this object only.
        position: The key by which the files of a parent are ordered; not an index. Change the order by the list.
        caption: A text of your own, or None.
        extra: A JSON object of your own, or None. Assign another one to change it: changes within it are not tracked.
        parent: The instance that the file belongs to. Columns named `parent_<column>` are its foreign key.

    Args:
        file: An attachment, bytes, or an uploaded file.
        caption: The caption.
        extra: The JSON object.
        **values: Values of other attributes, such as `parent_id`.
    """

    __pydantic_serializer__: ClassVar[Any] = LazySerializer()
    _declared: ClassVar[_Declared]
    if TYPE_CHECKING:
        id: Mapped[int]
        file: Mapped[Attachment]
        position: Mapped[int]
        caption: Mapped[str | None]
        extra: Mapped[dict[str, Any] | None]
        parent: Mapped[Any]

    def __init__(
        self, file: NewFile, *, caption: str | None = None, extra: Mapping[str, Any] | None = None, **values: Any
    ) -> None:
        unknown = [name for name in values if not hasattr(type(self), name)]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no attribute {unknown[0]!r}")
        for name, value in {"file": _as_attachment(file), "caption": caption, "extra": extra, **values}.items():
            setattr(self, name, value)

    def copy(self) -> Self:
        """Return a new row with the same file, caption and `extra`; the flush copies its object."""
        return type(self)(self.file, caption=self.caption, extra=self.extra)

    def describe(self) -> dict[str, Any]:
        """Return the fields that a client may see, for encoders: the primary key, the caption, and the fields of the file."""
        return {"id": self.id, "caption": self.caption, "file": self.file.describe()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield the result of `describe` as pairs, for `dict(file)`; an encoder that follows `parent` would never end."""
        yield from self.describe().items()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        def show(file: AttachedFile) -> dict[str, Any]:
            return {"id": file.id, "caption": file.caption, "file": file.file}

        serialization = core_schema.plain_serializer_function_ser_schema(
            show, return_schema=shown_file(core_schema_of(Attachment)), when_used="json"
        )
        return instance_schema(cls, serialization)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(shown_file(fields_schema())), "title": "AttachedFile"}

    def __repr__(self) -> str:
        values = instance_dict(self)
        return f"<{type(self).__name__} id={values.get('id')!r} file={values.get('file')!r}>"


NewFile: TypeAlias = AttachedFile | Attachment | ByteSource | UploadFile
"""What can be added to a list: a row, an attachment, bytes, a stream, or what a web framework passes for a file of a form."""


def shown_file(file: CoreSchema) -> CoreSchema:
    """Return the pydantic schema of what a response shows of a file of a collection, given that of its attachment."""
    from pydantic_core import core_schema

    caption = core_schema.nullable_schema(core_schema.str_schema())
    fields = {"id": core_schema.int_schema(), "caption": caption, "file": file}
    return core_schema.typed_dict_schema({name: core_schema.typed_dict_field(schema) for name, schema in fields.items()})


def _as_attachment(file: NewFile) -> Attachment:
    if isinstance(file, Attachment):
        return file
    if isinstance(file, AttachedFile):
        raise TypeError(f"a new row cannot be created from an existing one: use copy() of {file!r}, or its .file")
    content: Any = file
    return Attachment(content) if isinstance(content, bytes | bytearray | memoryview) else Attachment.from_upload(content)


class AttachmentList(list[AttachedFile]):
    """The files of a row in their order; each is an `AttachedFile`, a row of the files' table.

    It is the list of a relationship of SQLAlchemy, with every operation of `list`. What is added may be an attachment, bytes or
    an uploaded file as well, for which a row is made. What is removed is deleted with its file, unless it is added to the same
    collection of another parent, which moves the row.

    The flush looks at what the list holds then, so the steps of an exchange such as `files[0], files[1] = files[1], files[0]`
    lose nothing. An element that the list holds several times is one row, at the first of its places.

    Args:
        files: What the list holds at first, for an assignment such as `album.photos = AttachmentList([...])`.
    """

    def __init__(self, files: Iterable[NewFile] = (), /) -> None:
        super().__init__(cast(Iterable[AttachedFile], files))

    def append(self, file: NewFile) -> None:
        """Add a file at the end.

        Raises:
            EmptyUploadError: It is a file input that was left empty; `extend` leaves those out.
        """
        super().append(cast(AttachedFile, file))

    def insert(self, index: SupportsIndex, file: NewFile) -> None:
        """Add a file before the one at an index."""
        super().insert(index, cast(AttachedFile, file))

    def extend(self, files: Iterable[NewFile]) -> None:
        """Add files at the end, such as those of an `<input type="file" multiple>`; empty inputs are skipped."""
        for file in list(files):
            if isinstance(file, AttachedFile | Attachment | bytes | bytearray | memoryview):
                self.append(file)
            elif (given := Attachment.from_optional_upload(cast(Any, file))) is not None:
                self.append(given)

    def __setitem__(self, index: Any, file: Any) -> None:
        """Put another row in the place of one, which is deleted; `files[i].file = ...` replaces the file and keeps the row."""
        super().__setitem__(index, file)

    def sort(self, *, key: Callable[[AttachedFile], Any] | None = None, reverse: bool = False) -> None:
        """Sort the files; only those whose positions change are written."""
        super().sort(key=cast(Any, key), reverse=reverse)
        _arrange(self)

    def reverse(self) -> None:
        """Reverse the order of the files."""
        super().reverse()
        _arrange(self)

    def move(self, file: AttachedFile, index: int) -> None:
        """Move a file to an index: `files[index]` is the file afterwards, also for a negative index, such as -1 for the end.

        An index beyond an end of the list means that end.

        Raises:
            ValueError: It is not in the list.
        """
        files = [other for other in self if other is not file]
        if len(files) == len(self):
            raise ValueError(f"{file!r} is not in the list")
        files.insert(max(index + len(files) + 1, 0) if index < 0 else index, file)
        list.__setitem__(self, slice(None), files)
        _arrange(self)

    def reorder(self, ids: Iterable[int | str]) -> None:
        """Order the files by their primary keys in `ids`, as a page sends them after a drag, as numbers or as texts.

        Files that are not named follow in their order, such as those that were added meanwhile. An id that is not in the list,
        such as that of a file that was deleted meanwhile, is ignored. An id that is named twice counts at its first place.
        """
        ranks = {identity: rank for rank, identity in enumerate(dict.fromkeys(map(str, ids)))}
        self.sort(key=lambda file: ranks.get(str(_id_of(file)), len(ranks)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        files = core_schema.list_schema(handler.generate_schema(AttachedFile))
        serialization = core_schema.plain_serializer_function_ser_schema(list, return_schema=files, when_used="json")
        return instance_schema(cls, serialization)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        from pydantic_core import core_schema

        return {"type": "array", "items": AttachedFile.__get_pydantic_json_schema__(core_schema.any_schema(), handler)}


cast(Any, collection).internally_instrumented(AttachmentList.extend)  # SQLAlchemy would replace it by one that appends everything


# The declaration.


_INFO_KEY = "granite_storage.collection"


@dataclass(eq=False)
class _Declared:
    """What `attachments` declares, and what is generated for it once the table of the model is known."""

    column_type: Callable[[], AttachmentType]
    table_name: str | None
    max_files: int | None
    max_total_size: int | None
    label: str = ""
    key: str = ""
    parent: Table | None = None
    file_class: type[AttachedFile] | None = None
    # By the columns of the parent's primary key: the attributes that refer to them.
    links: dict[Column[Any], str] = field(default_factory=dict)

    def generate(self, key: str, mapper: Mapper[Any]) -> None:
        """Map the class of the files."""
        parent, table = mapper.class_, mapper.local_table
        self.key, self.label = key, f"{parent.__name__}.{key}"
        if not isinstance(table, Table):
            raise ConfigurationError(f"{self.label} needs a model that is mapped to a table, not to {table!r}")
        self.parent = table
        self.links = {column: f"parent_{column.name}" for column in table.primary_key}
        self.file_class = made = _make_class(parent, self, mapper.registry)
        mapper.registry.map_imperatively(
            made,
            self._make_table(table),
            properties={"parent": relationship(mapper, back_populates=key)},
            confirm_deleted_rows=False,  # the database, or another transaction, may have deleted them with their parent
        )
        # SQLAlchemy's own listeners are added when the mapper is configured, and take rows only: ours have to come first.
        sqlalchemy_event.listen(mapper, "before_mapper_configured", self._listen)
        if self.max_files is not None or self.max_total_size is not None:
            _limited.add(made)
        file_classes.add(made)
        _declared_by.clear()

    def _make_table(self, parent: Table) -> Table:
        names = list(self.links.values())
        return Table(
            self.table_name or f"{parent.name}_{self.key}",
            parent.metadata,
            Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
            *(Column(name, column.type, nullable=False) for column, name in self.links.items()),
            Column("position", BigInteger, nullable=False, default=_next_position),
            Column("file", self.column_type(), nullable=False),
            Column("caption", Text),
            Column("extra", JSON(none_as_null=True)),
            ForeignKeyConstraint(names, list(self.links), ondelete="CASCADE"),
            # An index that is created and dropped with its table, as MariaDB requires of one that a foreign key uses.
            UniqueConstraint(*names, "position", "id"),
            schema=parent.schema,
            sqlite_autoincrement=True,  # SQLite would give the id of a file that was deleted to the next one
        )

    def _listen(self, mapper: Mapper[Any], _: Any) -> None:
        attribute = getattr(mapper.class_, self.key)
        sqlalchemy_event.listen(attribute, "append", self._on_append, retval=True, raw=True, propagate=True)
        sqlalchemy_event.listen(attribute, "bulk_replace", self._on_replace, raw=True, propagate=True)

    def _on_append(self, state: InstanceState[Any], value: Any, _: Any) -> AttachedFile:
        """Make a row of what is not one, at the end, whether the list is loaded or not; the flush arranges a list that is."""
        file = self.as_file(value)
        file.position = _next_position()
        return file

    def _on_replace(self, state: InstanceState[Any], values: list[Any], _: Any) -> None:
        values[:] = map(self.as_file, values)

    def keep(self, session: Session, state: InstanceState[Any]) -> None:
        """Make the elements of a parent's list rows of it, in their order, whatever the events of the list have done to them."""
        listed: list[AttachedFile] | None = state.dict.get(self.key)
        pending = None if listed is not None else state._pending_mutations.get(self.key)
        added: Iterable[AttachedFile] = pending.added_items if pending is not None else ()
        files = [file for file in dict.fromkeys(added if listed is None else listed) if self._keep_file(session, state, file)]
        if listed is not None and not _is_ordered(files):
            _arrange(files)

    def _keep_file(self, session: Session, parent: InstanceState[Any], file: AttachedFile) -> bool:
        """Undo what the removal of a listed element has done; return False if it is not, or no longer, of this parent."""
        state = instance_state(file)
        if state.key is not None and file not in session:
            return False  # an earlier flush has deleted it
        if state.dict.get("parent", parent.obj()) not in (None, parent.obj()):
            return False
        if "parent" in state.dict:
            state.dict["parent"] = parent.obj()  # without events, which would add it to the list
        # A removal marks the element as an orphan, and takes a new one out of the session.
        cast(Any, parent.manager[self.key].impl).sethasparent(state, parent, True)
        if file not in session or (file in session.deleted and self._is_moved(state, parent)):
            session.add(file)
        return True

    def _is_moved(self, state: InstanceState[Any], parent: InstanceState[Any]) -> bool:
        """Return whether the row of a file belongs to another parent than its list."""
        keys = [state.dict.get(name) for name in self.links.values()]
        return tuple(keys) != primary_key_of(parent, cast(Table, self.parent))

    def require(self, count: int, total_size: int) -> None:
        """Raise `CollectionFullError` if a parent may not have so many files or bytes."""
        if self.max_files is not None and count > self.max_files:
            raise CollectionFullError(
                f"{self.label} takes at most {count_of(self.max_files, 'file')}, and there would be {count}",
                max_files=self.max_files,
            )
        if self.max_total_size is not None and total_size > self.max_total_size:
            raise CollectionFullError(
                f"{self.label} takes at most {self.max_total_size} bytes in all, and there would be {total_size}",
                max_total_size=self.max_total_size,
            )

    def as_file(self, value: Any) -> AttachedFile:
        """Return a row of this collection.

        Raises:
            TypeError: It is neither one nor what one can be made of.
        """
        made = self.file_class
        assert made is not None  # noqa: S101  # there is no attribute before
        if isinstance(value, AttachedFile) and not isinstance(value, made):
            raise TypeError(f"{self.label} takes rows of {made.__name__}, not of {type(value).__name__}: add its .file instead")
        return value if isinstance(value, made) else made(value)


def _make_class(parent: type[Any], declared: _Declared, registry: registry) -> type[AttachedFile]:
    """Return the class of the files, as an attribute of that of their parent, where pickles find it."""
    name = f"{parent.__name__}{''.join(part.capitalize() for part in declared.key.split('_'))}File"
    known = registry._class_registry.get(name)
    if name in vars(parent) or (isinstance(known, type) and not issubclass(known, AttachedFile)):
        raise ConfigurationError(
            f"the class of the files of {declared.label} is named {name}, which is the name of another class: rename that one, or"
            f" the attribute {declared.key!r}",
            see=Page.COLLECTIONS,
        )
    names = {"__module__": parent.__module__, "__qualname__": f"{parent.__qualname__}.{name}"}
    made = type(name, (AttachedFile,), {**names, "__doc__": f"A file of `{declared.label}`.", "_declared": declared})
    setattr(parent, name, made)
    return made


class _Comparator(RelationshipProperty.Comparator[Any]):
    """Generates the table: SQLAlchemy makes it when it adds the attribute to a mapped class, whose table is known then."""

    def __init__(self, prop: RelationshipProperty[Any], parentmapper: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(prop, parentmapper, *args, **kwargs)
        self.declared_collection: _Declared = prop.info[_INFO_KEY]
        if self.declared_collection.file_class is None:
            self.declared_collection.generate(prop.key, parentmapper)

    @property
    def type(self) -> AttachmentType:
        """The type of the column of files, so that the attribute can be named where an attachment column can."""
        return cast(AttachmentType, cast(Any, self.declared_collection.file_class).file.type)


_OWN_MODEL = "for files that are loaded in another way, declare the model of the files and the relationship yourself"
_REFUSED = {
    "argument": "the class of the files is generated",
    "back_populates": "the files have an attribute 'parent'",
    "backref": "the files have an attribute 'parent'",
    "cascade": "a file that is removed from its list is always deleted; delete fewer by moving them to another parent first",
    "collection_class": "the collection is always an AttachmentList",
    "comparator_factory": "the attribute has a comparator of its own",
    "lazy": f"an AttachmentList is loaded as a whole. append_files() adds files without loading it; {_OWN_MODEL}",
    "order_by": "the files are ordered by their positions; sort() and reorder() change them, and queries may order otherwise",
    "secondary": "the files refer to their parent by a foreign key",
    "uselist": "for a single file, declare the column as Mapped[Attachment] = attachment(...)",
    "viewonly": f"the list decides which files there are; {_OWN_MODEL}",
}
"""What to do instead, by the arguments of `relationship` that a collection does not take."""
_REFUSED_VALUES: dict[str, tuple[object, ...]] = {
    "lazy": ("dynamic", "write_only", "noload"),
    "uselist": (False,),
    "viewonly": (True,),
}
"""Where only some values are refused."""


def attachments(
    storage_key: str,
    *,
    max_files: int | None = None,
    max_total_size: int | None = None,
    entity_id: Callable[[Any], str] | None = None,
    validate: Validator | None = None,
    variants: Mapping[str, Recipe] | None = None,
    effects: Mapping[str, Effect] | None = None,
    table_name: str | None = None,
    **relationship_arguments: Any,
) -> Relationship[Any]:
    """Declare an ordered collection of files: the attribute of a model, annotated as `Mapped[AttachmentList]`.

    A table of the files is generated beside that of the model, with its class and the relationship. It has the columns `id`,
    `parent_<column>` for each column of the model's primary key, `position`, `file`, `caption` and `extra`; its foreign key has
    ON DELETE CASCADE. It is an ordinary table of the metadata: `bind_storage`, migrations and garbage collection know it.

    Args:
        storage_key: The policy that new files are stored under.
        max_files: The most files of one parent; None for no limit.
        max_total_size: The most bytes of all files of one parent, without their variants; None for no limit.
        entity_id: Given the row of a file, returns the segment of the location that names it; None for the primary key.
        validate: As for `attachment`.
        variants: As for `attachment`.
        effects: As for `attachment`.
        table_name: The name of the generated table; None for `<table>_<attribute>`.
        **relationship_arguments: Further arguments of `relationship`, such as `lazy="selectin"`, or `init=False` in a dataclass.

    Raises:
        ConfigurationError: As `attachment`; or a limit is not a positive number; or an argument of `relationship` is not
            supported, such as `order_by`. When the model is made: another class has the name of the generated one.
        CollectionFullError: At a flush that adds files, moves them to a parent or replaces them: there would be more than the
            limits allow. Nothing of the flush is kept.

    Example:
        ```python
        class Album(Base):
            __tablename__ = "albums"
            id: Mapped[int] = mapped_column(primary_key=True)
            photos: Mapped[AttachmentList] = attachments("photos", max_files=20)
        ```
    """
    for name, limit in {"max_files": max_files, "max_total_size": max_total_size}.items():
        if limit is not None:
            require_positive(name, limit)

    def column_type() -> AttachmentType:
        return AttachmentType(storage_key, entity_id=entity_id, validate=validate, variants=variants, effects=effects)

    column_type()  # raises where its arguments are wrong, in the line that has them
    for name, value in relationship_arguments.items():
        if name in _REFUSED and (_REFUSED_VALUES.get(name) is None or value in _REFUSED_VALUES[name]):
            raise ConfigurationError(
                f"attachments(..., {name}={value!r}) is not supported: {_REFUSED[name]}", see=Page.COLLECTIONS
            )
    declared = _Declared(column_type, table_name, max_files, max_total_size)
    return relationship(
        lambda: cast(Any, declared.file_class),
        back_populates="parent",
        cascade="all, delete-orphan",
        collection_class=AttachmentList,
        comparator_factory=_Comparator,
        info={**READ_ONLY_FOR_DTOS, **(relationship_arguments.pop("info", None) or {}), _INFO_KEY: declared},
        order_by=lambda: (cast(Any, declared.file_class).position, cast(Any, declared.file_class).id),
        **relationship_arguments,
    )


# What can be asked of an attribute, and adding files without loading the others.


def declared_collection(attribute: object) -> _Declared | None:
    """Return the declaration of an attribute such as `Album.photos`; None where it is not a collection of attachments."""
    found = getattr(attribute, "declared_collection", None)
    return found if isinstance(found, _Declared) else None


def file_class(attribute: QueryableAttribute[AttachmentList]) -> type[AttachedFile]:
    """Return the class of the files of an attribute such as `Album.photos`, for queries and for rows with a caption.

    Raises:
        TypeError: The attribute is not declared by `attachments`.
    """
    declared = declared_collection(attribute)
    if declared is None or declared.file_class is None:
        raise TypeError(f"expected an attribute that attachments() declares, such as Album.photos, not {attribute!r}")
    return declared.file_class


def count_files(attribute: QueryableAttribute[AttachmentList]) -> ColumnElement[int]:
    """Return the number of files of a row as an SQL expression; nothing is loaded.

    The row is one of the query around it, which therefore selects or restricts the parent. In a query that does not name the
    parent at all, it is the number of the files of all parents.

    Example:
        ```python
        await session.scalar(select(count_files(Album.photos)).where(Album.id == 1))
        ```
    """
    return _of_files(attribute, lambda _: func.count())


def sum_sizes(attribute: QueryableAttribute[AttachmentList]) -> ColumnElement[int]:
    """Return the bytes of all files of a row as an SQL expression, without those of variants; nothing is loaded."""
    return _of_files(attribute, lambda files: func.coalesce(func.sum(files.file["size"].as_integer()), 0))


def _of_files(attribute: QueryableAttribute[AttachmentList], result: Callable[[Any], ColumnElement[int]]) -> ColumnElement[int]:
    files: Any = aliased(file_class(attribute))
    parent: Any = attribute.parent.entity
    links = cast(_Declared, declared_collection(attribute)).links
    mapper: Mapper[Any] = attribute.parent.mapper
    on = [getattr(files, name) == getattr(parent, mapper.get_property_by_column(column).key) for column, name in links.items()]
    return select(result(files)).where(*on).correlate(parent).scalar_subquery()


def append_files(
    parent: object, attribute: InstrumentedAttribute[AttachmentList], files: Iterable[NewFile]
) -> list[AttachedFile]:
    """Add files at the end of a collection without loading it.

    It needs no `await`: the next flush of the parent's session stores the files.

    Args:
        parent: The instance, which a session has, or which is new.
        attribute: The attribute, such as `Album.photos`.
        files: What `AttachmentList.extend` takes.

    Returns:
        The rows of the files.

    Raises:
        DetachedInstanceError: No session has the parent.
        TypeError: The parent is not an instance of the attribute's class.
    """
    declared, made, state = declared_collection(attribute), file_class(attribute), instance_state(parent)
    if not isinstance(parent, attribute.parent.class_):
        owner = attribute.parent.class_.__name__
        raise TypeError(f"{owner}.{attribute.key} takes files of a {owner}, and the parent is {parent!r}")
    given = AttachmentList()
    given.extend(files)
    rows = [cast(_Declared, declared).as_file(file) for file in given]
    session = object_session(parent)
    if state.has_identity and session is None:
        raise DetachedInstanceError(f"{parent!r} is in no session: add it to one before its rows of {made.__name__}")
    for row in rows:
        row.parent = parent
        if session is not None:
            session.add(row)
    return rows


# The limits of a collection. A flush locks the parents whose files it adds or replaces, and counts after its statements, so that
# two transactions cannot both add the last file.


file_classes: weakref.WeakSet[type[AttachedFile]] = weakref.WeakSet()
"""The classes of files that models have. Where there is none, a flush has nothing to do here."""
_declared_by: weakref.WeakKeyDictionary[Mapper[Any], list[_Declared]] = weakref.WeakKeyDictionary()


def keep_listed(session: Session) -> None:
    """Make the lists decide which files a flush keeps, and of which parents and in which order they are.

    SQLAlchemy's events say of each step that an element was removed or added. An element that is in two places for a moment, or
    that another parent takes over while it is new or is to be deleted, would be lost by them.
    """
    for parent in (*session.new, *session.dirty):
        state = instance_state(parent)
        mapper: Mapper[Any] = state.mapper
        if (found := _declared_by.get(mapper)) is None:
            infos = (prop.info.get(_INFO_KEY) for prop in mapper.relationships)
            _declared_by[mapper] = found = [declared for declared in infos if declared is not None]
        for declared in found:
            declared.keep(session, state)


_limited: weakref.WeakSet[type[AttachedFile]] = weakref.WeakSet()
_INNODB = ("mysql", "mariadb")


def lock_parents(session: Session) -> None:
    """Lock the parents whose limits a flush may exceed, in the order of their primary keys, before its statements.

    A parent that is inserted by the flush is not there to be locked, and no other transaction can add to it. InnoDB needs the
    parents of more files before their rows; see `_locked_by_innodb`.
    """
    keys: dict[tuple[str, bool, Connection, _Declared], set[tuple[Any, ...]]] = {}

    def note(file: AttachedFile, connection: Connection, key: tuple[Any, ...], *, shared: bool = False) -> None:
        if None not in key:
            declared = file._declared
            keys.setdefault((declared.label, shared, connection, declared), set()).add(key)

    for file in _added(session):
        note(file, connection_of(session, instance_state(file)), _parent_key(file))
    for file, connection, shared in _locked_by_innodb(session):
        for key in _known_parents(file):
            if not shared or not _is_parent_updated(session, file, key):
                note(file, connection, key, shared=shared)
    for (_, shared, connection, declared), wanted in sorted(keys.items(), key=lambda item: item[0][:2]):
        parent = cast(Table, declared.parent)
        take_write_lock(connection, parent)
        read_rows(connection, parent, wanted, [], shared=shared)


def _locked_by_innodb(session: Session) -> Iterator[tuple[AttachedFile, Connection, bool]]:
    """Yield the files whose parents InnoDB would lock after rows of their files, and whether it shares the lock.

    It counts the files of a parent with limits under the locks of all their rows, in the order of their positions, so that each
    change of them has to wait for the parent. And it checks the foreign key of a row whose position changes, because the
    position is in the index of the foreign key, under a shared lock of the parent, as that of a new row.
    """
    dirty = [file for file in session.dirty if isinstance(file, AttachedFile)]
    deleted = [file for file in session.deleted if isinstance(file, AttachedFile)]
    new = [file for file in session.new if isinstance(file, AttachedFile)]
    if not dirty and not deleted:
        return
    locked: set[type[AttachedFile]] = set(map(type, deleted))
    for file in (*dirty, *deleted, *new):
        state = instance_state(file)
        connection = connection_of(session, state)
        if connection.dialect.name not in _INNODB:
            continue
        is_updated = state.key is not None and (file in session.deleted or session.is_modified(file))
        if is_updated:
            locked.add(type(file))
        if is_updated and type(file) in _limited:
            yield file, connection, False
        elif type(file) in locked and (state.key is None or _has_changed(state, "position")):
            yield file, connection, True


def _is_parent_updated(session: Session, file: AttachedFile, key: tuple[Any, ...]) -> bool:
    """Return whether a flush updates the row of a parent, and so locks it first and for itself."""
    mapper: Mapper[Any] = instance_state(file).mapper.relationships["parent"].mapper
    parent = session.identity_map.get(mapper.identity_key_from_primary_key(key))
    return parent is not None and session.is_modified(parent, include_collections=False)


def _known_parents(file: AttachedFile) -> set[tuple[Any, ...]]:
    """Return the primary keys of the rows that a file belongs to before and after a flush, as far as they are loaded."""
    state = instance_state(file)
    links = [state.get_history(name, PassiveFlag.PASSIVE_NO_INITIALIZE) for name in file._declared.links.values()]
    before = tuple(next(iter([*link.deleted, *link.unchanged]), None) for link in links)
    known = {before, _parent_key(file)} if state.key is None or state.dict.get("parent") is not None else {before}
    return {key for key in known if None not in key}


def require_known_limits(session: Session) -> None:
    """Refuse files that are too many as far as the session knows, before they are uploaded.

    Raises:
        CollectionFullError: There are too many.
    """
    for file in _added(session):
        parent = instance_dict(file).get("parent")
        loaded = None if parent is None else instance_dict(parent).get(file._declared.key)
        if loaded is not None:
            files = [other for other in dict.fromkeys(loaded) if other not in session.deleted]
            file._declared.require(len(files), sum(map(_known_size, files)))


def require_limits(session: Session) -> None:
    """Refuse files that are too many according to the rows, after the statements of a flush.

    Raises:
        CollectionFullError: There are too many.
    """
    checked: set[tuple[_Declared, tuple[Any, ...]]] = set()
    for file in _added(session):
        declared = file._declared
        key = tuple(getattr(file, name) for name in declared.links.values())
        if (declared, key) not in checked:
            checked.add((declared, key))
            declared.require(*_count(connection_of(session, instance_state(file)), declared, key))


def _added(session: Session) -> list[AttachedFile]:
    """Return the files with limits that a flush adds to parents or replaces."""
    if not _limited:
        return []
    return [file for file in (*session.new, *session.dirty) if type(file) in _limited and _is_added(file)]


def _is_added(file: AttachedFile) -> bool:
    """Return whether a file may exceed a limit: a new one, one that is moved, and where sizes count, one that is replaced."""
    state, declared = instance_state(file), file._declared
    if state.dict.get("parent", file) is None:
        return False  # it was taken out of its list, and is deleted
    names = ["parent", *declared.links.values(), *(["file"] if declared.max_total_size is not None else [])]
    return state.key is None or any(_has_changed(state, name) for name in names)


def _has_changed(state: InstanceState[Any], name: str) -> bool:
    return state.get_history(name, PassiveFlag.PASSIVE_NO_INITIALIZE).has_changes()


def _parent_key(file: AttachedFile) -> tuple[Any, ...]:
    """Return the primary key of the row that a file will belong to; with None in it where the row is not inserted yet."""
    state, links = instance_state(file), file._declared.links.values()
    parent = state.dict.get("parent")
    if parent is None or any(_has_changed(state, name) for name in links):
        return tuple(getattr(file, name) for name in links)
    return primary_key_of(instance_state(parent), cast(Table, file._declared.parent))


def _known_size(file: AttachedFile) -> int:
    attachment = instance_dict(file).get("file")
    if not isinstance(attachment, Attachment):
        return 0
    ref, source = attachment._state.ref, attachment._state.source
    return ref.size if ref is not None else len(source) if isinstance(source, bytes | bytearray) else 0


def _count(connection: Connection, declared: _Declared, key: tuple[Any, ...]) -> tuple[int, int]:
    """Return the number of the files of a parent, and their bytes, as they are now and not in a snapshot."""
    table: Table = cast(Any, declared.file_class).__table__
    size = sql_cast(value_in(table.c.file, "size", connection.dialect.name), BigInteger)
    on = [table.c[name] == value for name, value in zip(declared.links.values(), key, strict=True)]
    statement = select(func.count(), func.coalesce(func.sum(size), 0)).select_from(table).where(*on)
    if connection.dialect.name in _INNODB:  # where a snapshot is as old as the transaction, unless rows are locked
        statement = statement.with_for_update()
    count, total = connection.execute(statement).one()
    return int(count), int(total)
