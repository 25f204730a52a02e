"""The program of a worker process: it runs one function after the other, within limits, and ends when its parent does.

It is started as a file, not as a module: nothing of the application is imported before a function asks for it, and the
application's main module never is. It speaks JSON over a socket: what a decoder of hostile files sends must not be unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any

HEADER = struct.Struct(">I")
MOST_ANSWER = 256 * 1024
_MOST_TEXT = 4000
_NO_ROOM = "failed to map segment from shared object"  # how glibc says that there is no memory for a library
_GRACE = 5.0


def main() -> None:
    """Serve the parent at the other end of the first socket until it is closed, or nothing comes for the idle time.

    Nothing is ever sent over the second socket: the kernel ends this process when the parent's end of it is closed, even if
    Python never runs again. A signal of the first socket could be for a request that this process has received already.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGALRM, signal.SIGIO, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    channel, lifeline = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO when it is closed
    settings, _ = _receive(channel)
    sys.path[:] = settings["path"]
    while True:
        channel.settimeout(settings["idle"])
        try:
            request, descriptors = _receive(channel)
        except (EOFError, OSError):
            return
        channel.settimeout(None)
        answered = _serve(request, descriptors)
        if _leaves_something():
            answered["is_worn"] = True
        answer = json.dumps(answered).encode()
        channel.sendall(HEADER.pack(len(answer)) + answer)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(channel, HEADER.size, 2)
    head += _receive_exactly(channel, HEADER.size - len(head)) if head else b""
    if not head:
        raise EOFError
    request: dict[str, Any] = json.loads(_receive_exactly(channel, HEADER.unpack(head)[0]))
    return request, descriptors


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(size - len(received))
        if not piece:
            raise EOFError
        received += piece
    return bytes(received)


def _serve(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    source, result = descriptors
    try:
        with _limits(request), _open_path(source) as file, os.fdopen(result, "wb", closefd=False) as output:
            return _run(request, file, output)
    except BaseException as error:  # noqa: BLE001  # also what ends a program: this one goes on
        if isinstance(error, MemoryError) or (isinstance(error, ImportError) and _NO_ROOM in str(error)):
            # Only now is there memory again for what has to be said.
            return {"error": f"{request['function']} ran out of memory", "is_worn": True}
        errors = sys.modules.get("granite_storage.exceptions")
        if errors is not None and isinstance(error, errors.DerivationRefusedError):
            return {"refused": str(error)[:_MOST_TEXT]}
        said = traceback.format_exception_only(error)[-1].strip()[:_MOST_TEXT]
        return {"error": f"{request['function']} raised {said}", "traceback": traceback.format_exc()[-_MOST_TEXT:]}
    finally:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _leaves_something() -> bool:
    """Return whether the function has left a thread or a child, which the parent then ends with this process."""
    threading = sys.modules.get("threading")
    if threading is not None and threading.active_count() > 1:
        return True
    with contextlib.suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
        return True
    return False


def _run(request: dict[str, Any], file: IO[bytes], output: IO[bytes]) -> dict[str, Any]:
    module, _, qualname = request["function"].partition(":")
    function: Any = importlib.import_module(module)
    for name in qualname.split("."):
        function = getattr(function, name)
    value = function(file, **request["arguments"])
    found = {}
    if not isinstance(value, bytes | bytearray | memoryview | str):
        if not hasattr(value, "content"):
            raise TypeError(f"it must return bytes, text or a Derivation, not {type(value).__name__}")
        found = {name: getattr(value, name, None) or None for name in ("content_type", "media", "filename")}
        if found["media"] is not None:
            found["media"] = dict(found["media"])
        value = value.content
    if isinstance(value, os.PathLike):
        with open(value, "rb") as made:
            shutil.copyfileobj(made, output, 1 << 20)
    else:
        output.write(value.encode() if isinstance(value, str) else value)
    output.flush()
    json.dumps(found)
    return found


def _open_path(descriptor: int) -> IO[bytes]:
    """Open the original under a path, for libraries and programs that want one; the file itself has no name."""
    for path in (f"/proc/{os.getpid()}/fd/{descriptor}", f"/dev/fd/{descriptor}"):
        if os.path.exists(path):
            return open(path, "rb")
    return os.fdopen(descriptor, "rb", closefd=False)


@contextlib.contextmanager
def _limits(request: dict[str, Any]) -> Iterator[None]:
    """Let the kernel end this process where time is up, even if Python never runs again."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + request["timeout"]) + 1
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["max_size"],
        resource.RLIMIT_DATA: request["max_memory"],
        # Shared mappings are not data; a library may reserve far more of these, and of private ones, than it uses.
        resource.RLIMIT_AS: 2 * request["max_memory"] + (1 << 30),
    }
    try:
        for limit, most in limits.items():
            _set_limit(limit, most)
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + _GRACE)
        if os.getppid() != request["parent"]:
            raise EOFError("the parent is gone")
        yield
    finally:
        for limit in limits:
            _set_limit(limit, resource.RLIM_INFINITY)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _set_limit(limit: int, most: int) -> None:
    hard = resource.getrlimit(limit)[1]
    soft = most if hard == resource.RLIM_INFINITY else hard if most == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(limit, (soft, hard))


if __name__ == "__main__":
    main()
