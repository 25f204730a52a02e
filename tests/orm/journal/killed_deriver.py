"""A worker that kills itself at one of the steps of making variants; arguments: a database, a folder, the step."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from granite_storage import StorageManager, StoragePolicy
from granite_storage._engine import Engine
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import StorageJournal, bind_storage
from granite_storage.orm.journal import variant_jobs
from granite_storage.orm.journal.variant_jobs import VariantJobs
from tests.orm.derivations import Upper, declared
from tests.orm.environment import Base

RECIPES = {"thumb": Upper("a"), "card": Upper("b")}
STEPS: dict[str, tuple[Any, str]] = {
    "the claim": (VariantJobs, "_claim"),
    "the intents": (StorageJournal, "begin_uploads"),
    "an upload": (Engine, "put"),
    "the locks": (variant_jobs, "choose_rows"),
    "the rows": (variant_jobs, "write_variants"),
    "the displaced": (variant_jobs, "nominate"),
    "the transaction": (VariantJobs, "_publish"),
    "the settlement": (VariantJobs, "_settle_uploads"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trap(step: str) -> None:
    """Kill this process before or after a step."""
    moment, _, name = step.partition(" ")
    owner, function = STEPS[name]
    original = getattr(owner, function)

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            die()
        await original(*args, **kwargs)
        die()

    def called(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            die()
        original(*args, **kwargs)
        die()

    setattr(owner, function, awaited if asyncio.iscoroutinefunction(original) else called)


async def main(url: str, root: str, step: str) -> None:
    engine = create_async_engine(url)
    store = LocalStorageBackend(root, fsync=False)
    manager = StorageManager(backends={"store": store}, policies={"docs": StoragePolicy("docs", "store")})
    journal = StorageJournal(engine)
    bind_storage(Base, manager, journal=journal)
    trap(step)
    with declared(RECIPES):
        await journal._jobs(VariantJobs).run("store")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
