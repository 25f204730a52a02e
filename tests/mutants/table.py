"""All mutants."""

from __future__ import annotations

from tests.mutants import (
    backends,
    core,
    derived,
    derivers,
    effects,
    gc,
    inspection,
    journal,
    nested,
    sessions,
    sqlite,
    tools,
    web,
)
from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: list[Mutant] = [
    *core.MUTANTS,
    *backends.MUTANTS,
    *sessions.MUTANTS,
    *journal.MUTANTS,
    *sqlite.MUTANTS,
    *gc.MUTANTS,
    *nested.MUTANTS,
    *web.MUTANTS,
    *inspection.MUTANTS,
    *derived.MUTANTS,
    *derivers.MUTANTS,
    *effects.MUTANTS,
    *tools.MUTANTS,
]
