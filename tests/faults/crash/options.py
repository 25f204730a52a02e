"""How many programs the crash tests kill, and what their random choices follow from."""

from __future__ import annotations

import pytest

from tests.tiers import repetitions, seed

__all__ = ["KILLS", "MANY", "SECOND_DRIVER", "SEED", "TRIGGERS"]

KILLS = repetitions("GRANITE_CRASH_KILLS", default=8, exhaustive=200)
"""How many kills there are, at the least.

Each setting has its share, and comes to each of its own points once; in the default tier to some of them.
"""

MANY = 500
"""From how many kills on everything else is tried everywhere, too, and not only at some points."""

SEED = str(seed())
"""What all random choices follow from; `GRANITE_SEED` repeats them, though not the timing."""

SECOND_DRIVER = pytest.mark.exhaustive("the protocol takes the same steps with asyncpg; only the driver differs")
"""For psycopg, where asyncpg is tried too."""

TRIGGERS = "+triggers"
"""What follows the name of a database that has triggers, and SQL that bypasses the sessions."""
