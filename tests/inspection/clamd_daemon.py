"""ClamAV's real daemon, in a process of its own, with a database of one signature: others cannot be downloaded everywhere."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.inspection.clamd_server import EICAR
from tests.servers import free_ports

__all__ = ["STREAM_MAX_LENGTH", "ClamdDaemon", "clamd"]

STREAM_MAX_LENGTH = 4 << 20
_START_TIMEOUT = 60.0
_SETTINGS = """
Foreground yes
LogTime no
MaxThreads 4
MaxQueue 100
ReadTimeout 1
MaxFileSize 2M
ConcurrentDatabaseReload no
"""


@dataclass(frozen=True)
class ClamdDaemon:
    """A running daemon.

    Attributes:
        tcp: Its address.
        unix: The path of its socket.
        version: What `clamd --version` says.
    """

    tcp: str
    unix: str
    version: str


@contextlib.contextmanager
def clamd() -> Iterator[ClamdDaemon]:
    """Run it in a temporary folder."""
    program = shutil.which("clamd") or shutil.which("clamd", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise RuntimeError("the program 'clamd' is missing: install clamav-daemon")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="granite-clamd-", ignore_cleanup_errors=True) as name:
        folder, (port,) = Path(name), free_ports(1)
        (folder / "database").mkdir()
        (folder / "database/test.ndb").write_text(f"Eicar-Test:0:*:{EICAR.hex()}\n")
        settings = {
            "DatabaseDirectory": folder / "database",
            "LocalSocket": folder / "clamd.sock",
            "TCPSocket": port,
            "TCPAddr": "127.0.0.1",
            "TemporaryDirectory": folder,
            "StreamMaxLength": STREAM_MAX_LENGTH,
        }
        configuration = folder / "clamd.conf"
        configuration.write_text(_SETTINGS + "".join(f"{name} {value}\n" for name, value in settings.items()))
        with (folder / "clamd.log").open("wb") as log:
            process = subprocess.Popen(
                [program, f"--config-file={configuration}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            _wait_until_ready(port, process, folder / "clamd.log")
            yield ClamdDaemon(f"127.0.0.1:{port}", str(folder / "clamd.sock"), version)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"zPING\0")
            if connection.recv(16) == b"PONG\0":
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"clamd did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
