"""What the environment says of the crash tests."""

from __future__ import annotations

import os
import uuid

__all__ = ["KILLS", "MANY", "SEED"]

KILLS = int(os.environ.get("GRANITE_CRASH_KILLS", "60"))
"""How many kills there are, at the least: each setting has its share, and comes to each of its own points once."""

MANY = 500
"""From how many kills on everything else is tried everywhere, too, and not only at some points."""

SEED: str = os.environ.get("GRANITE_CRASH_SEED") or uuid.uuid4().hex[:8]
"""What all random choices follow from; `GRANITE_CRASH_SEED` repeats them, though not the timing."""
