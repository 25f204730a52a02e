"""All mutants."""

from __future__ import annotations

from tests.mutants import (
    backends,
    collections,
    core,
    derived,
    derivers,
    effects,
    gc,
    inspection,
    journal,
    mariadb,
    nested,
    panels,
    sessions,
    sqlite,
    tools,
    triggers,
    urls,
    web,
)
from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: list[Mutant] = [
    *core.MUTANTS,
    *backends.MUTANTS,
    *sessions.MUTANTS,
    *collections.MUTANTS,
    *journal.MUTANTS,
    *sqlite.MUTANTS,
    *triggers.MUTANTS,
    *mariadb.MUTANTS,
    *gc.MUTANTS,
    *nested.MUTANTS,
    *web.MUTANTS,
    *panels.MUTANTS,
    *inspection.MUTANTS,
    *derived.MUTANTS,
    *derivers.MUTANTS,
    *effects.MUTANTS,
    *tools.MUTANTS,
    *urls.MUTANTS,
]
