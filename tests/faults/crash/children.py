"""Children from the parent's side: started, waited for, stopped and killed."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.core.support import PROJECT
from tests.faults.crash.child import Job

__all__ = ["Child", "ChildProcesses", "child_processes"]

PATIENCE = 60.0
"""How long anything may take that must happen, in seconds: machines may be slow."""


@dataclass(eq=False)
class Child:
    """A child that was started.

    Attributes:
        pid: Its number.
        job: What it does.
        events: What became of it, in order: `stopped`, `continued`, `ended`.
        code: How it ended: its exit status, negative for a signal; None while it lives.
    """

    pid: int
    job: Job
    events: list[str] = field(default_factory=list)
    code: int | None = None
    changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def tell(self, event: str, code: int | None) -> None:
        with self.changed:
            self.events.append(event)
            self.code = code
            self.changed.notify_all()

    async def wait_for(self, *events: str, timeout: float = PATIENCE) -> str | None:
        """Wait until one of these becomes of it; return which, None where time is up."""
        return await asyncio.to_thread(self._wait_for, events, timeout)

    def _wait_for(self, events: tuple[str, ...], timeout: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: set(events) & set(self.events), timeout)
            return next((event for event in self.events if event in events), None)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        with self.changed:
            if self.code is None:
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill it, and wait for its death."""
        self.send(signal.SIGKILL)
        assert await self.wait_for("ended"), f"{self.job} was killed and lives"

    @property
    def log(self) -> str:
        """What it has said."""
        path = Path(self.job.log)
        return path.read_text() if path.exists() else ""

    @property
    def has_reached_its_point(self) -> bool:
        return f"reached: {self.job.point}\n" in self.log


class ChildProcesses:
    """Starts children; see `child_processes`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._children: dict[int, Child] = {}
        self._born: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._job: Job | None = None

    def start(self, job: Job) -> Child:
        """Fork a child."""
        assert self._process.stdin is not None
        self._job = job
        self._process.stdin.write(json.dumps(job.as_dict()) + "\n")
        self._process.stdin.flush()
        return self._born.get(timeout=PATIENCE)

    def listen(self, output: IO[str]) -> None:
        """Take down what becomes of children until the fork server ends."""
        for line in output:
            event = json.loads(line)
            match event["event"]:
                case "ready":
                    pass
                case "started":
                    assert self._job is not None
                    child = self._children[event["pid"]] = Child(event["pid"], self._job)
                    self._born.put(child)
                case other:
                    self._children[event["pid"]].tell(other, event.get("code"))


@contextmanager
def child_processes() -> Iterator[ChildProcesses]:
    """Run the fork server, and start children through it."""
    command = [sys.executable, "-m", "tests.faults.crash.fork_server"]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found = ChildProcesses(process)
        listener = threading.Thread(target=found.listen, args=(process.stdout,), name="crash-fork-server")
        listener.start()
        try:
            yield found
        finally:
            process.stdin.close()
            listener.join(PATIENCE)
