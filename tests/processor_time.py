"""The time that the processor works on something, for tests that limit it."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["fastest"]


def fastest(work: Callable[[], object]) -> float:
    """Return the seconds that this thread worked in the best of three runs.

    What other threads of the process do does not count, and what a busy machine adds to one run does not decide.
    """
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)
