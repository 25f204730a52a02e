"""A model of the protocol between writers of rows, triggers on PostgreSQL, and workers, and a search of all its states.

It follows the code statement by statement. Writers run programs, at READ COMMITTED or with a snapshot; a step that needs a lock
is possible once the lock is free. Workers take the steps of `recovery.py`, transaction by transaction. Clocks are adversarial:
what is pending is due, and a worker may take over what another one has fenced, at any moment.

Two invariants are checked. In every state, the object of each committed row exists. When writers and workers rest, each object
has a row, an intent or a fence.

`Rules` says which rules the model follows; without one of them the search has to find a violation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

__all__ = [
    "READ_COMMITTED",
    "SNAPSHOT",
    "Program",
    "Result",
    "Rules",
    "Scenario",
    "adopt",
    "delete_intent",
    "explore",
    "nominate_what_was_read",
    "restore",
    "sql",
    "upload",
    "upload_intent",
]

READ_COMMITTED, SNAPSHOT = "READ COMMITTED", "REPEATABLE READ"

Label: TypeAlias = tuple[Any, ...]
Op: TypeAlias = tuple[Any, ...]
"""The name of a step of a writer, and its arguments."""
Program: TypeAlias = tuple[Op, ...]


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol, by default as they are implemented.

    Attributes:
        guards: Triggers guard what is written; otherwise they only nominate.
        locks_intents: A guard locks the pending intents of a location; otherwise it only looks for them.
        locks_all_intents: It locks all of them; otherwise one.
        locks_holder: It locks the row that holds a location; otherwise it only looks for it.
        looks_for_fence: When it looks for a fence of the location: before or after it locks the evidence, or never.
        updates_intent: To nominate what is nominated already changes that intent; otherwise it does nothing.
        derives_ids: An object has one intent to delete it; otherwise each writer records its own.
        mistrusts_truncate: After a TRUNCATE with a snapshot, what the transaction itself has nominated is no evidence.
        consumption_must_match: A session that finds no intent to consume fails.
        restore_looks_for_fence: A session that restores an object looks for its fence once it has consumed the intent.
        decides: A session decides on an upload that its snapshot does not see.
        looks_after_deciding: It looks for the intent afterwards.
        cancels_held_only: A session cancels the intents of objects that its rows refer to; otherwise all that it has recorded.
        adoption: When `adopt` sees that an object exists: before it commits the intent, afterwards, or never.
        locks_beside: A worker leaves an object alone if another intent of it is locked.
        fences_uploads_beside: It fences the uploads that are pending beside what it has picked.
        leaves_what_is_decided: It leaves all intents of an object alone on which a transaction is deciding.
        checks_references: It looks for rows that refer to what it has fenced.
        checks_own: It sees in the same snapshot that the fence is still its own.
        lifts_own: It lifts no fence that another worker has taken over.
        drops_newer: With the fence of a deleted object, the other intents of that object are deleted.
        waits_for_locked: The fence stays while one of those is locked.
        keeps_tombstone: The fence of an upload stays after its object was deleted, because the object may arrive later.
        tells_takeovers_apart: No worker has a fence for its own that another one has put or changed since.
    """

    guards: bool = True
    locks_intents: bool = True
    locks_all_intents: bool = True
    locks_holder: bool = True
    looks_for_fence: Literal["after", "before", "never"] = "after"
    updates_intent: bool = True
    derives_ids: bool = True
    mistrusts_truncate: bool = True
    consumption_must_match: bool = True
    restore_looks_for_fence: bool = True
    decides: bool = True
    looks_after_deciding: bool = True
    cancels_held_only: bool = True
    adoption: Literal["before", "afterwards", "never"] = "before"
    locks_beside: bool = True
    fences_uploads_beside: bool = True
    leaves_what_is_decided: bool = True
    checks_references: bool = True
    checks_own: bool = True
    lifts_own: bool = True
    drops_newer: bool = True
    waits_for_locked: bool = True
    keeps_tombstone: bool = True
    tells_takeovers_apart: bool = True


# Programs of writers.


def sql(level: str, *steps: Any, ends: str = "end") -> Program:
    """Return a transaction of SQL that bypasses the sessions.

    Args:
        level: Its isolation level.
        *steps: `(row, location)` writes a row, with None to delete it; `"truncate"`, `"savepoint"`, `"rollback to"`; other
            steps are taken as they are.
        ends: How it ends: by a COMMIT that may fail, or by one that does not.
    """
    ops: list[Op] = [("begin", level == SNAPSHOT)]
    for step in steps:
        if step == "truncate":
            ops += [("lock table",), ("nominate all",), ("truncate",)]
        elif isinstance(step, str):
            ops.append((step,))
        elif isinstance(step[0], int):
            ops += _write(*step)
        else:
            ops.append(step)
    return (*ops, (ends,))


def _write(row: int, location: str | None) -> list[Op]:
    if location is None:
        return [("lock row", row), ("delete", row)]
    guard = [(name, location) for name in ("look for intents", "lock intent", "look for rows", "lock holder")]
    return [("lock row", row), ("nominate old", row, location), *guard, ("write", row, location)]


def upload(level: str, row: int, location: str, *, stores_first: bool = False) -> Program:
    """Return a session that stores an object and gives it to a row.

    Args:
        level: Its isolation level.
        row: The row.
        location: Where the object is stored.
        stores_first: Whether it is stored before the transaction begins, and not in its flush.
    """
    storing: Program = (("record upload", location), ("put", location))
    claim: Program = (("decide", location), ("look for upload", location)) if level == SNAPSHOT else ()
    begin, *rest = sql(level, (row, location), ("consume", upload_intent(location)))
    first = (*storing, begin) if stores_first else (begin, *storing)
    return (*first, *claim, *rest)


def restore(level: str, row: int, location: str) -> Program:
    """Return a session that gives an object to a row which waits to be deleted."""
    consumption = ("consume", delete_intent(location)), ("restored", location)
    return (("look for delete", location), *sql(level, (row, location), *consumption))


def adopt(row: int, location: str) -> Program:
    """Return a program that adopts an object and then loads a row that refers to it."""
    adoption: Program = (
        ("exists", location),
        ("begin", False),
        ("nominate", location),
        ("renew upload", location),
        ("look for fence", location),
        ("exists before", location),
        ("end",),
        ("exists afterwards", location),
        ("withdraw", location),
    )
    return (*adoption, *sql(READ_COMMITTED, (row, location)))


def nominate_what_was_read(row: int, location: str) -> Program:
    """Return a program that breaks the protocol: it nominates an object that a row held earlier, without the row's lock."""
    return (("read", row, location), *sql(READ_COMMITTED, ("nominate", location)))


def delete_intent(location: str) -> str:
    """Return the intent to delete an object."""
    return f"D:{location}"


def upload_intent(location: str) -> str:
    """Return the intent of an upload."""
    return f"U:{location}"


def _location(intent: str) -> str:
    return intent.partition(":")[2]


def _is_upload(intent: str) -> bool:
    return intent[0] == "U"


# States.


class Snapshot(NamedTuple):
    """What a transaction sees of what others have committed."""

    rows: tuple[str | None, ...]
    intents: frozenset[str]
    fenced: frozenset[str]
    decisions: frozenset[str]


class Transaction(NamedTuple):
    """What a writer has locked and written, and has not committed yet.

    Attributes:
        snapshot: Its snapshot, None at READ COMMITTED.
        stale: The rows and intents that others have changed since.
        rows: The rows that it has locked to change them.
        shared: The rows that it has locked as evidence.
        writes: The rows that it has written.
        locked: The intents that it has only locked.
        put: Those that it has inserted or updated.
        gone: Those that it has deleted.
        decided: The uploads that it has decided on.
        claimed: The locations that guards need not ask about.
        has_table: Whether it has locked the table of the rows exclusively.
        truncated: Whether it has truncated it with a snapshot.
        has_truncated: Whether it has truncated it.
    """

    snapshot: Snapshot | None = None
    stale: frozenset[Any] = frozenset()
    rows: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()
    writes: tuple[tuple[int, str | None], ...] = ()
    locked: frozenset[str] = frozenset()
    put: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    decided: frozenset[str] = frozenset()
    claimed: frozenset[str] = frozenset()
    has_table: bool = False
    truncated: bool = False
    has_truncated: bool = False


class Writer(NamedTuple):
    """Where a writer is in its program; `step` is -1 when it has ended.

    Attributes:
        step: The next step.
        tx: Its transaction.
        todo: What a statement has found and is still to lock.
        is_known: Whether a guard has found evidence.
        savepoint: Its transaction as it was at the savepoint.
    """

    step: int = 0
    tx: Transaction | None = None
    todo: tuple[Any, ...] = ()
    is_known: bool = False
    savepoint: Transaction | None = None


class Fence(NamedTuple):
    """A row of `reclaim`.

    Attributes:
        id: The intent.
        attempts: How often a worker has failed.
        takeovers: How many workers have taken it over since.
        mark: What tells it apart from what the claims of workers say of it that are not its owners.
        is_emptied: Whether its object was deleted.
    """

    id: str
    attempts: int = 0
    takeovers: int = 1
    mark: int = 0
    is_emptied: bool = False

    @property
    def location(self) -> str:
        return _location(self.id)

    @property
    def token(self) -> tuple[str, int, int, int]:
        """What a worker knows its own fence by."""
        return self[:4]


class Worker(NamedTuple):
    """What a worker does next.

    Attributes:
        phase: Its next step.
        ids: The intents that it is about to fence; later those of what rows refer to.
        locked: The intents that it has locked.
        others: Those that are pending beside the picked ones, or when their objects are deleted, and that it is still to lock.
        taken: The uploads whose transactions have decided and committed.
        decided: The uploads that it has decided against.
        claims: The fences that it has put or taken over.
        busy: The locations of which another transaction has locked an intent.
    """

    phase: str = "idle"
    ids: frozenset[str] = frozenset()
    locked: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()
    taken: frozenset[str] = frozenset()
    decided: frozenset[str] = frozenset()
    claims: frozenset[Fence] = frozenset()
    busy: frozenset[str] = frozenset()


IDLE = Worker()
ENDED = Writer(step=-1)


class State(NamedTuple):
    """What is committed and stored, and how far writers and workers are.

    Attributes:
        objects: The locations of the objects that exist.
        rows: What each row refers to.
        intents: The pending intents.
        fences: The fenced ones.
        decisions: The uploads on which a transaction has decided, with "+", or a worker, with "-".
        writers: The writers.
        workers: The workers.
        faults: How many more workers may die or fail.
        takeovers: How many more times a fence may be taken over.
    """

    objects: frozenset[str]
    rows: tuple[str | None, ...]
    intents: frozenset[str]
    fences: frozenset[Fence]
    decisions: frozenset[str]
    writers: tuple[Writer, ...]
    workers: tuple[Worker, ...]
    faults: int
    takeovers: int

    @property
    def fenced(self) -> frozenset[str]:
        """The locations that are fenced."""
        return frozenset(fence.location for fence in self.fences)


@dataclass(frozen=True)
class Scenario:
    """What the search begins with.

    Attributes:
        writers: The programs of the writers.
        rows: What the rows refer to.
        intents: The intents that are pending.
        decisions: The uploads on which transactions have decided and committed.
        workers: How many workers there are.
        faults: How many times a worker may die or fail.
        takeovers: How many times a fence may be taken over.
        may_leave: Whether objects may be left to the collector.
    """

    writers: tuple[Program, ...]
    rows: tuple[str | None, ...] = ("o",)
    intents: frozenset[str] = frozenset()
    decisions: frozenset[str] = frozenset()
    workers: int = 1
    faults: int = 1
    takeovers: int = 1
    may_leave: bool = False

    def begin(self) -> State:
        stored = {location for location in self.rows if location is not None} | {_location(item) for item in self.intents}
        return State(
            frozenset(stored),
            self.rows,
            self.intents,
            frozenset(),
            frozenset(f"+{item}" for item in self.decisions),
            tuple(_begun(Writer(), program) for program in self.writers),
            (IDLE,) * self.workers,
            self.faults,
            self.takeovers,
        )


Successor: TypeAlias = tuple[Label, State]


class Protocol:
    """The successors of the states of a scenario."""

    def __init__(self, scenario: Scenario, rules: Rules) -> None:
        self.scenario = scenario
        self.rules = rules
        self._put_at = [{op[1]: number for number, op in enumerate(program) if op[0] == "put"} for program in scenario.writers]

    def successors(self, state: State) -> list[Successor]:
        found: list[Successor] = []
        for number, writer in enumerate(state.writers):
            if writer.step >= 0:
                found += self._writer(state, number, writer)
        for number, worker in enumerate(state.workers):
            if number == 0 or (worker is not state.workers[number - 1] and worker != state.workers[number - 1]):
                found += self._worker(state, number, worker)
        if not found:  # a deadlock, of which the database chooses a victim
            for number, writer in enumerate(state.writers):
                if writer.tx is not None:
                    found.append((("writer", number, "is the victim of a deadlock"), _with_writer(state, number, ENDED)))
        return found

    def find_violation(self, state: State) -> str | None:
        if missing := [location for location in state.rows if location is not None and location not in state.objects]:
            return f"a row refers to {', '.join(missing)}, which is gone"
        if self.scenario.may_leave or any(worker.phase != "idle" for worker in state.workers):
            return None
        if any(writer.step >= 0 for writer in state.writers):
            return None
        left = state.objects.difference(state.rows, map(_location, state.intents), state.fenced)
        return f"{', '.join(sorted(left))} is left" if left else None

    # Locks.

    def _has_row(self, state: State, number: int, row: int, *, shared: bool) -> bool:
        """Return whether another transaction has a row locked so that this lock waits for it."""
        for other, writer in enumerate(state.writers):
            tx = writer.tx
            if other != number and tx is not None and (row in tx.rows or tx.has_table or (not shared and row in tx.shared)):
                return True
        return False

    def _has_table(self, state: State, number: int = -1) -> bool:
        return any(
            other != number and writer.tx is not None and writer.tx.has_table for other, writer in enumerate(state.writers)
        )

    def _has_intent(self, state: State, item: str, *, writer: int = -1, worker: int = -1) -> bool:
        """Return whether another transaction has an intent locked."""
        for other, one in enumerate(state.writers):
            tx = one.tx
            if other != writer and tx is not None and (item in tx.locked or item in tx.put or item in tx.gone):
                return True
        return any(other != worker and item in one.locked for other, one in enumerate(state.workers))

    # Writers.

    def _writer(self, state: State, number: int, writer: Writer) -> Iterator[Successor]:
        name, *arguments = op = self.scenario.writers[number][writer.step]
        tx, rules = writer.tx, self.rules
        label: Label = ("writer", number, *op)

        def go(tx: Transaction | None = tx, *, state: State = state, steps: int = 1, **changes: Any) -> Successor:
            new = writer._replace(tx=tx, step=writer.step + steps, **changes)
            return label, _with_writer(state, number, _begun(new, self.scenario.writers[number]))

        def stop(reason: str) -> Successor:
            return (*label, reason), _with_writer(state, number, ENDED)

        match name:
            # Steps outside of a transaction.
            case "begin":
                snapshot = Snapshot(state.rows, state.intents, state.fenced, state.decisions) if arguments[0] else None
                yield go(Transaction(snapshot))
            case "record upload":
                item = upload_intent(arguments[0])
                yield go(state=_changed(state, {item}, but=number)._replace(intents=state.intents | {item}))
            case "put":
                yield go(state=state._replace(objects=state.objects | {arguments[0]}))
            case "read":
                yield go() if state.rows[arguments[0]] == arguments[1] else stop("it holds another one")
            case "look for delete":
                yield go() if self._deletes(state.intents, arguments[0]) else stop("there is none")
            case "exists":
                yield go() if arguments[0] in state.objects else stop("it is gone")
            case "exists afterwards":
                if rules.adoption == "afterwards" and arguments[0] not in state.objects:
                    yield go()
                else:
                    yield go(steps=2)
            case "withdraw":
                if not self._has_intent(state, delete_intent(arguments[0])):
                    gone = frozenset([delete_intent(arguments[0])])
                    yield label, _with_writer(_without_intents(state, gone), number, ENDED)
            case _:
                assert tx is not None
                yield from self._statement(state, number, writer, tx, op, go, stop)

    def _statement(
        self, state: State, number: int, writer: Writer, tx: Transaction, op: Op, go: Any, stop: Any
    ) -> Iterator[Successor]:
        name, *arguments = op
        rules = self.rules
        sees = tx.snapshot or state
        match name:
            case "end" | "commit":
                yield go(None, state=self._committed(state, number, tx), savepoint=None)
                if name == "end":
                    yield stop("it is rolled back")
            case "savepoint":
                yield go(savepoint=tx)
            case "rollback to":
                assert writer.savepoint is not None
                yield go(writer.savepoint._replace(stale=tx.stale, snapshot=tx.snapshot), savepoint=None)
            # What an UPDATE, INSERT or DELETE does.
            case "lock row":
                row = arguments[0]
                if row in tx.rows or tx.has_table:
                    yield go()
                elif not self._has_row(state, number, row, shared=False):
                    yield stop("the row has changed") if row in tx.stale else go(tx._replace(rows=tx.rows | {row}))
            case "nominate old":
                row, new = arguments
                old = dict(tx.writes).get(row, state.rows[row])
                if old == new:
                    yield go(steps=6)
                else:
                    yield from self._nominate(state, number, tx, [] if old is None else [old], go, stop)
            case "delete":
                row = arguments[0]
                old = dict(tx.writes).get(row, state.rows[row])
                gone = _written(tx, {row: None})
                yield from self._nominate(state, number, gone, [] if old is None else [old], go, stop)
            case "look for intents":
                location = arguments[0]
                if not rules.guards or location in tx.claimed:
                    yield go(steps=4)
                elif rules.looks_for_fence == "before" and not writer.is_known and location in state.fenced:
                    yield stop("it is fenced")
                elif rules.looks_for_fence == "before" and not writer.is_known:
                    yield go(steps=0, is_known=True)
                else:
                    ids = sorted(item for item in (sees.intents - tx.gone) | tx.put if _location(item) == location)
                    if tx.truncated and rules.mistrusts_truncate:
                        ids = [item for item in ids if item not in tx.put]
                    if not rules.locks_all_intents:
                        ids = ids[:1]
                    if not rules.locks_intents:
                        yield go(steps=4 if ids else 2, is_known=bool(ids))
                    else:
                        yield go(todo=tuple(ids), is_known=False, steps=1 if ids else 2)
            case "lock intent":
                yield from self._lock_intent(state, number, writer, tx, go, stop)
            case "look for rows":
                location = arguments[0]
                if writer.is_known:
                    yield go(steps=2)
                elif not self._has_table(state, number):
                    written = dict(tx.writes)
                    rows = [row for row, held in enumerate(sees.rows) if written.get(row, held) == location]
                    if not rows:
                        yield stop("there is no evidence")
                    elif not rules.locks_holder:
                        yield go(steps=2, is_known=True)
                    else:
                        yield go(todo=tuple(rows))
            case "lock holder":
                yield from self._lock_holder(state, number, writer, tx, arguments[0], go, stop)
            case "write":
                row, location = arguments
                is_guarded = rules.guards and location not in tx.claimed and rules.looks_for_fence == "after"
                if is_guarded and location in sees.fenced:
                    yield stop("it is fenced")
                else:
                    yield go(_written(tx, {row: location}), is_known=False)
            # What a TRUNCATE does.
            case "lock table":
                others = [one.tx for other, one in enumerate(state.writers) if other != number and one.tx is not None]
                if not any(other.rows or other.shared or other.has_table for other in others):
                    yield go(tx._replace(has_table=True, truncated=tx.truncated or tx.snapshot is not None))
            case "nominate all":
                written = dict(tx.writes)
                seen = [written.get(row, held) for row, held in enumerate(sees.rows)]
                yield from self._nominate(state, number, tx, [one for one in seen if one is not None], go, stop)
            case "truncate":
                yield go(_written(tx, dict.fromkeys(range(len(state.rows)), None))._replace(has_truncated=True))
            # What sessions and `adopt` do besides.
            case "decide":
                yield from self._decide(state, number, tx, upload_intent(arguments[0]), go, stop)
            case "look for upload":
                item = upload_intent(arguments[0])
                if rules.looks_after_deciding and item not in state.intents:
                    yield stop("it is reclaimed")
                else:
                    yield go(tx._replace(claimed=tx.claimed | {arguments[0]}))
            case "consume":
                yield from self._consume(state, number, tx, arguments[0], go, stop)
            case "cancel":
                ids = {delete_intent(location) for location in arguments} if rules.cancels_held_only else set(tx.put)
                yield from self._delete(state, number, tx, ids, go, stop)
            case "nominate":
                yield from self._nominate(state, number, tx, arguments, go, stop)
            case "renew upload":
                item = upload_intent(arguments[0])
                if item not in state.intents:
                    yield go()
                elif not self._has_intent(state, item, writer=number):
                    yield go(tx._replace(put=tx.put | {item}))
            case "look for fence":
                yield stop("it is fenced") if arguments[0] in state.fenced else go()
            case "restored":
                is_fenced = rules.restore_looks_for_fence and arguments[0] in state.fenced
                yield stop("it is fenced") if is_fenced else go()
            case "exists before":
                is_gone = rules.adoption == "before" and arguments[0] not in state.objects
                yield stop("it is gone") if is_gone else go()
            case _:
                raise AssertionError(op)

    def _nominate(
        self, state: State, number: int, tx: Transaction, locations: Iterable[str], go: Any, stop: Any
    ) -> Iterator[Successor]:
        put = set(tx.put)
        for location in locations:
            item = delete_intent(location) if self.rules.derives_ids else f"D{number}:{location}"
            if item in put:
                continue
            if self._has_intent(state, item, writer=number):
                return
            is_there = item in state.intents and item not in tx.gone
            if item in tx.stale and item in state.intents:
                yield stop("the intent has changed")
                return
            if self.rules.updates_intent or not is_there:
                put.add(item)
        yield go(tx._replace(put=frozenset(put)))

    def _deletes(self, intents: Iterable[str], location: str) -> list[str]:
        return sorted(item for item in intents if not _is_upload(item) and _location(item) == location)

    def _lock_intent(self, state: State, number: int, writer: Writer, tx: Transaction, go: Any, stop: Any) -> Iterator[Successor]:
        if not writer.todo:
            yield go(steps=3 if writer.is_known else 1)
            return
        item, *rest = writer.todo
        steps = 0 if rest else 3
        if item in tx.put or item in tx.locked:
            yield go(steps=steps, todo=tuple(rest), is_known=True)
        elif not self._has_intent(state, item, writer=number):
            if item in tx.stale:
                yield stop("the intent has changed")
            elif item not in state.intents:
                yield go(steps=0 if rest else 1, todo=tuple(rest))
            else:
                yield go(tx._replace(locked=tx.locked | {item}), steps=steps, todo=tuple(rest), is_known=True)

    def _lock_holder(
        self, state: State, number: int, writer: Writer, tx: Transaction, location: str, go: Any, stop: Any
    ) -> Iterator[Successor]:
        if not writer.todo:
            yield stop("there is no evidence")
            return
        row, *rest = writer.todo
        if row in dict(tx.writes) or row in tx.rows:
            yield go(todo=(), is_known=True)
        elif not self._has_row(state, number, row, shared=True):
            if row in tx.stale:
                yield stop("the row has changed")
            elif state.rows[row] == location:
                yield go(tx._replace(shared=tx.shared | {row}), todo=(), is_known=True)
            else:
                yield go(steps=0, todo=tuple(rest))

    def _decide(self, state: State, number: int, tx: Transaction, item: str, go: Any, stop: Any) -> Iterator[Successor]:
        assert tx.snapshot is not None
        if item in tx.snapshot.intents:
            yield go(steps=2)
        elif not self.rules.decides:
            yield go(tx)
        elif any(item in one.decided for one in state.workers):
            return
        elif f"-{item}" in state.decisions or f"+{item}" in state.decisions:
            yield stop("a worker has decided against it")
        else:
            yield go(tx._replace(decided=tx.decided | {item}))

    def _consume(self, state: State, number: int, tx: Transaction, item: str, go: Any, stop: Any) -> Iterator[Successor]:
        sees = tx.snapshot or state
        if not self.rules.derives_ids and not _is_upload(item):
            item = next(iter(self._deletes(sees.intents, _location(item))), item)
        is_seen = item in (sees.intents - tx.gone) | tx.put
        if is_seen:
            yield from self._delete(state, number, tx, {item}, go, stop, must_match=self.rules.consumption_must_match)
        elif _location(item) in tx.claimed or not self.rules.consumption_must_match:
            yield go()
        else:
            yield stop("it is reclaimed")

    def _delete(
        self, state: State, number: int, tx: Transaction, ids: Iterable[str], go: Any, stop: Any, *, must_match: bool = False
    ) -> Iterator[Successor]:
        sees = tx.snapshot or state
        there = (sees.intents - tx.gone) | tx.put
        wanted = frozenset(ids) & there
        if any(self._has_intent(state, item, writer=number) for item in wanted):
            return
        if wanted & tx.stale - tx.put:
            yield stop("the intent has changed")
        else:
            yield go(tx._replace(gone=tx.gone | wanted, put=tx.put - wanted, locked=tx.locked - wanted))

    def _committed(self, state: State, number: int, tx: Transaction) -> State:
        rows = list(state.rows)
        for row, location in tx.writes:
            rows[row] = location
        changed: set[Any] = {*tx.put, *tx.gone}
        if not tx.has_truncated:
            changed.update(row for row, _ in tx.writes)
        state = _changed(_unfound(state, tx.gone), changed, but=number)
        if tx.has_truncated:  # no snapshot shows what was truncated
            empty = (None,) * len(rows)
            for other, writer in enumerate(state.writers):
                if other != number and writer.tx is not None and writer.tx.snapshot is not None:
                    blind = writer.tx._replace(snapshot=writer.tx.snapshot._replace(rows=empty))
                    state = _with_writer(state, other, writer._replace(tx=blind))
        return state._replace(
            rows=tuple(rows),
            intents=(state.intents - tx.gone) | tx.put,
            decisions=state.decisions.union(f"+{item}" for item in tx.decided),
        )

    # Workers.

    def _worker(self, state: State, number: int, worker: Worker) -> Iterator[Successor]:
        label: Label = ("worker", number, worker.phase)

        def go(new: Worker = IDLE, state: State = state, *notes: Any) -> Successor:
            return (*label, *notes), _with_worker(state, number, new)

        if worker.phase == "idle":
            yield from self._begin(state, number)
            return
        yield from getattr(self, f"_{worker.phase}")(state, number, worker, go)
        if state.faults:
            yield (*label, "dies"), _with_worker(state, number, IDLE)._replace(faults=state.faults - 1)

    def _begin(self, state: State, number: int) -> Iterator[Successor]:
        fenced = {fence.id for fence in state.fences}
        free = [item for item in sorted(state.intents - fenced) if not self._has_intent(state, item)]
        picks = [frozenset([item]) for item in free]
        if len(free) > 1:
            picks.append(frozenset(free))
        for picked in picks:
            new = Worker("look_beside", picked, picked)
            if not self.rules.locks_beside:
                new = self._with_uploads(new)
            yield ("worker", number, "picks", *sorted(picked)), _with_worker(state, number, new)
        if state.takeovers:
            for fence in sorted(state.fences):
                if fence.is_emptied and self._may_arrive(state, fence.location):
                    continue
                own = self._marked(state, fence._replace(takeovers=fence.takeovers + 1))
                new = Worker("check", claims=frozenset([own]))
                taken = state._replace(fences=(state.fences - {fence}) | {own}, takeovers=state.takeovers - 1)
                yield ("worker", number, "takes over", fence.id), _with_worker(taken, number, new)

    def _marked(self, state: State, fence: Fence) -> Fence:
        """Return a fence that no claim of a worker is equal to."""
        if not self.rules.tells_takeovers_apart:
            return fence
        known = {claim.mark for worker in state.workers for claim in worker.claims if claim.id == fence.id}
        return fence._replace(mark=next(mark for mark in range(len(known) + 1) if mark not in known))

    def _updated(self, state: State, claims: Iterable[Fence], *, attempts: int = 0, takeovers: int = 0) -> frozenset[Fence]:
        """Return the fences with those changed that are still a worker's own, as a failure or another end of its work does."""
        tokens = {claim.token for claim in claims}
        fences: set[Fence] = set()
        for one in state.fences:
            if one.token in tokens:
                changed = one._replace(attempts=one.attempts + attempts, takeovers=0 if attempts else one.takeovers + takeovers)
                one = self._marked(state, changed)
            fences.add(one)
        return frozenset(fences)

    def _may_arrive(self, state: State, location: str) -> bool:
        """Return whether a writer has not stored an object yet whose intent was fenced."""
        return any(0 <= writer.step <= self._put_at[number].get(location, -1) for number, writer in enumerate(state.writers))

    def _look_beside(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """`_with_evidence` finds what is pending beside the picked intents."""
        locations = {_location(item) for item in worker.ids}
        others = tuple(sorted(item for item in state.intents - worker.ids if _location(item) in locations))
        new = worker._replace(phase="lock_beside", others=others)
        yield go(new if others else self._with_uploads(worker))

    def _lock_beside(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        item, *rest = worker.others
        new = worker._replace(others=tuple(rest))
        if item in state.intents and not self._has_intent(state, item, worker=number):
            new = new._replace(locked=new.locked | {item})
            if _is_upload(item) and self.rules.fences_uploads_beside:
                new = new._replace(ids=new.ids | {item})
        else:
            new = new._replace(busy=new.busy | {_location(item)})
        if not rest:
            free = frozenset(item for item in new.ids if _location(item) not in new.busy)
            new = self._with_uploads(new._replace(ids=free, busy=frozenset()))
        yield go(new)

    def _with_uploads(self, worker: Worker) -> Worker:
        return worker._replace(phase="look_for_decisions" if any(map(_is_upload, worker.ids)) else "fence")

    def _look_for_decisions(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        taken = frozenset(item for item in worker.ids if f"+{item}" in state.decisions)
        yield go(worker._replace(phase="decide_against", taken=taken))

    def _decide_against(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """Insert decisions, without waiting for a transaction that is deciding."""
        uploads = frozenset(item for item in worker.ids if _is_upload(item)) - worker.taken
        ours = frozenset(
            item
            for item in uploads
            if f"+{item}" not in state.decisions
            and f"-{item}" not in state.decisions
            and not any(writer.tx is not None and item in writer.tx.decided for writer in state.writers)
        )
        left = uploads - ours
        in_progress = {_location(item) for item in left} if self.rules.leaves_what_is_decided else set()
        ids = frozenset(item for item in worker.ids - worker.taken - left if _location(item) not in in_progress)
        yield go(worker._replace(phase="fence", ids=ids, decided=ours))

    def _fence(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """Commit the fences."""
        fences = frozenset(self._marked(state, Fence(item)) for item in worker.ids)
        state = _without_intents(state, worker.ids | worker.taken)
        ours = {f"-{item}" for item in worker.decided}
        state = state._replace(
            fences=frozenset(one for one in state.fences if one.id not in worker.ids) | fences,
            decisions=(state.decisions | ours).difference(f"+{item}" for item in worker.taken),
        )
        yield go(Worker("check", claims=fences) if fences else IDLE, state, *sorted(worker.ids))

    def _check(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """See in one snapshot which fences are still this worker's, and which objects rows refer to."""
        if self._has_table(state):
            return
        tokens = {one.token for one in state.fences}
        own = frozenset(one for one in worker.claims if one.token in tokens) if self.rules.checks_own else worker.claims
        held = frozenset(one for one in own if one.location in state.rows) if self.rules.checks_references else frozenset[Fence]()
        if held:
            yield go(Worker("let_go", claims=own, ids=frozenset(one.id for one in held)))
        else:
            yield go(Worker("remove", claims=own) if own else IDLE)
        if state.faults:
            fences = self._updated(state, worker.claims, takeovers=-1)
            yield go(IDLE, state._replace(fences=fences, faults=state.faults - 1), "fails, and releases them")

    def _let_go(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """Lift the fences of what rows refer to."""
        held = frozenset(one for one in worker.claims if one.id in worker.ids)
        tokens = {one.token for one in held}
        fences = frozenset(
            one for one in state.fences if not (one.token in tokens if self.rules.lifts_own else one.id in worker.ids)
        )
        there = {one.id for one in fences}
        decisions = state.decisions.difference(f"-{one.id}" for one in held if one.id not in there)
        rest = worker.claims - held
        yield go(Worker("remove", claims=rest) if rest else IDLE, state._replace(fences=fences, decisions=decisions))

    def _remove(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """Delete the objects."""
        gone = {one.location for one in worker.claims}
        yield go(Worker("look_for_newer", claims=worker.claims), state._replace(objects=state.objects - gone), *sorted(gone))
        if state.faults:
            fences = self._updated(state, worker.claims, attempts=1)
            yield go(IDLE, state._replace(fences=fences, faults=state.faults - 1), "fails")

    def _look_for_newer(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        gone = {one.location for one in worker.claims}
        newer = tuple(sorted(item for item in state.intents if _location(item) in gone)) if self.rules.drops_newer else ()
        yield go(worker._replace(phase="lock_newer" if newer else "conclude", others=newer))

    def _lock_newer(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        item, *rest = worker.others
        new = worker._replace(others=tuple(rest), phase="lock_newer" if rest else "conclude")
        if item not in state.intents or self._has_intent(state, item, worker=number):
            yield go(new._replace(busy=new.busy | {_location(item)}))
        else:
            yield go(new._replace(locked=new.locked | {item}))

    def _conclude(self, state: State, number: int, worker: Worker, go: Any) -> Iterator[Successor]:
        """Delete the fences of deleted objects and the newer intents in one transaction."""
        state = _without_intents(state, worker.locked)
        fences = state.fences
        decisions = state.decisions
        for claim in worker.claims:
            if claim.location in worker.busy and self.rules.waits_for_locked:
                fences = self._updated(state._replace(fences=fences), [claim], takeovers=-1)
                continue
            there = frozenset(one for one in fences if one.id == claim.id)
            fences -= there
            if _is_upload(claim.id) and not claim.is_emptied and self.rules.keeps_tombstone:
                fences |= {self._marked(state, Fence(one.id, 0, 0, is_emptied=True)) for one in there}
            else:
                decisions -= {f"-{claim.id}"}
        yield go(IDLE, state._replace(fences=fences, decisions=decisions))


def _begun(writer: Writer, program: Program) -> Writer:
    """Return a writer that has begun its next transaction, if that takes no snapshot, or has ended its program."""
    if writer.step == len(program):
        return ENDED
    if program[writer.step] == ("begin", False):
        return writer._replace(step=writer.step + 1, tx=Transaction())
    return writer


def _with_writer(state: State, number: int, writer: Writer) -> State:
    writers = state.writers
    return state._replace(writers=(*writers[:number], writer, *writers[number + 1 :]))


def _with_worker(state: State, number: int, worker: Worker) -> State:
    """Return the state with a worker; workers are alike, so their order does not matter."""
    workers = [*state.workers[:number], worker, *state.workers[number + 1 :]]
    return state._replace(workers=tuple(sorted(workers, key=hash)))


def _written(tx: Transaction, new: dict[int, str | None]) -> Transaction:
    return tx._replace(writes=tuple(sorted({**dict(tx.writes), **new}.items())))


def _changed(state: State, keys: Iterable[Any], *, but: int = -1) -> State:
    """Note in the transactions with a snapshot that what they may see has changed since."""
    keys = frozenset(keys)
    for number, writer in enumerate(state.writers):
        tx = writer.tx
        if number != but and tx is not None and tx.snapshot is not None and not keys <= tx.stale:
            state = _with_writer(state, number, writer._replace(tx=tx._replace(stale=tx.stale | keys)))
    return state


def _unfound(state: State, gone: frozenset[str]) -> State:
    """Let guards that wait for the locks of deleted intents find nothing, also if others are recorded under the same ids."""
    for number, writer in enumerate(state.writers):
        if writer.tx is not None and writer.tx.snapshot is None and not gone.isdisjoint(writer.todo):
            left = tuple(item for item in writer.todo if item not in gone)
            state = _with_writer(state, number, writer._replace(todo=left))
    return state


def _without_intents(state: State, gone: frozenset[str]) -> State:
    there = gone & state.intents
    return _changed(_unfound(state, there), there)._replace(intents=state.intents - there)


# The search.


@dataclass
class Result:
    """What a search has found.

    Attributes:
        states: How many states there are; up to the violation, if there is one.
        violation: What is wrong, None if nothing is.
        trace: The steps of the shortest way to it.
        seen: The names of the steps that were taken, with their notes.
    """

    states: int = 0
    violation: str | None = None
    trace: list[str] = field(default_factory=list)
    seen: set[Label] = field(default_factory=set)


def explore(scenario: Scenario, rules: Rules = Rules()) -> Result:
    """Search all states of a scenario, breadth first, up to the first violation."""
    protocol, start = Protocol(scenario, rules), scenario.begin()
    before: dict[State, tuple[State, Label] | None] = {start: None}
    waiting = deque([start])
    result = Result()
    while waiting:
        state = waiting.popleft()
        result.violation = protocol.find_violation(state)
        if result.violation is not None:
            result.trace = _trace(before, state)
            break
        for label, new in protocol.successors(state):
            if new not in before:
                before[new] = (state, label)
                waiting.append(new)
                result.seen.add(label)
    result.states = len(before)
    return result


def _trace(before: dict[State, tuple[State, Label] | None], state: State) -> list[str]:
    steps: list[str] = []
    while (step := before[state]) is not None:
        state, label = step
        steps.append(" ".join(map(str, label)))
    return steps[::-1]
