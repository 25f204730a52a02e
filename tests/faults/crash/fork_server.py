"""A process that has imported all that children need, and forks one of them whenever it is told to.

It reads jobs from its standard input, one per line as JSON, and writes what becomes of its children to its standard output.
When its input ends it kills them all and ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress

import aioboto3  # noqa: F401  # imported once, for all children
import aiosqlite  # noqa: F401
import asyncpg  # noqa: F401
import psycopg  # noqa: F401
from sqlalchemy.dialects.postgresql import asyncpg as _asyncpg  # noqa: F401
from sqlalchemy.dialects.postgresql import psycopg as _psycopg  # noqa: F401
from sqlalchemy.dialects.sqlite import aiosqlite as _aiosqlite  # noqa: F401

from granite_storage.backends import s3  # noqa: F401
from tests.faults.crash.child import Job, run


def main() -> None:
    children: set[int] = set()
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _say({"event": "ready"})
    pending = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            woken.recv(4096)
            _report(children)
        if 0 in readable:
            given = os.read(0, 65536)
            if not given:
                break
            *lines, pending = (pending + given).split(b"\n")
            for line in lines:
                children.add(_fork(line))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(line: bytes) -> int:
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os._exit(run(Job(**json.loads(line))))
    _say({"event": "started", "pid": pid})
    return pid


def _report(children: set[int]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                return
            if os.WIFSTOPPED(status):
                _say({"event": "stopped", "pid": pid})
            elif os.WIFCONTINUED(status):
                _say({"event": "continued", "pid": pid})
            else:
                children.discard(pid)
                _say({"event": "ended", "pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
