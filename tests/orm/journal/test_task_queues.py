"""The adapters of docs/derived-operations.md: task queues that do the journal's jobs instead of a worker of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from taskiq import InMemoryBroker

from granite_storage import ConfigurationError
from tests.orm.databases import Database
from tests.orm.derivations import Upper, declared, expected, journal_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.programs import restored_logging


async def until_derived(env: OrmEnvironment, recipes: dict[str, Upper], content: str) -> None:
    async with asyncio.timeout(30):
        while await shown(env) != expected(recipes, content):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.02)


async def test_taskiq(env: OrmEnvironment) -> None:
    journal, broker = journal_of(env), InMemoryBroker()

    @broker.task(schedule=[{"cron": "* * * * *"}])
    async def recover_files() -> None:
        await journal.recover()

    sending: set[asyncio.Task[Any]] = set()

    @journal.on_work
    def wake() -> None:
        task: asyncio.Task[Any] = asyncio.create_task(recover_files.kiq())
        sending.add(task)
        task.add_done_callback(sending.discard)

    recipes = {"thumb": Upper()}
    await broker.startup()
    with declared(recipes):
        await env.add(Doc(id=1, file=file("x")))
        await until_derived(env, recipes, "x")
        await broker.wait_all()
    await broker.shutdown()


async def test_celery(psycopg_database: Database) -> None:
    app = Celery("files", broker="memory://", set_as_current=False)
    recipes = {"thumb": Upper()}
    async with orm_environment(psycopg_database, journaled=True) as env:
        journal = journal_of(env)

        @app.task(name="recover_files", ignore_result=True)
        def recover_files() -> None:
            journal.sync.recover()

        journal.on_work(recover_files.delay)
        with declared(recipes):
            worker = start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30.0)
            with restored_logging():  # it sets the level of all loggers
                await asyncio.to_thread(worker.__enter__)
                try:
                    await env.add(Doc(id=1, file=file("x")))
                    await until_derived(env, recipes, "x")
                finally:
                    await asyncio.to_thread(worker.__exit__, None, None, None)
        await env.check_recovery()


async def test_a_callback_that_fails(env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    """The transaction has committed by then, and its caller must not see an error."""

    @journal_of(env).on_work
    def wake() -> None:
        raise ConnectionError("no broker")

    with declared({"thumb": Upper()}):
        await env.add(Doc(id=1, file=file("x")))
    assert "a callback of on_work failed" in caplog.text
    assert "no broker" in caplog.text


async def test_what_is_no_callback(env: OrmEnvironment) -> None:
    with pytest.raises(ConfigurationError, match="on_work takes a function without arguments, not 'recover'"):
        journal_of(env).on_work("recover")  # type: ignore[arg-type]

    async def wake() -> None:
        raise AssertionError

    with pytest.raises(ConfigurationError, match="which is async: nothing would await it"):
        journal_of(env).on_work(wake)
