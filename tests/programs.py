"""Programs that run in the tests' own process as if in one of their own, because an interpreter takes a second to start."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from granite_storage.orm._interfaces import active_bindings

__all__ = ["program"]


@contextlib.contextmanager
def program(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Make the process look like one that was just started in a folder, and undo what the program does to it.

    That is the working directory, the environment variables, `sys.path`, the configuration of logging, and the handlers of
    signals. Afterwards the modules of the folder are unloaded and the bases that they bound are unbound, so that the next program
    imports its application again.

    Args:
        folder: The working directory, in which the modules of the program are.
        environment: All environment variables.
    """
    with (
        _restored_variables(environment),
        contextlib.chdir(folder),
        _restored_imports(folder),
        restored_logging(),
        _restored_signals(),
        _restored_bindings(),
    ):
        yield


@contextlib.contextmanager
def _restored_variables(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    try:
        _set_variables(environment)
        yield
    finally:
        _set_variables(before)


def _set_variables(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


@contextlib.contextmanager
def _restored_imports(folder: Path) -> Iterator[None]:
    modules, path, writes_none = set(sys.modules), sys.path[:], sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a module that a test writes twice within a second would be taken from the cache
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes_none
        for name in set(sys.modules) - modules:
            if any(Path(place).is_relative_to(folder) for place in _places_of(sys.modules[name])):
                del sys.modules[name]


def _places_of(module: ModuleType) -> list[str]:
    """Return the file of a module, or the folders of a package that has none."""
    file = getattr(module, "__file__", None)
    return [file] if file else [*getattr(module, "__path__", [])]


@contextlib.contextmanager
def restored_logging() -> Iterator[None]:
    """Alembic's templates call `logging.config.fileConfig`, which disables each logger and removes pytest's handlers."""
    before = {logger: _logger_state(logger) for logger in _loggers()}
    try:
        yield
    finally:
        for logger in _loggers():
            level, logger.handlers[:], logger.propagate, logger.disabled = before.get(logger, (logging.NOTSET, [], True, False))
            if logger.level != level:
                logger.setLevel(level)


def _loggers() -> list[logging.Logger]:
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in named if isinstance(logger, logging.Logger))]


def _logger_state(logger: logging.Logger) -> tuple[int, list[logging.Handler], bool, bool]:
    return logger.level, logger.handlers[:], logger.propagate, logger.disabled


@contextlib.contextmanager
def _restored_signals() -> Iterator[None]:
    """An event loop that has handled a signal leaves the default behind, whatever was there before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _restored_bindings() -> Iterator[None]:
    before = active_bindings()
    try:
        yield
    finally:
        while added := [binding for binding in active_bindings() if binding not in before]:
            for binding in added:
                binding.unbind()
