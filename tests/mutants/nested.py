"""Mutants of what walks references and must walk those that a ref nests."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_GC = "tests/gc/test_variants.py"
_MIGRATION = "tests/migration/test_variants.py"
_SHARED = "tests/orm/test_shared_variants.py"
_LOCKING = "granite_storage/orm/locking.py"

MUTANTS = [
    Mutant(
        name="nested-collector-is-blind",
        rule="A variant that a row names is referenced.",
        path="granite_storage/gc/database.py",
        old="return [(column, column.table), (variant, variants)]",
        new="return [(column, column.table)]",
        tests=(f"{_GC}::test_a_variant_lives_and_dies_with_its_row",),
    ),
    Mutant(
        name="nested-recheck-is-blind",
        rule="The re-check before a delete looks into values, too.",
        path="granite_storage/orm/references.py",
        old="for refs in _refs_in(column, dialect.name, is_generated=column in generated)\n",
        new="for refs in _refs_in(column, dialect.name, is_generated=column in generated)[:1]\n",
        tests=(f"{_GC}::test_a_variant_that_comes_after_the_nomination",),
    ),
    Mutant(
        name="nested-rows-with-variants-are-spared",
        rule="A row whose ref has variants is not spared the look into them.",
        path="granite_storage/orm/columns.py",
        old='variant.c.value)), kind == "object"',
        new='variant.c.value)), kind == "array"',
        tests=(f"{_GC}::test_a_variant_lives_and_dies_with_its_row",),
    ),
    Mutant(
        name="nested-unreadable-variants-are-passed-over",
        rule="Variants that this version cannot read stop the collector.",
        path="granite_storage/orm/discovery.py",
        old='    return func.coalesce(_kind_of(value, "variants", dialect), kinds["null"]).in_(allowed)\n',
        new="    return true() if allowed else false()\n",
        tests=(f"{_GC}::test_variants_that_cannot_be_read_stop_the_run",),
    ),
    Mutant(
        name="nested-place-of-the-original",
        rule="A variant is in the store that it names itself.",
        path="granite_storage/gc/database.py",
        old="kind = _kind(value, column, dialect, identities)",
        new="kind = _kind(column.column, column, dialect, identities)",
        tests=(f"{_GC}::test_a_variant_of_an_unknown_place_stops_the_run",),
    ),
    Mutant(
        name="nested-mention-of-the-original",
        rule="A value is another store's only where its variants are, too.",
        path="granite_storage/gc/mentions.py",
        old='for identity in (value.get("identity"), *said)',
        new='for identity in (value.get("identity"),)',
        tests=(f"{_GC}::test_a_mention_in_a_value_of_two_stores",),
    ),
    Mutant(
        name="nested-given-references-are-blind",
        rule="The variants of references that the application gives are referenced.",
        path="granite_storage/gc/references.py",
        old="for one in iter_refs(ref):\n                        is_here",
        new="for one in (ref,):\n                        is_here",
        tests=(f"{_GC}::test_references_that_the_caller_gives",),
    ),
    Mutant(
        name="nested-model-refs-are-blind",
        rule="Every object that the rows of a model refer to is yielded.",
        path="granite_storage/orm/references.py",
        old="                for one in iter_refs(ref):\n                    yield one\n",
        new="                yield ref\n",
        tests=(f"{_GC}::test_references_that_the_caller_gives",),
    ),
    Mutant(
        name="nested-commit-asks-for-originals",
        rule="A transaction asks for each variant that it would delete, to which another row may have a plain ref.",
        path=_LOCKING,
        old="sources = {part.ref.location: part.source for item in objects for part in item.parts}",
        new="sources = {item.ref.location: item.source for item in objects}",
        tests=(f"{_SHARED}::test_a_variant_stays_while_anything_refers_to_it[asyncpg-deleted in bulk-a plain ref]",),
    ),
    Mutant(
        name="nested-commit-keeps-all-or-nothing",
        rule="Of an object and its variants those stay to which rows refer, and the others are deleted.",
        path="granite_storage/orm/_interfaces.py",
        old="    parts = (part for item in stored for part in ([item] if item.intent else item.parts))\n",
        new="    parts = iter(stored)\n",
        tests=(f"{_SHARED}::test_a_variant_stays_while_anything_refers_to_it[asyncpg-deleted in bulk-a plain ref]",),
    ),
    Mutant(
        name="nested-commit-is-blind",
        rule="A variant that a row of another base or schema nests is not deleted with the one that takes its place.",
        path=_LOCKING,
        old="return [location, variants_in(column, dialect)] if has_variants else [location]",
        new="return [location]",
        tests=(
            f"{_SHARED}::test_a_variant_stays_while_anything_refers_to_it[asyncpg-made again-another base]",
            f"{_SHARED}::test_a_variant_stays_while_anything_refers_to_it[sqlite-begin-made again-another schema]",
        ),
    ),
    Mutant(
        name="nested-variant-of-no-original",
        rule="A variant that is made again is looked for in the rows that hold its original.",
        path="granite_storage/orm/variants.py",
        old="return [StoredObject(self.manager, ref, source=self.source.location) for ref in refs]",
        new="return [StoredObject(self.manager, ref) for ref in refs]",
        tests=(f"{_SHARED}::test_a_variant_stays_while_anything_refers_to_it[asyncpg-made again-another base]",),
    ),
    Mutant(
        name="nested-unset-variant-not-asked-for",
        rule="A variant whose transaction has failed stays where a row has it nevertheless.",
        path="granite_storage/orm/variants.py",
        old="        self.has_written = bool(chosen)\n",
        new="",
        tests=(f"{_SHARED}::test_a_write_that_a_rollback_leaves",),
    ),
    Mutant(
        name="nested-migration-leaves-variants",
        rule="An object and its variants move together.",
        path="granite_storage/migration.py",
        old="    variants = held.ref.variants or {}\n",
        new="    variants: dict[str, StoredObjectRef] = {}\n",
        tests=(f"{_MIGRATION}::test_there_and_back",),
    ),
    Mutant(
        name="nested-migration-sees-the-original-only",
        rule="A value is moved where any of its objects is on another backend.",
        path="granite_storage/migration.py",
        old="any(ref.backend != self._to_backend for ref in iter_refs(held.ref))",
        new="held.ref.backend != self._to_backend",
        tests=(f"{_MIGRATION}::test_a_value_of_which_a_part_is_there_already",),
    ),
    Mutant(
        name="nested-migration-without-source",
        rule="The intent of a variant's copy names the copy of its original, whose row the worker looks into.",
        path="granite_storage/migration.py",
        old="prepared = replace(prepared, source=self._source.location, recipe",
        new="prepared = replace(prepared, recipe",
        tests=(f"{_MIGRATION}::test_all_objects_of_a_value",),
    ),
    Mutant(
        name="nested-verification-passes-over",
        rule="Variants are verified as other objects are.",
        path="granite_storage/verification.py",
        old="[(None, held.ref), *(held.ref.variants or {}).items()]",
        new="[(None, held.ref)]",
        tests=("tests/verification/test_variants.py",),
    ),
    Mutant(
        name="nested-variants-are-adopted",
        rule="A variant has an owner, and no other row adopts it.",
        path="granite_storage/alembic/_owners.py",
        old='    rows += find(source, *(value_in(variant, key, dialect) for key in ("location", "backend", "identity")))\n',
        new="",
        tests=("tests/alembic/test_one_owner.py::test_a_variant_of_another_file_has_an_owner",),
    ),
]
