"""The scenarios of transactions once more, where each file has a variant: it comes, moves and goes with its original."""

from __future__ import annotations

from tests.orm import test_bulk, test_listeners, test_scenarios
from tests.orm.test_random_cascades import test_random_cascades
from tests.orm.test_random_listeners import meddled, test_random_listeners

__all__ = ["meddled", "test_random_cascades", "test_random_listeners"]

for module in (test_scenarios, test_bulk, test_listeners):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("Test")})
