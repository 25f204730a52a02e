"""The scenarios of transactions once more, with synchronous sessions: nothing is different to the application."""

from __future__ import annotations

from tests.orm import test_bulk, test_listeners, test_scenarios

for module in (test_scenarios, test_bulk, test_listeners):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("Test")})
