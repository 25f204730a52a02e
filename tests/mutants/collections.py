"""Mutants of collections: their order, their limits, and what a list takes."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_PATH = "granite_storage/orm/collections.py"

MUTANTS = [
    Mutant(
        name="collections-parent-not-locked",
        rule="Two transactions that both add the last file of a parent wait for each other.",
        path=_PATH,
        old="        read_rows(connection, parent, wanted, [])\n",
        new="",
        tests=("tests/orm/collections/test_limits.py::test_concurrent_transactions[asyncpg-journal-not loaded]",),
    ),
    Mutant(
        name="collections-limit-of-the-session-only",
        rule="The rows are counted, not what the session has loaded.",
        path="granite_storage/orm/events.py",
        old="    collections.require_limits(session)\n",
        new="",
        tests=("tests/orm/collections/test_limits.py::TestNumber::test_not_loaded[sqlite-begin]",),
    ),
    Mutant(
        name="collections-known-limit-after-the-upload",
        rule="What the session knows to be too much is not uploaded.",
        path="granite_storage/orm/events.py",
        old="    collections.require_known_limits(session)\n",
        new="",
        tests=("tests/orm/collections/test_limits.py::TestNumber::test_new_parent[sqlite-begin]",),
    ),
    Mutant(
        name="collections-deleted-files-counted",
        rule="A file that the flush deletes makes room.",
        path=_PATH,
        old="[other for other in dict.fromkeys(loaded) if other not in session.deleted]",
        new="list(loaded)",
        tests=("tests/orm/collections/test_limits.py::TestNumber::test_loaded[sqlite-begin]",),
    ),
    Mutant(
        name="collections-replacement-not-measured",
        rule="A file that is replaced by a larger one counts for the sum of sizes.",
        path=_PATH,
        old='["file"] if declared.max_total_size is not None else []',
        new="[]",
        tests=("tests/orm/collections/test_limits.py::TestSize::test_replaced_by_a_larger_one[sqlite-begin]",),
    ),
    Mutant(
        name="collections-no-room",
        rule="Neighbours get new keys where there is no room between two.",
        path=_PATH,
        old="        if step > 0:\n",
        new="        if True:\n",
        tests=("tests/orm/collections/test_lists.py::TestOrder::test_many_times_at_one_place[sqlite-begin]",),
    ),
    Mutant(
        name="collections-equal-keys-kept",
        rule="Equal keys say nothing about an order that was changed.",
        path=_PATH,
        old="length = bisect_left(tails, key)",
        new="length = bisect_left(tails, key + 1)",
        tests=("tests/orm/collections/test_lists.py::TestOrder::test_equal_keys[sqlite-begin]",),
    ),
    Mutant(
        name="collections-clock-only",
        rule="What is appended to a loaded list comes last, whatever the clock says.",
        path=_PATH,
        old="_latest + _STEP, after + _STEP)",
        new="_latest + _STEP)",
        tests=("tests/orm/collections/test_concurrent_changes.py::test_clocks_that_differ[sqlite-begin]",),
    ),
    Mutant(
        name="collections-assignment-out-of-order",
        rule="A list that is assigned is kept in its order.",
        path=_PATH,
        old="        values[:] = map(self.as_file, values)\n        _arrange(values)\n",
        new="        values[:] = map(self.as_file, values)\n",
        tests=("tests/orm/collections/test_lists.py::TestOrder::test_assignment[sqlite-begin]",),
    ),
    Mutant(
        name="collections-all-rows-written",
        rule="A move writes the row that moves only.",
        path=_PATH,
        old="        list.__setitem__(self, slice(None), files)\n        _arrange(self, (place,))\n",
        new="        list.__setitem__(self, slice(None), files)\n        _arrange(self, range(len(self)))\n",
        tests=("tests/orm/collections/test_lists.py::TestOrder::test_moves[sqlite-begin]",),
    ),
    Mutant(
        name="collections-ids-used-again",
        rule="The id of a file that was deleted is never that of another one.",
        path=_PATH,
        old="            sqlite_autoincrement=True,",
        new="            sqlite_autoincrement=False,",
        tests=("tests/orm/collections/test_lists.py::TestRemoving::test_ids_are_not_used_again[sqlite-begin]",),
    ),
    Mutant(
        name="collections-loaded-by-an-append",
        rule="Adding files without loading loads nothing.",
        path=_PATH,
        old="        row.parent = parent\n",
        new="        getattr(parent, made._declared.key).append(row)\n",
        tests=("tests/orm/collections/test_lists.py::TestAdding::test_without_loading[sqlite-begin]",),
    ),
    Mutant(
        name="collections-empty-inputs-stored",
        rule="An input that was left empty is no file.",
        path=_PATH,
        old="(given := Attachment.from_optional_upload(cast(Any, file))) is not None",
        new="(given := Attachment.from_upload(cast(Any, file))) is not None",
        tests=("tests/orm/collections/test_lists.py::TestAdding::test_uploads_of_a_form[sqlite-begin]",),
    ),
]
