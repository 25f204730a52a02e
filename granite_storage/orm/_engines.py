"""Engines that `Engine.execution_options` makes: others than the one they are made from, with the same pool and events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Engine

__all__ = ["dispatchers_of", "root_engine"]


def root_engine(engine: Engine) -> Engine:
    """Return the engine that one with options of its own was made from."""
    while isinstance(proxied := getattr(engine, "_proxied", None), Engine):
        engine = proxied
    return engine


def dispatchers_of(engine: Engine) -> Iterator[Any]:
    """Yield what holds the listeners of an engine: its own, and those of each engine that it was made from."""
    while isinstance(proxied := getattr(engine, "_proxied", None), Engine):
        yield getattr(engine.dispatch, "local", engine.dispatch)
        engine = proxied
    yield engine.dispatch
