"""Which of the tests of faults are for a session of their own."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("GRANITE_CRASH_KILLS") else ["crash"]
"""Programs that are killed take their time: `nox -s crash` says how many, and runs them."""
