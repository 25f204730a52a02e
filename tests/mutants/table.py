"""All mutants."""

from __future__ import annotations

from tests.mutants import journal, sessions
from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

MUTANTS: list[Mutant] = [*journal.MUTANTS, *sessions.MUTANTS]
