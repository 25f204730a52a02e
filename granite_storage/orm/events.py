"""The listeners for SQLAlchemy's events."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Result, Update, event
from sqlalchemy.orm import EXT_CONTINUE, InstanceState, Mapper, ORMExecuteState, Session, SessionTransaction, registry
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import ObjectDeletedError
from sqlalchemy.orm.unitofwork import UOWTransaction

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm import bulk, collections, flush, transactions
from granite_storage.orm._interfaces import find_binding
from granite_storage.orm._util import executed_statement, written_within
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType, require_usable, slots_of
from granite_storage.orm.transactions import Change


def listen() -> None:
    """Start listening, when the first base is bound."""
    for target, name, listener, options in _LISTENERS:
        event.listen(target, name, listener, **options)


def unlisten() -> None:
    """Stop listening, when the last base is unbound."""
    for target, name, listener, _ in _LISTENERS:
        event.remove(target, name, listener)
    for mapper in _followed:
        for name in ("before_insert", "before_update"):
            if event.contains(mapper, name, _before_write_of_class):
                event.remove(mapper, name, _before_write_of_class)
    _followed.clear()
    bulk.unlisten_all()
    transactions.unlisten_all()


def _before_flush(session: Session, context: UOWTransaction, _: Any) -> None:
    _flushes[session] = weakref.ref(context)
    unit = transactions.known_unit(session)
    if unit is not None:
        # A flush that failed before its first statement has left its plan.
        unit.abandon_flush()
    if collections.file_classes:
        collections.keep_listed(session)
        collections.require_known_limits(session)
    written, deleted = [*session.new, *session.dirty], [*session.deleted]
    mappers = _mappers_of([*written, *deleted])
    _idle.clear()
    _idle.update(id(mapper) for mapper in mappers.values() if not slots_of(mapper) and not flush.concerned_tables(mapper))
    _last.clear()
    for mapper in mappers.values():
        if id(mapper) not in _idle and slots_of(mapper):
            _stay_last(mapper)
    concerned = _concerned(written, mappers, slots_of)
    changes = _changes_of(concerned)
    deletions = _concerned(deleted, mappers, flush.concerned_tables)
    _save(
        session,
        changes,
        deletions,
        weakref.ref(context),
        [instance_state(instance) for instance in session.dirty],
        has_orphans=any(map(flush.is_orphan, concerned)),
        lock_parents=collections.lock_parents if collections.file_classes else None,
    )


def _changes_of(states: list[InstanceState[Any]]) -> list[Change]:
    changes = flush.changes_of(states)
    for change in changes:
        if change.value is not None:
            require_sound(change.state.mapper)
    return changes


def _stay_last(mapper: Mapper[Any]) -> None:
    """Add a listener after those of one class, to see what they set: they are called after the listeners of all classes."""
    _last.add(id(mapper))
    for name, listener in (("before_insert", _before_insert), ("before_update", _before_write)):
        *_, last = getattr(mapper.dispatch, name)
        if last is listener or last is _before_write_of_class:
            continue
        if event.contains(mapper, name, _before_write_of_class):
            event.remove(mapper, name, _before_write_of_class)
        event.listen(mapper, name, _before_write_of_class, **_RAW)
        _followed.add(mapper)


def _mappers_of(instances: list[object]) -> dict[type, Mapper[Any]]:
    """Return the mappers of the instances by class."""
    samples = dict(zip(map(type, instances), instances, strict=True))
    return {kind: instance_state(sample).mapper for kind, sample in samples.items()}


def _concerned(
    instances: list[object], mappers: dict[type, Mapper[Any]], by: Callable[[Mapper[Any]], Sequence[Any]]
) -> list[InstanceState[Any]]:
    """Return the states of the instances for whose mapper a function returns anything."""
    kinds = {kind for kind, mapper in mappers.items() if id(mapper) not in _idle and by(mapper)}
    return [instance_state(instance) for instance in instances if type(instance) in kinds] if kinds else []


def _save(
    session: Session,
    changes: list[Change],
    deletions: list[InstanceState[Any]],
    context: weakref.ref[UOWTransaction] | None = None,
    dirty: Sequence[InstanceState[Any]] = (),
    *,
    has_orphans: bool = False,
    lock_parents: Callable[[Session], None] | None = None,
) -> None:
    if changes or deletions or has_orphans:
        unit = transactions.unit_of(session)
        unit.flush.context = unit.flush.context or context
        flush.save(session, unit, changes, deletions, dirty, lock_parents)
    elif lock_parents is not None:
        lock_parents(session)


# The newest flush of each session.
_flushes: weakref.WeakKeyDictionary[Session, weakref.ref[UOWTransaction]] = weakref.WeakKeyDictionary()

# Ids of the mappers of the newest flush whose rows have no attachments. The three listeners below are called for each row of
# each model, so they return early for these, and are registered with `raw` and `retval` to be called without a wrapper.
_idle: set[int] = set()

# Mappers whose classes have listeners of their own, after which ours is called again; and the ids of those of the newest flush
# that were checked for such listeners.
_followed: weakref.WeakSet[Mapper[Any]] = weakref.WeakSet()
_last: set[int] = set()


def _before_write(mapper: Mapper[Any], _: Connection, state: InstanceState[Any]) -> Any:
    """Store attachments that listeners of the application have set since `before_flush`."""
    session = state.session if id(mapper) not in _idle else None
    if session is not None:
        if id(mapper) not in _last and slots_of(mapper):
            _stay_last(mapper)  # of a row that a listener has added
        unit = transactions.known_unit(session)
        if unit is not None:
            unit.flush.has_written = True
        changes = _changes_of([state])
        late = [change for change in changes if unit is None or not unit.flush.has_handled(change.marker, change.value)]
        _save(session, late, [])
        _revise(session)
    return EXT_CONTINUE


def _revise(session: Session) -> None:
    unit = transactions.known_unit(session)
    if unit is not None:
        flush.recheck_moves(session, unit)


def _before_write_of_class(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> Any:
    """Store attachments that the listeners of one class have set."""
    return _before_write(mapper, connection, state)


def _before_insert(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> Any:
    """Displace the objects of a deleted instance or orphan whose row a new instance with the same primary key replaces."""
    session = state.session if id(mapper) not in _idle and slots_of(mapper) else None
    if session is not None:
        instance = state.obj()
        replaced = session.identity_map.get(mapper.identity_key_from_instance(instance))
        if replaced is not None and _has_same_key(mapper, replaced, instance):
            _before_delete(mapper, connection, instance_state(replaced))
            flush.clear_unset_attachments(state)
            transactions.unit_of(session).flush.has_successors = True
    return _before_write(mapper, connection, state)


def _has_same_key(mapper: Mapper[Any], replaced: object, instance: object) -> bool:
    """Return whether an instance of the session still has a row, with the key of a new one."""
    try:
        return mapper.primary_key_from_instance(replaced) == mapper.primary_key_from_instance(instance)
    except ObjectDeletedError:  # it was expired and its row is gone, which SQLAlchemy will find as well
        return False


def _before_delete(mapper: Mapper[Any], _: Connection, state: InstanceState[Any]) -> Any:
    """Displace the objects of a relationship's orphans, which become deletions only inside the flush."""
    session = state.session if id(mapper) not in _idle and flush.concerned_tables(mapper) else None
    if session is not None:
        _revise(session)
        unit = transactions.known_unit(session)
        if unit is None or id(state) not in unit.flush.deletions:
            _save(session, [], [state])
        elif unit.flush.has_written:
            flush.recheck_cascades(unit)
    return EXT_CONTINUE


def _after_flush(session: Session, _: Any) -> None:
    if collections.file_classes:
        collections.require_limits(session)
    unit = transactions.known_unit(session)
    if unit is not None:
        flush.end(session, unit)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    transactions.begin(transaction, connection)
    if session in bulk.guards:
        bulk.begin_connection(session, connection)


def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None and not transaction.nested and not _begins_flush(session):
        bulk.begin_transaction(session, transaction)


def _begins_flush(session: Session) -> bool:
    """Return whether the subtransaction that has just begun is that of a flush."""
    found = _flushes.get(session)
    context = None if found is None else found()
    return context is not None and context.has_work and getattr(context, "transaction", None) is None


def _on_execute(state: ORMExecuteState) -> Result[Any] | None:
    """Pass statements that write rows to `bulk`."""
    statement = executed_statement(state)
    if isinstance(statement, Insert | Update | Delete) or next(written_within(statement), None) is not None:
        return bulk.on_execute(state)
    return None


def _after_commit(session: Session) -> None:
    unit = transactions.known_unit(session)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if unit is not None and transaction is not None and transaction in unit.frames:
        unit.frames[transaction].committed = True
        if transaction.parent is None:
            transactions.expect_end(session, transaction)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if session in bulk.guards:
        bulk.end_transaction(session, transaction)
    unit = transactions.known_unit(session)
    if unit is None:
        return
    if transaction.parent is None:
        transactions.conclude(session, transaction)
    elif transaction in unit.frames:
        unit.abandon_flush()
        unit.end_savepoint(transaction)


# Assignments to attachment attributes are checked at once.


_SEVERAL = re.compile(
    r"\b(?:list|set|frozenset|tuple|dict|List|Set|FrozenSet|Tuple|Dict|Sequence|MutableSequence|Collection|Iterable|Mapping)\["
)

_guarded: weakref.WeakSet[Mapper[Any]] = weakref.WeakSet()

# Errors of mappers that were declared after their base was bound; SQLAlchemy raises such an error only once.
_refused: weakref.WeakKeyDictionary[Mapper[Any], str] = weakref.WeakKeyDictionary()


def release() -> None:
    """Remove the listeners of attributes whose base is no longer bound."""
    for mapper in list(_guarded):
        if not _is_bound(mapper):
            _guarded.remove(mapper)
            _refused.pop(mapper, None)
            for slot in slots_of(mapper):
                attribute = getattr(mapper.class_, slot.key)
                if event.contains(attribute, "set", _check):  # false for an attribute that was added to the class later
                    event.remove(attribute, "set", _check)


def require_single(base: Any) -> None:
    """Raise if a base has an attribute that is annotated as several attachments, whether its mapper is configured or not.

    Raises:
        ConfigurationError: It has one; no listener was added.
    """
    for mapper in _mapped_below(base):
        for key, column in mapper.columns.items():  # its attributes would configure it
            if isinstance(column.type, AttachmentType):
                _require_one(mapper, key)


def guard_base(base: Any) -> None:
    """Add the listeners to mappers that were configured before their base was bound."""
    for mapper in _mapped_below(base):
        if mapper.configured:
            _guard(mapper)


def require_sound(mapper: Mapper[Any]) -> None:
    """Raise the error of a mapper that was refused when it was configured.

    Raises:
        ConfigurationError: It was refused; the message is the same.
    """
    refusal = _refused.get(mapper) if _refused else None
    if refusal is not None:
        raise ConfigurationError(refusal, see=Page.COLLECTIONS)


def _mapped_below(base: Any) -> list[Mapper[Any]]:
    mappers = getattr(base, "registry", None) or getattr(base, "_sa_registry", None)
    if not isinstance(mappers, registry):
        return []
    # `mappers.mappers` raises while an abstract concrete base waits for its classes
    return [manager.mapper for manager in list(mappers._managers) if manager.is_mapped]


def _guard(mapper: Mapper[Any], _: Any = None) -> None:
    if mapper in _guarded or not _is_bound(mapper):
        return
    _guarded.add(mapper)
    for slot in slots_of(mapper):
        event.listen(getattr(mapper.class_, slot.key), "set", _check, raw=True, retval=True, include_key=True)
    try:
        for slot in slots_of(mapper):
            require_usable(slot.column)
            _require_one(mapper, slot.key)
    except ConfigurationError as error:
        _refused[mapper] = str(error)
        raise


def _require_one(mapper: Mapper[Any], key: str) -> None:
    """Raise if an attribute is annotated as several attachments."""
    for kind in mapper.class_.__mro__:
        annotation = vars(kind).get("__annotations__", {}).get(key)
        if annotation is not None:
            if _SEVERAL.search(annotation if isinstance(annotation, str) else repr(annotation)):
                raise ConfigurationError(
                    f"{mapper.class_.__name__}.{key} is annotated as several attachments, but a column holds one: declare it as"
                    " Mapped[AttachmentList] = attachments(...), which gives each file a row of its own",
                    see=Page.COLLECTIONS,
                )
            return


def _is_bound(mapper: Mapper[Any]) -> bool:
    return any(find_binding(slot.column_type.table.metadata) is not None for slot in slots_of(mapper))


def _check(state: Any, value: Any, _: Any, initiator: Any, **__: Any) -> Any:
    require_sound(state.mapper)
    if isinstance(value, Attachment):
        value._state.note_assignment(state, initiator.key)
    elif value is not None:
        raise flush.refused_value(value, f"{state.class_.__name__}.{initiator.key}")
    return value


# The listeners.


_RAW = {"raw": True, "retval": True}

# Before listeners of the application, which may raise, so that the end of a transaction is never missed.
_FIRST = {"insert": True}

_LISTENERS: list[tuple[Any, str, Any, dict[str, Any]]] = [
    (Session, "before_flush", _before_flush, {}),
    (Session, "after_flush", _after_flush, {}),
    (Session, "after_begin", _after_begin, {}),
    (Session, "after_transaction_create", _after_transaction_create, {}),
    (Session, "after_commit", _after_commit, _FIRST),
    (Session, "after_transaction_end", _after_transaction_end, _FIRST),
    (Session, "do_orm_execute", _on_execute, {}),
    (Mapper, "mapper_configured", _guard, {}),
    (Mapper, "before_insert", _before_insert, _RAW),
    (Mapper, "before_update", _before_write, _RAW),
    (Mapper, "before_delete", _before_delete, _RAW),
]
