"""Mutants of derived files: the flush that makes some, the deriver, and what the application is shown."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ROWS = "granite_storage/orm/variants.py"
_QUEUE = "granite_storage/orm/journal/jobs.py"
_JOBS = "granite_storage/orm/journal/variant_jobs.py"
_UPLOADS = "granite_storage/orm/uploads.py"
_FLUSH = "tests/orm/test_derived_flush.py"
_DERIVER = "tests/orm/journal/test_derived_jobs.py"
_ASKED = "tests/orm/test_derived_requests.py"

MUTANTS = [
    Mutant(
        name="deriver-read-modify-write",
        rule="What is written was read under the lock: a value that was read before it loses what others have written.",
        path=_JOBS,
        old="await self._holdings(connection, jobs[0], lock_holdings) if made else []",
        new="await self._holdings(connection, jobs[0], read_holdings) if made else []",
        tests=(f"{_DERIVER}::TestRows::test_another_part_of_the_value[asyncpg]",),
    ),
    Mutant(
        name="deriver-without-the-source",
        rule="A variant is set only where the locked row still holds the object that it is derived from.",
        path=_ROWS,
        old="""        is_row = among(table, [tuple(row)]) & is_here
        locked = select(as_stored(column, connection.dialect)).where(is_row).with_for_update(key_share=True)
        values = [value_of(raw, place) for (raw,) in connection.execute(locked, execution_options=options)]
""",
        new="""        is_row = among(table, [tuple(row)])
        locked = select(as_stored(column, connection.dialect)).where(is_row).with_for_update(key_share=True)
        values = [json.loads(raw) for (raw,) in connection.execute(locked, execution_options=options)]
""",
        tests=(f"{_DERIVER}::TestRows::test_replaced_while_it_is_set[asyncpg]",),
    ),
    Mutant(
        name="deriver-without-the-backend",
        rule="The same location on another backend is another object.",
        path=_ROWS,
        old='(value.get("backend"), value.get("location")) == place else None',
        new='value.get("location") == place[1] else None',
        tests=(f"{_DERIVER}::TestRows::test_another_backend[asyncpg]",),
    ),
    Mutant(
        name="deriver-rows-by-address",
        rule="The row is found by the location of the original, not by the column that the job was recorded for.",
        path=_QUEUE,
        old="            if isinstance(column.type, self._column_type):\n                is_here, options",
        new="            if (column.table.fullname, column.name) == job.address:\n                is_here, options",
        tests=(f"{_DERIVER}::TestRows::test_moved_by_sql[asyncpg]",),
    ),
    Mutant(
        name="deriver-intent-consumed-apart",
        rule="The upload's intent is consumed in the transaction that lets the row have the variant.",
        path=_JOBS,
        old="                await connection.run_sync(intents.consume, stored)\n",
        new="""                async with self._pool.reading() as own:
                    await own.run_sync(intents.consume, stored)
""",
        tests=(f"{_DERIVER}::TestFailures::test_the_transaction_fails[asyncpg]",),
    ),
    Mutant(
        name="deriver-fence-ignored",
        rule="A variant whose intent was fenced is being deleted, so no row takes it.",
        path=_JOBS,
        old="            if chosen:\n                await connection.run_sync(intents.consume",
        new="            if False:\n                await connection.run_sync(intents.consume",
        tests=(f"{_DERIVER}::TestFailures::test_reclaimed_before_it_is_set[asyncpg]",),
    ),
    Mutant(
        name="deriver-old-variant-stays",
        rule="What an older recipe made is displaced by what takes its place.",
        path=_JOBS,
        old="            await connection.run_sync(nominate, self._intent, self._pending(jobs[0], displaced), {})\n",
        new="",
        tests=(f"{_DERIVER}::TestRecipes::test_a_changed_recipe[asyncpg]",),
    ),
    Mutant(
        name="deriver-no-jobs-of-flushes",
        rule="A flush records a job for each variant that its value lacks, in its own transaction.",
        path=_QUEUE,
        old="        if declared.is_due(ref):\n",
        new="        if False:\n",
        tests=(f"{_DERIVER}::TestMade::test_after_the_commit[asyncpg]",),
    ),
    Mutant(
        name="deriver-jobs-of-old-recipes-forgotten",
        rule="A flush that brings in a variant of an older recipe records a job to make it anew.",
        path="granite_storage/orm/_interfaces.py",
        old="return found is not None and found.recipe == self.digest",
        new="return found is not None",
        tests=(f"{_DERIVER}::TestRecipes::test_a_changed_recipe[asyncpg]",),
    ),
    Mutant(
        name="deriver-job-dropped-when-taken",
        rule="A job stays until it is done, so that another worker does what one that died has left.",
        path=_QUEUE,
        old='        await connection.execute(statement, [{"mine": row.id} for row in rows])\n',
        new="        await connection.execute(table.delete().where(table.c.id.in_([row.id for row in rows])))\n",
        tests=(f"{_DERIVER}::TestFailures::test_a_worker_that_dies[asyncpg]",),
    ),
    Mutant(
        name="deriver-job-dropped-unseen",
        rule="A row that was not found may have moved: it is looked for again before its job goes.",
        path=_JOBS,
        old="            if any(_lacking(job, holdings) for job in done):\n",
        new="            if False:\n",
        tests=(f"{_DERIVER}::TestRows::test_moved_while_it_is_set[asyncpg]",),
    ),
    Mutant(
        name="deriver-older-over-newer",
        rule="A variant takes the place only of what was seen there before it was made.",
        path=_ROWS,
        old="        if lacking and all(holding.location_of(name) in variant.seen for holding in lacking):\n",
        new="        if lacking:\n",
        tests=(f"{_DERIVER}::TestRecipes::test_an_older_one_does_not_replace_a_newer_one[asyncpg]",),
    ),
    Mutant(
        name="deriver-jobs-of-others",
        rule="A process does only the jobs of its own recipes.",
        path=_JOBS,
        old="own = tuple_(self._job.c.key, self._job.c.recipe).in_(sorted(recipes))",
        new="own = self._job.c.key.in_(sorted(key for key, _ in recipes))",
        tests=(f"{_DERIVER}::TestRecipes::test_jobs_of_another_version_of_the_application[asyncpg]",),
    ),
    Mutant(
        name="deriver-refused-is-tried-again",
        rule="A variant that cannot be made of an original is dead at once.",
        path=_JOBS,
        old="            case ContentError() | ObjectNotFoundError():\n",
        new="            case ObjectNotFoundError():\n",
        tests=(f"{_DERIVER}::TestFailures::test_refused[asyncpg]",),
    ),
    Mutant(
        name="deriver-refused-is-a-failure",
        rule="A variant that a recipe refuses is no failure of later passes.",
        path=_QUEUE,
        old="select(job).where(job.c.dead, ~is_refused)",
        new="select(job).where(job.c.dead)",
        tests=(f"{_DERIVER}::TestFailures::test_refused[asyncpg]",),
    ),
    Mutant(
        name="deriver-waiting-is-an-attempt",
        rule="Waiting for a worker process is no attempt.",
        path=_JOBS,
        old="            case DerivationUnavailableError():\n",
        new="            case KeyError():\n",
        tests=(f"{_DERIVER}::TestFailures::test_waiting_for_a_process_is_no_attempt[asyncpg]",),
    ),
    Mutant(
        name="deriver-attempts-without-end",
        rule="A variant that fails again and again is dead in the end.",
        path=_JOBS,
        old="is_dead=job.attempts + 1 >= self._max_attempts)",
        new="is_dead=False)",
        tests=(f"{_DERIVER}::TestFailures::test_any_other_error[asyncpg]",),
    ),
    Mutant(
        name="deriver-dead-jobs-stay",
        rule="A dead job goes when no row holds its original.",
        path=_JOBS,
        old="        await self._forget_dead(backend, own)\n",
        new="",
        tests=(f"{_DERIVER}::TestFailures::test_a_dead_job_of_a_row_that_is_gone[asyncpg]",),
    ),
    Mutant(
        name="deriver-from-what-is-held",
        rule="Nothing is derived from an original that a scanner has not judged.",
        path=_UPLOADS,
        old="    if is_held(source) or not item.is_for(name):\n",
        new="    if not item.is_for(name):\n",
        tests=("tests/orm/journal/test_derived_flush.py::test_an_original_that_is_held[asyncpg]",),
    ),
    Mutant(
        name="deriver-from-what-is-held-later",
        rule="A worker derives nothing from an original that a scanner has not judged.",
        path=_JOBS,
        old="            require_scanned(source)\n",
        new="            pass\n",
        tests=("tests/orm/journal/test_derived_flush.py::test_an_original_that_is_held[asyncpg]",),
    ),
    Mutant(
        name="deriver-of-any-type",
        rule="A recipe is not called for originals of media types that it is not for.",
        path=_UPLOADS,
        old="    if is_held(source) or not item.is_for(name):\n",
        new="    if is_held(source):\n",
        tests=("tests/orm/test_derived_types.py::test_another_type[sqlite-begin-flush]",),
    ),
    Mutant(
        name="deriver-of-what-is-not-accepted-any-more",
        rule="The job of a recipe that is not for the media type of its original any more is done.",
        path=_ROWS,
        old="        return declared.accept is None or declared.is_for(self.ref)\n",
        new="        return True\n",
        tests=("tests/orm/journal/test_derived_flush.py::test_a_recipe_that_is_not_for_its_type_any_more[asyncpg]",),
    ),
    Mutant(
        name="deriver-what-clients-say-counts",
        rule="The media type that was found in the content decides which variants an original has.",
        path="granite_storage/derived/base.py",
        old="    if isinstance(found, str):\n        return matches(found, accept)\n",
        new="",
        tests=("tests/orm/test_derived_types.py::test_what_was_found_counts",),
    ),
    Mutant(
        name="deriver-leaves-intents-of-what-it-does-not-make",
        rule="The transaction of a row consumes the intents of variants that its file does not have.",
        path=_UPLOADS,
        old=" if name in self.made or not self.is_for(name)]",
        new=" if name in self.made]",
        tests=("tests/orm/journal/test_derived_flush.py::test_another_type_leaves_nothing_to_do[asyncpg]",),
    ),
    Mutant(
        name="deriver-refused-flush-leaves-variants",
        rule="Where a variant is refused in the flush, nothing is left of the others.",
        path=_UPLOADS,
        old="    stored += [variant for item in items for variant in item.stored_variants]\n",
        new="",
        tests=(f"{_FLUSH}::TestFailures::test_refused_after_another_was_stored[sqlite-begin]",),
    ),
    Mutant(
        name="deriver-variants-under-no-intent",
        rule="The intents of originals and variants are committed together, before the first byte.",
        path=_UPLOADS,
        old="        prepared = [one for item in concerned for one in (item.prepared, *item.variants.values())]\n",
        new="        prepared = [one for item in concerned for one in (item.prepared,)]\n",
        tests=("tests/orm/journal/test_derived_flush.py::test_intents_come_first[asyncpg]",),
    ),
    Mutant(
        name="deriver-under-the-clients-limit",
        rule="What clients may send does not bind a variant.",
        path="granite_storage/_engine.py",
        old="return self.policy.max_size if self.source is None else None",
        new="return self.policy.max_size",
        tests=(f"{_FLUSH}::TestMade::test_what_clients_may_send_does_not_bind_it[sqlite-begin]",),
    ),
    Mutant(
        name="deriver-on-request-left-behind",
        rule="A variant that is made when it is asked for is deleted where no row has taken it.",
        path=_ROWS,
        old="        elif setting.fate is _Fate.UNSET and stored:\n",
        new="        elif False:\n",
        tests=(f"{_ASKED}::TestAsked::test_replaced[sqlite-begin]",),
    ),
    Mutant(
        name="deriver-on-request-in-doubt-deleted",
        rule="Where it is unknown whether a row has a variant, the object stays.",
        path=_ROWS,
        old="        elif setting.fate is _Fate.UNSET and stored:\n",
        new="        if setting.fate is not _Fate.SET and stored:\n",
        tests=(f"{_ASKED}::test_a_commit_of_which_nothing_is_known[sqlite-begin]",),
    ),
    Mutant(
        name="deriver-on-request-twice",
        rule="Callers in one process that ask for one variant share the work.",
        path=_ROWS,
        old="    if entry is None:\n        entry = in_progress[key]",
        new="    if True:\n        entry = in_progress[key]",
        tests=(f"{_ASKED}::TestAsked::test_several_at_once_share_the_work[sqlite-begin]",),
    ),
    Mutant(
        name="deriver-later-without-journal",
        rule="Variants that are made after the commit need a journal.",
        path="granite_storage/orm/columns.py",
        old='if item.recipe.when == "later"]:',
        new='if item.recipe.when == "never"]:',
        tests=("tests/orm/test_derived_declarations.py::test_later_needs_a_journal",),
    ),
]
