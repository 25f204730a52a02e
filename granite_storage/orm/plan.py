"""What a flush is to do with the objects of the values that it writes: decisions only, no I/O and no database.

Two decisions are made. Before a connection is held: which values are uploaded, and which objects are certainly held elsewhere,
so that their rows get copies. When the rows are locked and it is known what they give up: which objects move to another row, and
which are copied after all.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Assigned", "FlushPlan", "UploadPlan", "plan_flush", "plan_uploads"]

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Assigned(Generic[C]):
    """A value that a flush writes into a row, and what is known of its object.

    Attributes:
        change: The change that writes it.
        value: Identifies the value: one may be assigned to several rows.
        object: Identifies its object; None while it is pending.
        is_unowned: Whether the object was stored before the transaction, and no row has taken it.
        is_restored: Whether it undoes the delete that its object waits for.
        is_of_another_manager: Whether the column's manager is another one than that of the object.
        is_replaced: Whether a row of the same flush held it until now, as far as the session knows.
    """

    change: C
    value: Hashable
    object: Hashable | None
    is_unowned: bool = False
    is_restored: bool = False
    is_of_another_manager: bool = False
    is_replaced: bool = False

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be uploaded."""
        return self.object is None


@dataclass(slots=True)
class UploadPlan(Generic[C]):
    """What is done before a connection is held.

    Attributes:
        put: The changes whose pending values are uploaded.
        copy: The changes that get a copy, because another row certainly keeps the object.
        undecided: The changes that wait until the rows are locked.
    """

    put: list[C] = field(default_factory=list)
    copy: list[C] = field(default_factory=list)
    undecided: list[C] = field(default_factory=list)


@dataclass(slots=True)
class FlushPlan(Generic[C]):
    """What is done once the rows are locked.

    Attributes:
        take: The changes whose rows take an object that no row has held.
        move: The changes whose rows take over what another row gives up.
        restore: The changes whose rows take an object back that waits to be deleted.
        copy: The changes that get a copy.
        stale: The changes whose objects were to move, but whose rows do not hold them any more.
    """

    take: list[C] = field(default_factory=list)
    move: list[C] = field(default_factory=list)
    restore: list[C] = field(default_factory=list)
    copy: list[C] = field(default_factory=list)
    stale: list[C] = field(default_factory=list)


def plan_uploads(assigned: Iterable[Assigned[C]], *, history: Mapping[Any, bool], knows_all_rows: bool) -> UploadPlan[C]:
    """Decide what is uploaded and copied before a connection is held.

    Args:
        assigned: The values, in the order of the changes.
        history: The objects that the transaction has had to do with: True where a row holds it, False where one gave it up.
        knows_all_rows: Whether the session knows of each row what it gives up; otherwise nothing is copied yet.
    """
    plan: UploadPlan[C] = UploadPlan()
    uploaded: set[Hashable] = set()
    for item in assigned:
        if item.is_pending and item.value not in uploaded:
            uploaded.add(item.value)
            plan.put.append(item.change)
        elif knows_all_rows and (item.is_pending or not _may_move(item, history)):
            plan.copy.append(item.change)
        else:
            plan.undecided.append(item.change)
    return plan


def plan_flush(assigned: Iterable[Assigned[C]], *, displaced: Collection[Hashable], history: Mapping[Any, bool]) -> FlushPlan[C]:
    """Decide what becomes of the objects of stored values, now that the rows are locked.

    An object has one row at most: the first that wants it takes it, the others get copies.

    Args:
        assigned: The values, none of them pending, in the order of the changes.
        displaced: The objects that the locked rows give up.
        history: The objects that the transaction has had to do with before, as for `plan_uploads`.
    """
    plan: FlushPlan[C] = FlushPlan()
    is_held = {**history, **dict.fromkeys(displaced, False)}
    used: set[Hashable] = set()
    restored: set[Hashable] = set()
    for item in assigned:
        is_first = item.value not in used
        if not _may_move(item, is_held, is_first=is_first):
            plan.copy.append(item.change)
            continue
        used.add(item.value)
        if is_first and item.is_unowned:
            plan.take.append(item.change)
        elif is_held.get(item.object) is False:
            plan.move.append(item.change)
        elif is_first and item.is_restored and item.object not in restored:
            restored.add(item.object)  # the journal knows whether it waits; another row of this flush gets a copy
            plan.restore.append(item.change)
        elif item.object in is_held:
            plan.copy.append(item.change)
            continue
        else:
            plan.stale.append(item.change)
            continue
        is_held[item.object] = True
    return plan


def _may_move(item: Assigned[C], is_held: Mapping[Any, bool], *, is_first: bool = True) -> bool:
    """Tell whether a row may take an object over: no row holds it yet, or one gives it up in this transaction."""
    if item.is_restored and is_first:
        return True
    if item.is_of_another_manager:
        return False
    return (item.is_unowned and is_first) or item.is_replaced or is_held.get(item.object) is False
