"""Ctrl-C at each moment of a call: an exception where Python would let a signal's handler raise one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

OF_DESTRUCTORS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""For tests some of whose moments are those of a destructor, or after which one closes what was open."""

BELOW = ("asyncio", "concurrent", "contextlib", "queue", "threading", "weakref")
"""Modules in which a moment counts where the library has called them."""


def interrupt(call: Callable[[], object], moment: int, below: tuple[str, ...] = BELOW) -> bool:
    """Call a function and raise `KeyboardInterrupt` at one moment of it; return whether it had so many.

    A moment is the entry of a Python function or the return of one written in C, of the library or of what it calls: there
    the interpreter runs the handlers of signals.
    """
    passed = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal passed
        if event in ("call", "c_return") and _is_below(frame, below):
            passed += 1
            if passed == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

    usual = sys.getprofile()
    try:
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(usual)
    except KeyboardInterrupt:
        pass
    return passed >= moment


def _is_below(frame: FrameType | None, below: tuple[str, ...]) -> bool:
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("granite_storage"):
            return True
        if not module.startswith(below):
            return False
        frame = frame.f_back
    return False


@contextmanager
def signalled(begun: threading.Event, error: type[BaseException], *, delay: float = 0) -> Iterator[None]:
    """Raise an error in this thread, from the handler of a signal, once an event is set and some seconds have passed."""

    def raise_error(*_: object) -> None:
        raise error("interrupted")

    def send() -> None:
        begun.wait(10)
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGUSR1)

    usual = signal.signal(signal.SIGUSR1, raise_error)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        sender.join()  # first: without its handler, the signal ends the process
        signal.signal(signal.SIGUSR1, usual)
