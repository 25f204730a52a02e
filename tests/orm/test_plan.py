"""The decisions of a flush about objects, as a table of inputs and plans: no session and no database."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pytest

from granite_storage.orm.flush import Assigned, FlushPlan, UploadPlan, plan_flush, plan_uploads


def pending(row: str, value: str) -> Assigned[str]:
    return Assigned(row, value, None)


def stored(row: str, thing: str, **facts: bool) -> Assigned[str]:
    """A value of its own for each object."""
    return Assigned(row, f"value of {thing}", thing, **facts)


def unowned(row: str, thing: str) -> Assigned[str]:
    return stored(row, thing, is_unowned=True)


def replaced(row: str, thing: str) -> Assigned[str]:
    return stored(row, thing, is_replaced=True)


def restored(row: str, thing: str) -> Assigned[str]:
    return stored(row, thing, is_restored=True)


def foreign(row: str, thing: str, **facts: bool) -> Assigned[str]:
    return stored(row, thing, is_of_another_manager=True, **facts)


UPLOADS: dict[str, tuple[list[Assigned[str]], Mapping[Hashable, bool], bool, UploadPlan[str]]] = {
    "nothing": ([], {}, True, UploadPlan()),
    "new files are uploaded": ([pending("1", "x"), pending("2", "y")], {}, True, UploadPlan(put=["1", "2"])),
    "one new file on two rows": ([pending("1", "x"), pending("2", "x")], {}, True, UploadPlan(put=["1"], copy=["2"])),
    "one new file on two rows, while a row's old file is unknown": (
        [pending("1", "x"), pending("2", "x")],
        {},
        False,
        UploadPlan(put=["1"], undecided=["2"]),
    ),
    "a file of a row that keeps it": ([stored("1", "a")], {}, True, UploadPlan(copy=["1"])),
    "a file of a row, while another row's old file is unknown": ([stored("1", "a")], {}, False, UploadPlan(undecided=["1"])),
    "a file that a row of this transaction holds": ([stored("1", "a")], {"a": True}, True, UploadPlan(copy=["1"])),
    "a file that a row gave up before": ([stored("1", "a")], {"a": False}, True, UploadPlan(undecided=["1"])),
    "a file that a row releases now": ([replaced("1", "a")], {}, True, UploadPlan(undecided=["1"])),
    "a swap": ([replaced("1", "b"), replaced("2", "a")], {}, True, UploadPlan(undecided=["1", "2"])),
    "one that was stored beforehand": ([unowned("1", "a")], {}, True, UploadPlan(undecided=["1"])),
    "one of another manager": ([foreign("1", "a")], {}, True, UploadPlan(copy=["1"])),
    "one of another manager that a row releases": ([foreign("1", "a", is_replaced=True)], {}, True, UploadPlan(copy=["1"])),
    "one of another manager stored beforehand": ([foreign("1", "a", is_unowned=True)], {}, True, UploadPlan(copy=["1"])),
    "a restored one": ([restored("1", "a")], {}, True, UploadPlan(undecided=["1"])),
    "all at once": (
        [pending("1", "x"), stored("2", "a"), replaced("3", "b"), unowned("4", "c"), pending("5", "x")],
        {},
        True,
        UploadPlan(put=["1"], copy=["2", "5"], undecided=["3", "4"]),
    ),
}

FLUSHES: dict[str, tuple[list[Assigned[str]], set[Hashable], Mapping[Hashable, bool], FlushPlan[str]]] = {
    "nothing": ([], set(), {}, FlushPlan()),
    "a replaced file goes, whatever else": ([], {"a"}, {}, FlushPlan()),
    "one stored beforehand is taken": ([unowned("1", "a")], set(), {}, FlushPlan(take=["1"])),
    "by one row only": ([unowned("1", "a"), unowned("2", "a")], set(), {}, FlushPlan(take=["1"], copy=["2"])),
    "a file moves from a row that gives it up": ([replaced("1", "a")], {"a"}, {}, FlushPlan(move=["1"])),
    "also where the session did not know it": ([stored("1", "a")], {"a"}, {}, FlushPlan(move=["1"])),
    "to one row, and the second gets a copy": (
        [replaced("1", "a"), replaced("2", "a")],
        {"a"},
        {},
        FlushPlan(move=["1"], copy=["2"]),
    ),
    "two rows swap": ([replaced("1", "b"), replaced("2", "a")], {"a", "b"}, {}, FlushPlan(move=["1", "2"])),
    "three rows rotate": (
        [replaced("1", "b"), replaced("2", "c"), replaced("3", "a")],
        {"a", "b", "c"},
        {},
        FlushPlan(move=["1", "2", "3"]),
    ),
    "half a swap: the other row keeps its file": ([replaced("1", "b")], {"a"}, {"b": True}, FlushPlan(copy=["1"])),
    "a file that an earlier flush of the transaction gave up": ([stored("1", "a")], set(), {"a": False}, FlushPlan(move=["1"])),
    "and that another row took since": ([stored("1", "a")], set(), {"a": True}, FlushPlan(copy=["1"])),
    "a file that no row of the transaction has held": ([stored("1", "a")], set(), {}, FlushPlan(copy=["1"])),
    "a file that was to move, and whose row lost it meanwhile": ([replaced("1", "a")], set(), {}, FlushPlan(stale=["1"])),
    "twice": ([replaced("1", "a"), replaced("2", "a")], set(), {}, FlushPlan(stale=["1", "2"])),
    "one that was put by this flush, on a second row": ([stored("2", "a")], set(), {"a": True}, FlushPlan(copy=["2"])),
    "one of another manager is copied": ([foreign("1", "a")], {"a"}, {"a": False}, FlushPlan(copy=["1"])),
    "a restored one takes its delete back": ([restored("1", "a")], set(), {}, FlushPlan(restore=["1"])),
    "for one row, and the second gets a copy": (
        [restored("1", "a"), restored("2", "a")],
        set(),
        {},
        FlushPlan(restore=["1"], copy=["2"]),
    ),
    "a restored one that this transaction gave up moves": ([restored("1", "a")], set(), {"a": False}, FlushPlan(move=["1"])),
    "a restored one of another manager is restored by its column's": (
        [foreign("1", "a", is_restored=True)],
        set(),
        {},
        FlushPlan(restore=["1"]),
    ),
    "a restored one that a row holds is for the journal to refuse": (
        [restored("1", "a")],
        set(),
        {"a": True},
        FlushPlan(restore=["1"]),
    ),
    "two restored values of one object": (
        [Assigned("1", "x", "a", is_restored=True), Assigned("2", "y", "a", is_restored=True)],
        set(),
        {},
        FlushPlan(restore=["1"], copy=["2"]),
    ),
    "a deleted row's file goes to a new one": ([stored("new", "a")], {"a", "b"}, {}, FlushPlan(move=["new"])),
    "all at once": (
        [unowned("1", "u"), replaced("2", "a"), stored("3", "k"), restored("4", "r"), replaced("5", "gone")],
        {"a"},
        {"k": True},
        FlushPlan(take=["1"], move=["2"], restore=["4"], copy=["3"], stale=["5"]),
    ),
}


@pytest.mark.parametrize(("assigned", "history", "knows_all_rows", "plan"), UPLOADS.values(), ids=UPLOADS.keys())
def test_before_a_connection_is_held(assigned: Any, history: Any, knows_all_rows: bool, plan: Any) -> None:
    assert plan_uploads(assigned, history=history, knows_all_rows=knows_all_rows) == plan


@pytest.mark.parametrize(("assigned", "displaced", "history", "plan"), FLUSHES.values(), ids=FLUSHES.keys())
def test_when_the_rows_are_locked(assigned: Any, displaced: Any, history: Any, plan: Any) -> None:
    assert plan_flush(assigned, displaced=displaced, history=history) == plan
