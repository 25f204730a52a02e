"""Mutants of effects, and of deriving variants again."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_EFFECTS = "granite_storage/orm/journal/effects.py"
_TESTS = "tests/orm/journal/test_effects.py"

MUTANTS = [
    Mutant(
        name="effects-two-workers-at-a-time",
        rule="A change lets a leased job be: nobody else calls the handler before the lease is over.",
        path=_EFFECTS,
        old="is_leased = job.c.takeovers > 0",
        new="is_leased = job.c.takeovers < 0",
        tests=(f"{_TESTS}::TestFailures::test_a_change_leaves_the_lease[asyncpg]",),
    ),
    Mutant(
        name="effects-change-during-the-call",
        rule="A job that a transaction has recorded again during the call stays, and is due.",
        path=_EFFECTS,
        old="        await self._write_own(job, delete(self._job))\n",
        new="        async with self._pool.writing() as connection:\n"
        "            await connection.execute(delete(self._job).where(self._is_own(job)))\n",
        tests=(f"{_TESTS}::TestMoves::test_while_it_is_put[asyncpg]",),
    ),
    Mutant(
        name="effects-failure-of-the-past",
        rule="A failure counts for what was to be done then, not for a change that has come meanwhile.",
        path=_EFFECTS,
        old="        await self._write_own(job, update(self._job).values(values))\n",
        new="        async with self._pool.writing() as connection:\n"
        "            await connection.execute(update(self._job).where(self._is_own(job)).values(values))\n",
        tests=(f"{_TESTS}::TestFailures::test_a_change_while_it_fails_is_due_at_once[asyncpg]",),
    ),
    Mutant(
        name="effects-lost-files-unrecorded",
        rule="The transaction that takes a file from a row records it for the effects.",
        path="granite_storage/orm/flush.py",
        old="_affected(left).get(journal, ())",
        new="()",
        tests=(f"{_TESTS}::TestRows::test_comes_and_leaves[asyncpg]",),
    ),
    Mutant(
        name="effects-bulk-unrecorded",
        rule="So does a bulk statement.",
        path="granite_storage/orm/bulk.py",
        old="flush.write_left(connection, frame, held)",
        new="pass",
        tests=(f"{_TESTS}::TestRows::test_leaves[asyncpg-updated]",),
    ),
    Mutant(
        name="effects-in-any-column",
        rule="Only a row of a column that declares the effect keeps what it has put.",
        path=_EFFECTS,
        old="                if name not in effects_in(column):\n",
        new="                if not isinstance(column.type, AttachmentType):\n",
        tests=(f"{_TESTS}::TestMoves::test_to_a_column_without[asyncpg]",),
    ),
    Mutant(
        name="effects-infected-put",
        rule="Nothing is put of a file in which a scanner has found something.",
        path=_EFFECTS,
        old="                    except InfectedObjectError:\n                        continue\n",
        new="                    except InfectedObjectError:\n                        pass\n",
        tests=(f"{_TESTS}::TestScanners::test_infected[asyncpg]",),
    ),
    Mutant(
        name="rederived-all-keeps-the-same",
        rule="Asked for all, a variant takes the place of one by the same recipe, too.",
        path="granite_storage/orm/variants.py",
        old="is_forced = made.replaces_same and",
        new="is_forced = False and",
        tests=("tests/orm/test_rederivation.py::TestWhich::test_all[sqlite-begin]",),
    ),
    Mutant(
        name="rederived-displaced-left-behind",
        rule="Without a journal, what a variant takes the place of is deleted after the commit.",
        path="granite_storage/orm/variants.py",
        old="log += [(item, False) for item in displaced]",
        new="log += [(item, True) for item in displaced]",
        tests=("tests/orm/test_rederivation.py::TestWhich::test_stale[sqlite-begin]",),
    ),
    Mutant(
        name="effects-cancelled-by-others",
        rule="A handler that raises a CancelledError, though no caller is cancelled, has failed.",
        path="granite_storage/orm/journal/effects.py",
        old='                    with contained("the handler"):\n                        await handler(event)\n',
        new="                    await handler(event)\n",
        tests=("tests/orm/journal/test_effects.py::TestFailures::test_an_end_that_was_not_asked_for",),
    ),
]
