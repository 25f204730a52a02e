"""The scenarios of transactions once more, with synchronous sessions: nothing is different to the application."""

from __future__ import annotations

from tests.orm import test_bulk, test_listeners, test_scenarios
from tests.orm.test_interrupted_commits import interrupts, test_closed_and_not_rolled_back
from tests.orm.test_outer_savepoints import test_nothing_is_deleted_of_work_that_was_done_partly_before_it
from tests.orm.test_random_cascades import test_random_cascades
from tests.orm.test_random_listeners import meddled, test_random_listeners

__all__ = [
    "interrupts",
    "meddled",
    "test_closed_and_not_rolled_back",
    "test_nothing_is_deleted_of_work_that_was_done_partly_before_it",
    "test_random_cascades",
    "test_random_listeners",
]

for module in (test_scenarios, test_bulk, test_listeners):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("Test")})
