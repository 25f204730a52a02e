"""Services that tests need: where one is missing, its tests are skipped loudly on a user's machine, and fail in CI."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NoReturn, TypeVar

import pytest

__all__ = ["service", "unavailable"]

Service = TypeVar("Service")


@contextlib.contextmanager
def service(name: str, context: AbstractContextManager[Service]) -> Iterator[Service]:
    """Enter what gives a service, which raises ImportError, LookupError or RuntimeError where there is none."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(context)
        except (ImportError, LookupError, RuntimeError) as error:
            unavailable(f"{name} is unavailable: {error}")
        yield found


def unavailable(why: str) -> NoReturn:
    """Leave out the tests that need what is missing, and say so at once; in CI, fail them."""
    if os.environ.get("CI"):
        pytest.fail(why)
    print(f"\ntests are left out: {why}", file=sys.__stderr__)
    pytest.skip(why)
