"""Azurite, Microsoft's stand-in for Azure's blobs, on a socket of this machine: a program for Node, which npm installs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from granite_storage.backends.obstore import ObjectStoreBackend
from tests.servers import free_ports

__all__ = ["AzureServer", "azurite"]

ACCOUNT = "granite"
ACCOUNT_KEY = base64.b64encode(b"granite-test-account-key-of-32-b").decode()
PACKAGE = "azurite@3"
CLIENT_OPTIONS = {"allow_http": True}

INSTALL_TIMEOUT = 300
START_TIMEOUT = 60.0


class AzureServer:
    """A running server.

    Attributes:
        endpoint_url: Where it listens, with the account.
    """

    def __init__(self, port: int) -> None:
        self.endpoint_url = f"http://127.0.0.1:{port}/{ACCOUNT}"

    def config(self, endpoint_url: str | None = None) -> dict[str, str]:
        """What obstore is configured with to be let in."""
        return {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY, "endpoint": endpoint_url or self.endpoint_url}

    def backend(self, container: str, *, path: str = "", endpoint_url: str | None = None, **options: Any) -> ObjectStoreBackend:
        """Return a backend on a container, or on a folder in it."""
        chosen = {"config": self.config(endpoint_url), "client_options": CLIENT_OPTIONS, **options}
        return ObjectStoreBackend(f"az://{container}{path}", **chosen)

    def new_container(self) -> str:
        """Make a container that nobody else uses; blocking."""
        container = f"granite-{uuid.uuid4().hex}"
        self._request("PUT", container)
        return container

    def remove_container(self, container: str) -> None:
        """Remove it with what is in it; blocking."""
        self._request("DELETE", container)

    @asynccontextmanager
    async def container(self) -> AsyncIterator[str]:
        """Give a container for one test, and remove it."""
        container = self.new_container()
        yield container
        self.remove_container(container)

    def _request(self, method: str, container: str) -> None:
        """Make or remove a container, signed with the account's key: obstore makes none."""
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        canonical = f"x-ms-date:{date}\nx-ms-version:2021-12-02\n/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        text = f"{method}{chr(10) * 12}{canonical}"
        signature = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
        request = urllib.request.Request(  # noqa: S310  # it is plain HTTP on purpose
            f"{self.endpoint_url}/{container}?restype=container",
            method=method,
            headers={
                "x-ms-date": date,
                "x-ms-version": "2021-12-02",
                "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}",
            },
        )
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310
            pass


@contextlib.contextmanager
def azurite() -> Iterator[AzureServer]:
    """Run Azurite in a process of its own, which keeps everything in memory.

    Raises:
        RuntimeError: Node is not there, or the program cannot be installed or started.
    """
    program = _installed()
    (port,) = free_ports(1)
    options = ["--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with tempfile.TemporaryDirectory(prefix="granite-azurite-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "azurite.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            server = AzureServer(port)
            _wait_until_ready(server, process, log)
            yield server
        finally:
            process.kill()
            process.wait()


def _installed() -> str:
    """Return the path of the program, which is installed once for all runs, outside the project."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise RuntimeError("Azurite needs Node and npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite-storage"
    home = cache / PACKAGE
    program = home / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "made"
            command = [npm, "install", "--prefix", str(made), "--no-fund", "--no-audit", "--silent", PACKAGE]
            made.mkdir()
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT)
            except (OSError, subprocess.SubprocessError) as error:
                raise RuntimeError(f"npm could not install {PACKAGE}: {error}") from error
            with contextlib.suppress(OSError):  # another run was quicker
                made.rename(home)
    return str(program)


def _wait_until_ready(server: AzureServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with contextlib.suppress(OSError):
            server.remove_container(server.new_container())
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Azurite did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
