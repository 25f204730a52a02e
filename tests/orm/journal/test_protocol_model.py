"""Every state of small scopes of the protocol: the rules keep both invariants, and without any one of them one is broken.

The model is in `protocol_model.py`. `pytest -s` prints how many states each scenario has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.orm.journal.protocol_model import (
    READ_COMMITTED,
    SNAPSHOT,
    Program,
    Rules,
    Scenario,
    adopt,
    explore,
    nominate_what_was_read,
    restore,
    sql,
    upload,
    upload_intent,
)

SESSIONS = Rules(guards=False, locks_beside=False)
"""Without triggers, where only sessions write refs."""


def delete(level: str, row: int = 0) -> Program:
    return sql(level, (row, None))


def put(level: str, row: int, location: str = "o") -> Program:
    """Write a ref that was read before: a copy or an undo."""
    return sql(level, (row, location))


def pending_beside(*writers: Program, rows: tuple[str | None, ...] = ("o",), is_decided: bool, **limits: Any) -> Scenario:
    """Return a scenario whose first row has an object with a pending upload.

    It is that of a session with a snapshot, which has decided on it, or of a ref that only SQL has written.
    """
    upload = frozenset([upload_intent("o")])
    return Scenario(writers, rows, upload, upload if is_decided else frozenset(), **limits)


def scenarios(level: str) -> dict[str, Scenario]:
    """Return the scenarios whose writers are at an isolation level."""
    return {
        "delete, undo": Scenario((delete(level), put(level, 0)), workers=2),
        "delete, copy, undo": Scenario((delete(level), put(level, 1), put(level, 0)), ("o", None)),
        "two rows share: two deletes, undo": Scenario((delete(level, 0), delete(level, 1), put(level, 0)), ("o", "o"), workers=2),
        "two rows share: delete, two undos": Scenario((delete(level), put(level, 0), put(level, 1)), ("o", "o")),
        "move in two statements, delete of the target": Scenario((sql(level, (0, None), (1, "o")), delete(level, 1)), ("o", "p")),
        "move by a session, delete of the target, undo": Scenario(
            (sql(level, (0, None), (1, "o"), ("nominate", "p"), ("cancel", "o")), delete(level, 1), put(level, 0)), ("o", "p")
        ),
        "undo in a savepoint": Scenario(
            (delete(level), sql(level, "savepoint", (0, "o"), "rollback to", (1, "o"))), ("o", None), workers=2
        ),
        "restore by a session, copy": Scenario((delete(level), restore(level, 0, "o"), put(level, 1)), ("o", None)),
        "upload": Scenario((upload(level, 0, "n"),), (None,), workers=2),
        "upload stored first": Scenario((upload(level, 0, "n", stores_first=True),), (None,), workers=2),
        "upload, undo of what it replaces": Scenario((upload(level, 0, "n"), put(level, 0))),
        "upload, undo of what it replaces, delete": Scenario((upload(level, 0, "n"), put(level, 0), delete(level))),
        "upload that SQL writes as well": Scenario(
            (upload(level, 0, "n"), (("exists", "n"), *sql(level, (1, "n"), ends="commit"), *delete(level, 1))), (None, None)
        ),
        "pending upload decided on: delete, undos of two levels": pending_beside(
            delete(level), put(READ_COMMITTED, 1), put(SNAPSHOT, 2), rows=("o", None, None), is_decided=True
        ),
        "pending upload of SQL: delete, undo": pending_beside(delete(level), put(level, 0), is_decided=False, workers=2),
        "truncate and insert, delete, undo": Scenario(
            (sql(level, "truncate", (1, "o")), delete(level), put(READ_COMMITTED, 1)), ("o", None), may_leave=level == SNAPSHOT
        ),
        "adoption, delete, undo": Scenario((adopt(1, "o"), delete(level), put(level, 0)), ("o", None)),
        "adoption of an upload": Scenario((upload(level, 0, "n"), (("exists", "n"), *adopt(1, "n"))), (None, None)),
    }


ALL = {f"{level}: {name}": scenario for level in (READ_COMMITTED, SNAPSHOT) for name, scenario in scenarios(level).items()}
LARGE = (
    "READ COMMITTED: upload, undo of what it replaces, delete",
    "REPEATABLE READ: two rows share: two deletes, undo",
    "REPEATABLE READ: move by a session, delete of the target, undo",
    "REPEATABLE READ: upload, undo of what it replaces, delete",
    "REPEATABLE READ: pending upload decided on: delete, undos of two levels",
    "REPEATABLE READ: pending upload of SQL: delete, undo",
    "REPEATABLE READ: adoption, delete, undo",
)
SLOW = pytest.mark.exhaustive("it has more than 15,000 states, and smaller scenarios try its rules as well")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] * (name in LARGE)) for name in ALL])
def test_the_protocol_holds(name: str) -> None:
    """No violation, and nothing is kept from happening: each writer can commit."""
    scenario = ALL[name]
    require_holds(name, scenario, Rules())


@pytest.mark.exhaustive("the rules are tried with fewer workers, faults and takeovers as well")
@pytest.mark.parametrize("name", [name for name in ALL if name not in LARGE])
def test_larger_scopes(name: str) -> None:
    require_holds(name, replace(ALL[name], workers=2, takeovers=2), Rules())


def mixtures(one: str, other: str) -> dict[str, Scenario]:
    """Return scenarios whose writers are at two isolation levels."""
    may_leave = SNAPSHOT in (one, other)
    return {
        "pending upload: delete, restore by a session, undo": pending_beside(
            delete(one), restore(other, 0, "o"), put(READ_COMMITTED, 1), rows=("o", None), is_decided=True
        ),
        "pending upload, two rows share: two deletes, undo": pending_beside(
            delete(one, 0), delete(other, 1), put(READ_COMMITTED, 2), rows=("o", "o", None), is_decided=True, workers=2, faults=0
        ),
        "pending upload: truncate and insert, undo, delete": pending_beside(
            sql(one, "truncate", (1, "o")),
            put(other, 1),
            delete(READ_COMMITTED),
            rows=("o", None),
            is_decided=True,
            may_leave=may_leave,
        ),
        "pending upload of SQL: adoption, delete, undo": pending_beside(
            adopt(1, "o"), delete(one), put(other, 0), rows=("o", None), is_decided=False, faults=0
        ),
        "two rows share: move by a session, delete, undo": Scenario(
            (sql(one, (0, None), (2, "o"), ("cancel", "o")), delete(other, 1), put(other, 0)), ("o", "o", None)
        ),
        "move by a session, delete of the target, restore": Scenario(
            (sql(one, (0, None), (1, "o"), ("cancel", "o")), delete(other, 1), restore(other, 0, "o")), ("o", None)
        ),
        "truncate and insert, copy, delete": Scenario(
            (sql(one, "truncate", (1, "o")), put(other, 2), delete(other)), ("o", None, None), may_leave=may_leave
        ),
        "swap, delete, undo": Scenario((sql(one, (0, "p"), (1, "o")), delete(other), put(other, 1, "p")), ("o", "p")),
        "upload, restore of what it replaces, undo": Scenario(
            (upload(one, 0, "n"), restore(other, 1, "o"), put(other, 0)), ("o", None), faults=0
        ),
        "adoption, delete, restore": Scenario((adopt(1, "o"), delete(one), restore(other, 0, "o")), ("o", None), faults=0),
        "copy and delete of the source, delete of the copy, undo": Scenario(
            (sql(one, (1, "o"), (0, None)), delete(other, 1), put(other, 0)), ("o", None)
        ),
    }


MIXED = {
    f"{one}, {other}: {name}": scenario
    for one in (READ_COMMITTED, SNAPSHOT)
    for other in (READ_COMMITTED, SNAPSHOT)
    for name, scenario in mixtures(one, other).items()
}


@pytest.mark.exhaustive("each of the rules is tried by the scenarios of one isolation level")
@pytest.mark.parametrize("name", MIXED)
def test_mixtures(name: str) -> None:
    result = explore(MIXED[name])
    print(f"{name}: {result.states:,} states")  # noqa: T201
    assert result.violation is None, "\n".join([result.violation or "", *result.trace])


@pytest.mark.parametrize("name", ["upload", "upload stored first", "two deletes, restore"])
@pytest.mark.parametrize("level", [READ_COMMITTED, SNAPSHOT])
def test_sessions_without_triggers(level: str, name: str) -> None:
    require_holds(f"{level}: {name}, without triggers", without_triggers(level)[name], SESSIONS)


def without_triggers(level: str) -> dict[str, Scenario]:
    return {
        "upload": Scenario((upload(level, 0, "n"),), (None,), workers=2),
        "upload stored first": Scenario((upload(level, 0, "n", stores_first=True),), (None,), workers=2),
        "two deletes, restore": Scenario((delete(level, 0), delete(level, 1), restore(level, 0, "o")), ("o", "o"), workers=2),
    }


def require_holds(name: str, scenario: Scenario, rules: Rules) -> None:
    result = explore(scenario, rules)
    print(f"{name}: {result.states:,} states")  # noqa: T201  # what the search has covered
    assert result.violation is None, "\n".join([result.violation or "", *result.trace])
    for number in range(len(scenario.writers)):
        assert ("writer", number, "end") in result.seen, f"writer {number} never commits"


# Each rule, and the length of the shortest way to a violation without it.

RC, RR = scenarios(READ_COMMITTED), scenarios(SNAPSHOT)
SHARED = RC["two rows share: two deletes, undo"]
DECIDED_ON, OF_SQL = RC["pending upload decided on: delete, undos of two levels"], RC["pending upload of SQL: delete, undo"]
READ_EARLIER = Scenario((nominate_what_was_read(0, "o"), delete(READ_COMMITTED), put(READ_COMMITTED, 0)))
SMALL = {"workers": 1, "faults": 0, "takeovers": 0}
OVERTAKEN = {"workers": 2, "takeovers": 1}

BROKEN: dict[str, tuple[dict[str, Any], Scenario, dict[str, int], int]] = {
    "triggers only nominate": ({"guards": False}, RC["delete, undo"], {}, 13),
    "a guard locks no intent": ({"locks_intents": False}, RC["delete, undo"], {}, 13),
    "a guard locks one of several intents": ({"locks_all_intents": False}, OF_SQL, {}, 16),
    "a guard does not lock the row": ({"locks_holder": False}, RC["delete, copy, undo"], {}, 14),
    "a guard looks for the fence too early": ({"looks_for_fence": "before"}, SHARED, {}, 18),
    "a guard looks for no fence": ({"looks_for_fence": "never"}, SHARED, {}, 17),
    "a nomination that is there is left alone": ({"updates_intent": False}, SHARED, {}, 14),
    "a TRUNCATE with a snapshot is believed": ({"mistrusts_truncate": False}, RR["truncate and insert, delete, undo"], {}, 19),
    "what was read earlier is nominated": ({}, READ_EARLIER, {}, 19),
    "a session does not decide on its upload": ({"decides": False}, RR["upload"], {}, 18),
    "a session does not look after it has decided": ({"looks_after_deciding": False}, RR["upload"], {"takeovers": 1}, 25),
    "a session cancels what its rows do not hold": (
        {"cancels_held_only": False},
        RC["move by a session, delete of the target, undo"],
        {},
        16,
    ),
    "an adoption is committed before the object is looked for": (
        {"adoption": "afterwards"},
        RC["adoption, delete, undo"],
        {},
        22,
    ),
    "an adopted object is not looked for": ({"adoption": "never"}, RC["adoption, delete, undo"], {}, 22),
    "a worker does not look beside what it fences": ({"locks_beside": False}, DECIDED_ON, {}, 13),
    "an upload beside stays pending": ({"fences_uploads_beside": False}, DECIDED_ON, {}, 16),
    "an object is fenced on which a session is deciding": (
        {"leaves_what_is_decided": False},
        RR["upload that SQL writes as well"],
        {},
        30,
    ),
    "a worker does not look for references": (
        {"checks_references": False},
        RC["move in two statements, delete of the target"],
        {},
        13,
    ),
    "an overtaken worker trusts its own check": ({"checks_own": False}, SHARED, OVERTAKEN, 20),
    "an overtaken worker lifts a fence": ({"lifts_own": False}, SHARED, OVERTAKEN, 20),
    "a fence is taken for an earlier one": ({"tells_takeovers_apart": False}, SHARED, OVERTAKEN, 21),
    "a fence that waits is taken for its own": ({"tells_takeovers_apart": False}, OF_SQL, OVERTAKEN, 22),
    "a newer intent survives the delete": ({"drops_newer": False}, SHARED, {}, 19),
    "a fence does not wait for a locked intent": ({"waits_for_locked": False}, SHARED, {}, 20),
    "the fence of an upload does not stay": ({"keeps_tombstone": False}, RC["upload"], {}, 15),
}


@pytest.mark.parametrize("name", BROKEN)
def test_without_a_rule(name: str) -> None:
    changes, scenario, limits, length = BROKEN[name]
    require_broken(name, Rules(**changes), replace(scenario, **{**SMALL, **limits}), length)


SIMPLER_SESSIONS: dict[str, tuple[dict[str, Any], str, int]] = {
    "a session does not see that its intent is gone": ({"consumption_must_match": False}, "upload", 14),
    "each writer nominates under an id of its own": ({"derives_ids": False}, "two deletes, restore", 18),
    "a restore looks for no fence": ({"restore_looks_for_fence": False}, "two deletes, restore", 18),
}


@pytest.mark.parametrize("name", SIMPLER_SESSIONS)
def test_sessions_without_a_rule(name: str) -> None:
    changes, scenario, length = SIMPLER_SESSIONS[name]
    small = replace(without_triggers(READ_COMMITTED)[scenario], **SMALL)
    require_broken(name, replace(SESSIONS, **changes), small, length)


def require_broken(name: str, rules: Rules, scenario: Scenario, length: int) -> None:
    result = explore(scenario, rules)
    print(f"{name}: {result.violation} after {len(result.trace)} steps and {result.states:,} states")  # noqa: T201
    assert result.violation is not None
    assert len(result.trace) == length, "\n".join(result.trace)
