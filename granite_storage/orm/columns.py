"""The column types, and the attachments of a mapper, of a table, and of tables that cascades of the database reach."""

from __future__ import annotations

import inspect
import json
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ColumnElement,
    ForeignKeyConstraint,
    FromClause,
    Index,
    MetaData,
    Table,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal_column,
    not_,
    or_,
    type_coerce,
)
from sqlalchemy import column as named_column
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.orm import InstanceState, MappedColumn, Mapper, mapped_column
from sqlalchemy.sql import operators
from sqlalchemy.sql.ddl import sort_tables_and_constraints
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.types import TypeDecorator

from granite_storage._documentation import Page
from granite_storage.derived import Effect, Missing, Recipe, SupportsAccept, When
from granite_storage.derived.base import check_accepted_types, require_choice
from granite_storage.exceptions import (
    ConfigurationError,
    ContentTooLargeError,
    InvalidReferenceError,
    UnboundAttachmentError,
    UnknownPolicyError,
    UnsupportedContentError,
)
from granite_storage.inspection.base import Validator
from granite_storage.orm._interfaces import Binding, DeclaredVariant, binding_for, find_binding, unbound_message
from granite_storage.orm.attachment import Attachment
from granite_storage.policies import StoragePolicy, require_validator
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from granite_storage.manager import StorageManager


# The column types: a ref as JSON, and an attachment, which is the same in the database.


T = TypeVar("T")


def portable_storage_ref_type() -> TypeEngine[Any]:
    """Return the database type of a column of refs, for migrations: JSON, or JSONB on PostgreSQL.

    It is that of `attachment()` and `StoredObjectRefType` columns. It knows no policy and no manager, so a migration that names
    it remains valid when the models change.

    Example:
        >>> from sqlalchemy.dialects import postgresql
        >>> portable_storage_ref_type().compile(postgresql.dialect())
        'JSONB'
    """
    return JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class _RefComparator(TypeDecorator.Comparator[Any], JSON.Comparator[Any]):
    """The SQL operators of a column of refs: refs are equal if they lead to the same object.

    Some databases compare JSON as text, which differs if its keys are in another order.
    """

    __slots__ = ()

    def __getitem__(self, index: Any) -> ColumnElement[Any]:
        # Python iterates by integers over anything that it can index, so an encoder that iterates over a column would never end.
        if isinstance(index, int | slice):
            raise TypeError("the fields of a ref have names: index the column by a string, such as Document.file['size']")
        return type_coerce(self.expr, JSON())[index]

    def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
        if op is operators.ne and _is_pending(other[0]):
            return self.expr.is_not(None)  # as with any other file: a row without one is neither equal nor unequal
        if op in (operators.eq, operators.ne) and _is_ref(other[0]):
            is_same = self._leads_to(other[0])
        elif op in (operators.in_op, operators.not_in_op) and _are_refs(other[0]):
            is_same = or_(false(), *map(self._leads_to, other[0]))
        else:
            return super().operate(op, *other, **kwargs)
        return not_(is_same) if op in (operators.ne, operators.not_in_op) else is_same

    def _leads_to(self, value: StoredObjectRef | Attachment) -> ColumnElement[bool]:
        if _is_pending(value):
            return false()  # it is in no row yet
        ref = value.ref if isinstance(value, Attachment) else value
        return and_(self["backend"].as_string() == ref.backend, self["location"].as_string() == ref.location)


def _is_ref(value: object) -> bool:
    return isinstance(value, StoredObjectRef | Attachment)


def _are_refs(values: object) -> bool:
    return isinstance(values, list | tuple | set | frozenset) and all(map(_is_ref, values))


def _is_pending(value: object) -> bool:
    return isinstance(value, Attachment) and value.is_pending


class _RefJSON(TypeDecorator[T]):
    """JSON, JSONB on PostgreSQL; None is SQL NULL."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = JSON
    comparator_factory = _RefComparator  # pyright: ignore[reportAssignmentType]  # there it is a property

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind = JSONB if dialect.name == "postgresql" else JSON
        return dialect.type_descriptor(kind(none_as_null=True))

    def coerce_compared_value(self, op: Any, value: Any) -> TypeEngine[Any]:
        if _is_ref(value):
            return StoredObjectRefType()
        return self.impl_instance.coerce_compared_value(op, value)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        # PostgreSQL's drivers decode JSON as they fetch, and one value that is nested too deeply would fail the whole fetch.
        if isinstance(self.impl_instance, JSONB):
            return type_coerce(cast(column, Text), self)
        return column

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        """Also turn errors of the dialect's own processor into an `InvalidReferenceError`."""
        inner = self.impl_instance.result_processor(dialect, coltype)
        loads = getattr(dialect, "_json_deserializer", None) or json.loads

        def process(value: Any) -> T | None:
            if value is None:
                return None
            try:
                decoded = inner(value) if inner is not None else loads(value) if isinstance(value, str) else value
                ref = None if decoded is None else StoredObjectRef.from_dict(decoded)
            except InvalidReferenceError as error:
                return self._broken(error)
            except (ValueError, TypeError, RecursionError) as error:
                problem = InvalidReferenceError(f"the column does not contain readable JSON: {error}")
                problem.__cause__ = error
                return self._broken(problem)
            return None if ref is None else self._loaded(ref)

        return process

    def _loaded(self, ref: StoredObjectRef) -> T:
        raise NotImplementedError

    def _broken(self, error: InvalidReferenceError) -> T:
        raise error


class _ReadOnly:
    """Is Litestar's `DTOField("read-only")`, without an import of Litestar until one of its DTOs asks."""

    @property
    def mark(self) -> Any:
        from litestar.dto import Mark

        return Mark.READ_ONLY


# A body that leaves a file out would set the attribute to None, or to an empty list, and the commit would delete the file.
READ_ONLY_FOR_DTOS: Mapping[str, Any] = {"__dto__": _ReadOnly()}


@sqlalchemy_event.listens_for(Column, "after_parent_attach")
def _protect_from_dtos(column: Column[Any], _: object) -> None:
    if isinstance(column.type, _RefJSON):  # the application's own mark has precedence
        column.info.update({**READ_ONLY_FOR_DTOS, **column.info})


class RefusedReferenceError(InvalidReferenceError, DontWrapMixin):
    """An `InvalidReferenceError` that SQLAlchemy does not wrap in a `StatementError`."""


class NotBoundError(UnboundAttachmentError, DontWrapMixin):
    """An `UnboundAttachmentError` that SQLAlchemy does not wrap in a `StatementError`."""


class StoredObjectRefType(_RefJSON[StoredObjectRef]):
    """A column of plain refs: the application stores and deletes the objects itself.

    A value that is not a ref raises `InvalidReferenceError` when it is loaded.
    """

    cache_ok: bool | None = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        match value:
            case None:
                return None
            case Attachment() if value.is_pending:
                raise NotBoundError(
                    "a column of refs takes no pending Attachment: await store(Document.file) first, and use its ref",
                    see=Page.ATTACHMENTS,
                )
            case Attachment():
                return value.ref.to_dict()
            case StoredObjectRef():
                return value.to_dict()
            case _:
                raise RefusedReferenceError(f"a column of refs takes a StoredObjectRef or None, not {type(value).__name__}")

    def _loaded(self, ref: StoredObjectRef) -> StoredObjectRef:
        return ref


class AttachmentType(_RefJSON[Attachment]):
    """A column of attachments: the hooks of the session store and delete the objects.

    Args:
        storage_key: The policy that new objects are stored under.
        entity_id: Given the instance, returns the segment of the location that names the row; None for the primary key.
        validate: A function that may refuse a new file of this column, as `StoragePolicy.validate` does for all of a policy.
        variants: The recipes of what is derived from its files, by the names of the variants.
        effects: What is derived from its files and kept elsewhere, by the names of the effects.
    """

    cache_ok: bool | None = True

    # How many columns were ever declared; a change invalidates the caches of mappers and tables.
    declared: ClassVar[int] = 0

    def __init__(
        self,
        storage_key: str,
        *,
        entity_id: Callable[[Any], str] | None = None,
        validate: Validator | None = None,
        variants: Mapping[str, Recipe] | None = None,
        effects: Mapping[str, Effect] | None = None,
    ) -> None:
        if not isinstance(storage_key, str) or not storage_key:
            raise ConfigurationError(
                f"an attachment column needs the storage key of a policy, not {storage_key!r}", see=Page.MODELS
            )
        super().__init__()
        self.storage_key = storage_key
        require_validator(f"the attachment column of the policy {storage_key!r}", validate)
        self.entity_id = entity_id
        self.validate = validate
        self._variants = _declared_variants(storage_key, {} if variants is None else variants)
        self._effects = _declared_effects(storage_key, {} if effects is None else effects)
        self._column: Column[Any] | None = None

    def __repr__(self) -> str:
        return f"AttachmentType({self.storage_key!r})"

    @property
    def column(self) -> Column[Any]:
        """The column that has this type."""
        if self._column is None:
            raise ConfigurationError(f"{self!r} belongs to no column")
        return self._column

    @property
    def variants(self) -> Mapping[str, DeclaredVariant]:
        """The variants that the column declares, by their names; read-only."""
        return MappingProxyType(self._variants)

    @property
    def effects(self) -> Mapping[str, Effect]:
        """The effects that the column declares, by their names; read-only."""
        return MappingProxyType(self._effects)

    @property
    def table(self) -> Table:
        """The table of that column."""
        return self.column.table

    @property
    def model_name(self) -> str:
        """The segment of locations that names the model: the table's name."""
        return str(self.table.name)

    @property
    def field_name(self) -> str:
        """The segment of locations that names the attribute: the column's name."""
        return str(self.column.name)

    @property
    def label(self) -> str:
        """The name of the column in messages."""
        return "an attachment column" if self._column is None else f"{self.model_name}.{self.field_name}"

    def binding(self) -> Binding:
        """Return the binding of the column's metadata, or raise `UnboundAttachmentError`."""
        metadata = self.column.table.metadata
        # It is called several times for each file, and making the message takes longer than the look-up.
        return find_binding(metadata) or binding_for(metadata, f"the attachment column {self.label}")

    def manager_in(self, binding: Binding) -> StorageManager:
        """Return the manager of a binding, after checking that it has the column's policy.

        Raises:
            UnknownPolicyError: It has not; a model may have been declared after `bind_storage` was called.
            ConfigurationError: The policy has a retention, or a scanner that may hold a file back, or the column has variants
                that are made after the commit or effects, which needs a journal.
        """
        policy = binding.manager._engine.policies.get(self.storage_key)
        if policy is None:
            known = ", ".join(sorted(binding.manager.policies)) or "none"
            raise UnknownPolicyError(
                f"the attachment column {self.label} names the policy {self.storage_key!r}, which its manager does not have"
                f" (there are: {known})"
            )
        if binding.journal is None and (need := self._describe_need(policy)) is not None:
            raise ConfigurationError(need, see=Page.JOURNAL)
        return binding.manager

    def _describe_need(self, policy: StoragePolicy) -> str | None:
        """Return why the column needs a journal; None where it does not."""
        if policy.retention:
            return f"the policy {self.storage_key!r} has a retention, which needs a journal: bind_storage(..., journal=...)"
        if policy.scanner is not None and policy.may_hold:
            return (
                f"the scanner of the policy {self.storage_key!r} holds files back while it is unavailable, which needs a journal,"
                " whose worker scans them later: bind_storage(..., journal=...), or a scanner with on_unavailable='refuse'"
            )
        if late := [name for name, item in self._variants.items() if item.recipe.when == "later"]:
            return (
                f"the attachment column {self.label} has variants that are made after the commit ({', '.join(late)}), which needs"
                " a journal, whose worker makes them: bind_storage(..., journal=...), or recipes with when='flush' or 'request'"
            )
        if self._effects:
            return (
                f"the attachment column {self.label} has effects ({', '.join(self._effects)}), which need a journal, whose worker"
                " calls them after the commit: bind_storage(..., journal=...)"
            )
        return None

    def require_fit(self, ref: StoredObjectRef) -> None:
        """Raise if an object does not fit the column; one of the column's own policy was checked when it was stored.

        Raises:
            ContentTooLargeError: It was stored under another policy, and is larger than that of the column allows.
            UnsupportedContentError: It was stored under another policy, and what that found out about it does not show that the
                column's policy would have let it in; its content can be stored again.
        """
        policy = self.manager_in(self.binding()).policy(self.storage_key)
        if ref.storage_key == self.storage_key:
            return
        if policy.checks is not None and not policy.checks.would_pass(ref.media, ref.scan):
            raise UnsupportedContentError(
                f"{self.label} has checks (policy {self.storage_key!r}) that a file of the policy {ref.storage_key!r} has not"
                " passed: store its content again, with Attachment(await file.read(), ...)",
                found=None if ref.media is None else ref.media.get("type"),
                declared=ref.content_type,
            )
        limit = policy.max_size
        if limit is not None and ref.size > limit:
            raise ContentTooLargeError(
                f"the file has {ref.size} bytes, and {self.label} accepts at most {limit} (policy {self.storage_key!r}); it was"
                f" stored under the policy {ref.storage_key!r}",
                max_size=limit,
            )

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        if value is None:
            return None
        if not isinstance(value, Attachment):
            raise RefusedReferenceError(f"{self.label} takes an Attachment or None, not {type(value).__name__}")
        if self._column is not None and find_binding(self.table.metadata) is None:
            raise NotBoundError(unbound_message(self.table.metadata, f"the attachment column {self.label}"))
        if not value._state.is_claimed:
            raise RefusedReferenceError(
                f"a statement may not write an Attachment to {self.label}: add or change an instance, and let the session flush"
                " it; bulk and Core statements would write a ref whose object belongs to no row"
            )
        value._state.mark_written()
        return value.ref.to_dict()

    def compare_values(self, x: Any, y: Any) -> bool:  # noqa: D102
        if x is y:
            return True
        refs = [value._state.ref if isinstance(value, Attachment) else None for value in (x, y)]
        return refs[0] is not None and refs[0] == refs[1]

    @property
    def _static_cache_key(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # there it is a property too
        # Statements that differ only in the column must not share a result processor, which knows the column and so the manager.
        return super()._static_cache_key, self._column

    def _set_parent(self, parent: Any, outer: bool = False, **kw: Any) -> None:
        # The type learns its column here, and from it the metadata and the manager, however a value is loaded.
        if isinstance(parent, Column):
            if self._column is not None and self._column is not parent and self._column.type is self:
                # Two columns were given one type object, as by a `type_annotation_map`; each needs its own.
                parent.type = own = self.copy()
                own._set_parent(parent, outer=outer, **kw)
                return
            self._column = parent
            AttachmentType.declared += 1
        super()._set_parent(parent, outer=outer, **kw)

    def _loaded(self, ref: StoredObjectRef) -> Attachment:
        return Attachment._of(ref, self)

    def _broken(self, error: InvalidReferenceError) -> Attachment:
        """Return an attachment that raises when it is used, so that one bad row does not break a list."""
        return Attachment._broken(error, self)


def _extension_of(recipe: Recipe) -> str:
    """Return the extension of the files that a recipe makes; nothing where it does not say their media type."""
    from granite_storage.inspection._media_names import canonical, extension_of  # reads files, now and not in a flush

    content_type = getattr(recipe, "content_type", None)
    return extension_of(canonical(content_type)) if isinstance(content_type, str) else ""


def _declared_variants(storage_key: str, recipes: Mapping[str, Recipe]) -> dict[str, DeclaredVariant]:
    """Return what a column declares, checked.

    Raises:
        ConfigurationError: A name cannot be one of a variant, or a recipe is none.
    """
    column = f"the attachment column of the policy {storage_key!r}"
    _require_names(column, recipes, "variants", "a variant", "recipes")
    declared: dict[str, DeclaredVariant] = {}
    for name, recipe in recipes.items():
        if isinstance(recipe, type) or not isinstance(recipe, Recipe):
            raise ConfigurationError(
                f"the variant {name!r} of {column} is a {type(recipe).__name__}, not a recipe, which has when, missing, digest()"
                " and make(), such as Derived or ImageVariant"
            )
        require_choice(f"when of the variant {name!r} of {column}", recipe.when, When)
        require_choice(f"missing of the variant {name!r} of {column}", recipe.missing, Missing)
        digest = recipe.digest(name)
        if not isinstance(digest, str) or not digest:
            raise ConfigurationError(f"digest() of the variant {name!r} of {column} must return a string, not {digest!r}")
        accept = check_accepted_types(recipe.accept) if isinstance(recipe, SupportsAccept) else None
        declared[name] = DeclaredVariant(name, recipe, digest, accept, f"{name}{_extension_of(recipe)}")
    return declared


def _declared_effects(storage_key: str, effects: Mapping[str, Effect]) -> dict[str, Effect]:
    """Return what a column declares, checked.

    Raises:
        ConfigurationError: A name cannot be one of an effect, or an effect is none.
    """
    column = f"the attachment column of the policy {storage_key!r}"
    _require_names(column, effects, "effects", "an effect", "effects")
    for name, effect in effects.items():
        if not isinstance(effect, Effect):
            raise ConfigurationError(
                f"the effect {name!r} of {column} is a {type(effect).__name__}: write Effect(put=..., remove=...)"
            )
    return dict(effects)


def _require_names(column: str, declared: object, several: str, one: str, values: str) -> None:
    """Raise `ConfigurationError` unless a mapping maps valid names to what they stand for, such as variants."""
    if not isinstance(declared, Mapping):
        raise ConfigurationError(f"{several} of {column} must map names to {values}, not be a {type(declared).__name__}")
    for name in declared:
        if not isinstance(name, str) or _VARIANT_NAME.fullmatch(name) is None:
            raise ConfigurationError(
                f"{one} of {column} is called {name!r}: a name has at most {_LONGEST_VARIANT_NAME} letters, digits, hyphens"
                " and underscores of ASCII, and begins with a letter or a digit"
            )


_LONGEST_VARIANT_NAME = 40
_VARIANT_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_LONGEST_VARIANT_NAME - 1}}}")


def attachment(
    storage_key: str,
    *,
    entity_id: Callable[[Any], str] | None = None,
    validate: Validator | None = None,
    variants: Mapping[str, Recipe] | None = None,
    effects: Mapping[str, Effect] | None = None,
    **column_arguments: Any,
) -> MappedColumn[Any]:
    """Declare an attachment attribute of a model.

    Args:
        storage_key: The policy that new objects are stored under.
        entity_id: Given the instance, returns the segment of the location that names the row. By default that is the primary
            key if it is known before the INSERT, otherwise a new UUID.
        validate: A function that is called with an `UploadPreview` of each new file, after the policy's own, and refuses it by
            raising `ContentRejectedError` with a message for the client.
        variants: The recipes of the files that are derived from each file, such as thumbnails, by the names of the variants:
            letters, digits, hyphens and underscores. A variant is deleted with its file. Variants that are made after the
            commit (`when="later"`) need a journal.
        effects: The handlers that keep another service in step with the files, such as a search index, by the names of the
            effects, which have the form of variant names. The journal's worker calls them when a file was added to a row or
            removed from it. Columns that declare effects of the same name must declare the same effect.
        **column_arguments: Other arguments of `mapped_column`, such as `nullable`, `deferred`, `init` or `default`. A default
            is None or a function without arguments, which makes an attachment for each new row that has none.

    Raises:
        ConfigurationError: The storage key is invalid, a default would write a file that no session has stored, or a variant or
            an effect, or its name, is invalid.

    Example:
        ```python
        class Document(Base):
            __tablename__ = "document"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("documents")
        ```
    """
    column_type = AttachmentType(storage_key, entity_id=entity_id, validate=validate, variants=variants, effects=effects)
    for name, value in column_arguments.items():
        if name in _DEFAULTS:
            _require_callable(f"attachment({storage_key!r}, {name}=...)", value)
        elif name in _WRITTEN_ELSEWHERE:
            _require_null(f"attachment({storage_key!r}, {name}=...)", value)
    return mapped_column(column_type, **column_arguments)


_DEFAULTS = ("default", "insert_default")
_EXAMPLE = "default=lambda: Attachment(b'...')"
_WRITTEN_ELSEWHERE = ("onupdate", "server_default", "server_onupdate")


def require_usable(column: Column[Any]) -> None:
    """Raise if an attachment column gets values that the hooks of the session do not see.

    Raises:
        ConfigurationError: Its default is not a function without arguments, or the database or an UPDATE would write it.
    """
    label = f"the attachment column {column.table.name}.{column.name}"
    if column.default is not None and not column.default.is_callable:
        raise ConfigurationError(
            f"the default of {label} must be a function that makes a new Attachment for each row", see=Page.MODELS
        )
    for name in _WRITTEN_ELSEWHERE:
        value = getattr(column, name)
        _require_null(f"the {name} of {label}", getattr(value, "arg", value))
    if column.computed is not None:
        raise ConfigurationError(
            f"{label} is computed by the database, which cannot store a file: make it an ordinary column", see=Page.MODELS
        )


def _require_callable(what: str, value: Any) -> None:
    if value is not None and not (callable(value) and _takes_no_argument(value)):
        raise ConfigurationError(
            f"{what} must be None or a function without arguments that makes a new Attachment for each row, such as"
            f" {_EXAMPLE}, not {value!r}",
            see=Page.MODELS,
        )


def _takes_no_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # it is written in C and has no signature
        return True
    return True


def _require_null(what: str, value: Any) -> None:
    if value is not None and str(value).strip().upper() != "NULL":
        raise ConfigurationError(f"{what} would write a file that no session has stored: omit it, or use {_EXAMPLE}")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """An attachment attribute of a mapped class."""

    key: str
    column: Column[Any]
    column_type: AttachmentType


# By the id of the mapper: it is looked up for each row of each flush, and a weak dictionary takes several times as long.
_slots: dict[int, tuple[Slot, ...]] = {}
_slots_declared = 0


def slots_of(mapper: Mapper[Any]) -> tuple[Slot, ...]:
    """Return the attachment attributes of a mapper, inherited ones included."""
    global _slots_declared
    if _slots_declared != AttachmentType.declared:
        # A mapped class may have been given another column.
        _slots.clear()
        _slots_declared = AttachmentType.declared
    slots = _slots.get(id(mapper))
    if slots is None:
        slots = _slots[id(mapper)] = tuple(
            Slot(prop.key, column, column.type)
            for prop in mapper.column_attrs
            for column in prop.columns
            if isinstance(column, Column) and isinstance(column.type, AttachmentType) and isinstance(column.table, Table)
        )
        weakref.finalize(mapper, _slots.pop, id(mapper), None).atexit = False
    return slots


def primary_key_of(state: InstanceState[Any], table: Table) -> tuple[Any, ...]:
    """Return the primary key of an instance's row in one of its tables, as it is in the database.

    If the current flush has inserted the row, it is that of the instance.
    """
    mapper: Mapper[Any] = state.mapper
    instance: Any = state.obj()
    identity = state.identity or mapper.primary_key_from_instance(instance)
    by_attribute = {
        mapper.get_property_by_column(column).key: value for column, value in zip(mapper.primary_key, identity, strict=True)
    }
    return tuple(by_attribute[mapper.get_property_by_column(column).key] for column in table.primary_key)


def keys_of(state: InstanceState[Any], table: Table) -> set[tuple[Any, ...]]:
    """Return the primary keys that the row of an instance may have during a flush: the old one and the new one.

    Nothing is loaded; an unloaded part of a key is None.
    """
    names = [state.mapper.get_property_by_column(column).key for column in table.primary_key]
    current = tuple(state.dict.get(name) for name in names)
    return {current} if state.identity is None else {current, primary_key_of(state, table)}


_TABLES_KEY = "granite_storage.tables"


class Tables:
    """The attachment columns of a metadata, and the cascades that lead to them, when it was made; see `attachment_tables`.

    Args:
        metadata: The metadata.
        seen: How many tables it has, and how many attachment columns were ever declared.
    """

    def __init__(self, metadata: MetaData, seen: tuple[int, int]) -> None:
        self.seen = seen
        self._attachments: dict[str, tuple[Column[Any], ...]] = {}
        self._cascades: dict[str, list[ForeignKeyConstraint]] = {}
        self._refs: list[Column[Any]] = []
        self._by_mapper: weakref.WeakKeyDictionary[Mapper[Any], tuple[Table, ...]] = weakref.WeakKeyDictionary()
        tables = metadata.tables
        for name, table in tables.items():
            refs = [column for column in table.columns if isinstance(column.type, AttachmentType | StoredObjectRefType)]
            self._refs += refs
            if columns := tuple(column for column in refs if isinstance(column.type, AttachmentType)):
                self._attachments[name] = columns
            for constraint in table.foreign_key_constraints:
                if (constraint.ondelete or "").upper() == "CASCADE":
                    self._cascades.setdefault(_target(constraint), []).append(constraint)
        # The tables that have attachments, or deleting whose rows cascades to some.
        self._concerned: set[str] = set()
        found = set(self._attachments)
        while found:
            self._concerned |= found
            found = {
                parent
                for parent, links in self._cascades.items()
                if parent not in self._concerned and any(link.table.fullname in found for link in links)
            }
        by_name = [tables[name] for name in sorted(tables)]
        ordered = sort_tables_and_constraints(  # type: ignore[no-untyped-call]
            by_name, filter_fn=lambda link: _target(link) not in tables or None
        )
        self._ranks = {table.fullname: rank for rank, (table, _) in enumerate(ordered) if table is not None}

    def attachments(self, table: Table) -> tuple[Column[Any], ...]:
        """Return the attachment columns of a table."""
        return self._attachments.get(table.fullname, ())

    def cascades(self, table: Table) -> Sequence[ForeignKeyConstraint]:
        """Return the foreign keys by which deleting rows of `table` cascades to attachments."""
        return [link for link in self._cascades.get(table.fullname, ()) if link.table.fullname in self._concerned]

    def concerns(self, table: Table) -> bool:
        """Return whether a table has attachments, or deleting its rows cascades to some."""
        return table.fullname in self._concerned

    def concerned(self, mapper: Mapper[Any]) -> tuple[Table, ...]:
        """Return the tables of a mapper that `concerns` holds for."""
        found = self._by_mapper.get(mapper)
        if found is None:
            found = self._by_mapper[mapper] = tuple(
                table for table in mapper.tables if isinstance(table, Table) and self.concerns(table)
            )
        return found

    def rank(self, table: Table) -> tuple[int, str]:
        """Return a key by which tables are sorted after those that they refer to, and then by name."""
        return self._ranks.get(table.fullname, 0), table.fullname

    def refs(self) -> list[Column[Any]]:
        """Return every column that holds refs, managed and plain ones."""
        return self._refs

    def all_attachments(self) -> list[Column[Any]]:
        """Return every attachment column."""
        return [column for column in self.refs() if isinstance(column.type, AttachmentType)]


def _target(link: ForeignKeyConstraint) -> str:
    """Return the name of the table that a foreign key refers to, whether the metadata has it or not."""
    return link.elements[0].target_fullname.rpartition(".")[0]


def attachment_tables(metadata: MetaData) -> Tables:
    """Return the `Tables` of a metadata, others once tables or attachment columns were added."""
    seen = len(metadata.tables), AttachmentType.declared
    found: Tables | None = metadata.info.get(_TABLES_KEY)
    if found is None or found.seen != seen:
        found = metadata.info[_TABLES_KEY] = Tables(metadata, seen)
    return found


@lru_cache(maxsize=1024)  # statements of the same table are compiled once
def as_found(schema: str, table: str, name: str, *, keys: tuple[Column[Any], ...] = ()) -> Column[Any]:
    """Return a column of refs in a table with its actual name, for statements without schema translation.

    Args:
        schema: The schema.
        table: The table.
        name: The column.
        keys: The columns of the table's primary key.
    """
    column: Column[Any] = Column(name, StoredObjectRefType())
    primary_key = [Column(key.name, key.type, primary_key=True) for key in keys if key.name != name]
    Table(table, MetaData(), *primary_key, column, schema=schema)
    return column


# The locations of a column of refs in SQL, the index over them, and the generated column that it needs on MariaDB.


LOCATION_INDEX_PREFIX = "ix_granite_storage_location_"
LOCATION_COLUMN_PREFIX = "granite_storage_location_"
LONGEST_LOCATION = 1024
INDEXED_LOCATION = 255
"""How many characters of a location an index has on MariaDB."""

_LONGEST_NAME = 63
_DIGITS = 8


def location_index_name(table: str, column: str) -> str:
    """Return the name of the index over a column's locations; it fits every database."""
    return fitting_name(LOCATION_INDEX_PREFIX, f"{table}_{column}")


def location_index(dialect: str, table: str, column: str, schema: str | None, *, concurrently: bool = False) -> Index:
    """Return the index over a column's locations: on an expression, or on the generated column where no index can be.

    Args:
        dialect: The name of the database.
        table: The table.
        column: The column of refs.
        schema: The table's schema.
        concurrently: Whether PostgreSQL builds it without locking out writers.
    """
    refs = Column(column, portable_storage_ref_type())
    generated = Column(location_column_name(column), Text())
    Table(table, MetaData(), refs, generated, schema=schema)
    name = location_index_name(table, column)
    if dialect in ("mysql", "mariadb"):
        length = {generated.name: INDEXED_LOCATION}
        return Index(name, generated, mysql_length=length, mariadb_length=length)
    return Index(name, location_of(refs, dialect)[1], postgresql_concurrently=concurrently)


def location_column_name(column: str) -> str:
    """Return the name of the generated column that holds another column's locations, where no index can be on an expression."""
    return fitting_name(LOCATION_COLUMN_PREFIX, column)


def generated_location(column: str) -> str:
    """Return the type of the generated column with the locations of a column of refs, which is given as SQL, on MariaDB.

    The library compares exactly, whatever the table's collation; and a `SELECT *` of the application must not see the column. It
    is stored, because MariaDB can crash with an index over a virtual column when deletes cascade to its rows (MDEV-21153 is one
    of several such errors; 10.11.19 does while tables are flushed).
    """
    return (
        f"VARCHAR({LONGEST_LOCATION}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        f" GENERATED ALWAYS AS (json_value({column}, '$.location')) STORED INVISIBLE"
    )


def location_of(
    column: Column[Any], dialect: str, *, is_generated: bool = False
) -> tuple[ColumnElement[str], ColumnElement[str]]:
    """Return the backend and the location of a column's refs in SQL, spelled as an index over them would be.

    The keys are literals: a database uses an index on an expression only for the very same expression.

    Args:
        column: The column of refs.
        dialect: The name of the database.
        is_generated: Whether its table has a generated column with the locations.
    """
    generated: ColumnElement[str] = named_column(location_column_name(column.name), Text())
    return value_in(column, "backend", dialect), generated if is_generated else value_in(column, "location", dialect)


def value_in(column: ColumnElement[Any], key: str, dialect: str) -> ColumnElement[str]:
    """Return a text that the refs of a column have under a key, in SQL; the key is trusted."""
    if dialect == "postgresql":
        return column.op("->>", return_type=Text())(literal_column(f"'{key}'"))
    extract = func.json_extract if dialect == "sqlite" else func.json_value
    return extract(column, literal_column(f"'$.{key}'"), type_=Text())


def json_in(column: ColumnElement[Any], key: str, dialect: str) -> ColumnElement[Any]:
    """Return what the refs of a column have under a key as JSON, in SQL, which is text but on PostgreSQL; the key is trusted."""
    if dialect == "postgresql":
        return cast(column, JSONB).op("->", return_type=JSONB())(literal_column(f"'{key}'"))
    return func.json_extract(column, literal_column(f"'$.{key}'"), type_=Text())


def variants_in(column: Column[Any], dialect: str) -> ColumnElement[str]:
    """Return the variants in a column's refs as JSON text, in SQL; NULL where there are none. `variant_locations` reads it."""
    if dialect == "postgresql":  # not by `json_in`: the column of a clone may be of `json`, with numbers that no `jsonb` can have
        return cast(column.op("->", return_type=JSONB())(literal_column("'variants'")), Text())
    return json_in(column, "variants", dialect)


def variant_locations(variants: str | None) -> set[str]:
    """Return the locations of variants as `variants_in` selects them.

    Raises:
        InvalidReferenceError: They are none that this version can read.
    """
    if variants is None:
        return set()
    try:
        found = json.loads(variants)
        locations = set() if found is None else {variant["location"] for variant in found.values()}
        if not all(isinstance(location, str) for location in locations):
            raise TypeError("a location is a string")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidReferenceError(f"a row has variants that cannot be read: {variants[:120]!r}") from error
    return locations


def join_variants(column: Column[Any], dialect: str) -> tuple[FromClause, ColumnElement[Any]]:
    """Return the table of a column joined with the variants in its refs, and their JSON values; see `unnest_variants`."""
    variants, variant, has_some = unnest_variants(column, dialect)
    return column.table.join(variants, has_some), variant


def unnest_variants(column: ColumnElement[Any], dialect: str) -> tuple[TableValuedAlias, ColumnElement[Any], ColumnElement[bool]]:
    """Return the variants in a column's refs as a table in SQL, its JSON values, and the criterion that a row has any.

    Each is that of a variant's ref, which `value_in` and `is_legible` read like that of any other. A value that is none is
    something else or NULL; where the variants are not a mapping at all, there is no row.

    The criterion is true of every row from which the table takes something. As that of a join it spares the others the call of
    the function, which takes longer than the rest of a scan.
    """
    match dialect:
        case "postgresql":
            variants = json_in(column, "variants", dialect)
            has_some = func.jsonb_typeof(variants) == "object"
            of_object = case((has_some, variants))
            variant = func.jsonb_each(of_object).table_valued(named_column("key", Text()), named_column("value", JSONB()))
            return variant, variant.c.value, has_some
        case "sqlite":  # a JSON function fails there on a value that is not JSON
            kind = where_json(column, func.json_type(column, literal_column("'$.variants'")))
            of_object = case((kind == "object", json_in(column, "variants", dialect)))
            variant = func.json_each(of_object).table_valued(named_column("value", Text()), named_column("type", Text()))
            return variant, case((variant.c.type == "object", variant.c.value)), kind == "object"
        case _:
            of_json = where_json(column, column)
            each = func.json_table(of_json, literal_column("'$.variants.*' COLUMNS (value JSON PATH '$')"))
            variant = each.table_valued(named_column("value", Text()))
            return variant, variant.c.value, func.json_exists(of_json, literal_column("'$.variants.*'"), type_=Boolean())


def where_json(column: ColumnElement[Any], value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a value that SQL reads from a column's JSON; NULL, and no error, where the column contains none."""
    return case((func.json_valid(column) == 1, value))


def fitting_name(prefix: str, rest: str) -> str:
    """Cut a name that is too long, and let digits tell it from others that begin alike."""
    if len(f"{prefix}{rest}".encode()) <= _LONGEST_NAME:
        return f"{prefix}{rest}"
    digits = sha256(rest.encode()).hexdigest()[:_DIGITS]
    room = _LONGEST_NAME - len(prefix) - _DIGITS - 1
    return f"{prefix}{rest.encode()[:room].decode(errors='ignore')}_{digits}"
