"""Every Python block of the README and the docs runs, and so does every example in a docstring."""

from __future__ import annotations

import ast
import asyncio
import doctest
import gc
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import boto3
import pytest
from sqlalchemy.engine import URL
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser

import granite_storage
from tests.orm.databases import postgres_database
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server, moto_s3

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_HERE = [path for path in DOCUMENTS if path.parent.name != "tutorial"]  # `test_tutorial.py` runs that
BLOCK = re.compile(r"^ *```python$|^<!--- invisible-code-block: python$|^% invisible-code-block: python$", re.MULTILINE)


def evaluate(example: Example) -> None:
    """Run a block as `python -m asyncio` would: Sybil's own evaluator refuses an `await` outside of a function.

    The coroutine of a block with such an `await` is left in the namespace.
    """
    source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
    code = compile(source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    example.namespace["__result__"] = eval(code, example.namespace)


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[S3Server]:
    with moto_s3() as server:
        client = boto3.client("s3", endpoint_url=server.endpoint_url, **server.session_kwargs)
        client.create_bucket(Bucket="my-bucket")
        client.close()
        yield server


@pytest.fixture
def database(request: pytest.FixtureRequest, postgres_server: URL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty database for each document that names one: their tables have the same names."""
    (document,) = request.node.callspec.params.values()  # a path, or its name
    if "DATABASE_URL" not in (ROOT / document).read_text():
        yield
        return
    with postgres_database(postgres_server, "asyncpg") as found:
        monkeypatch.setenv("DATABASE_URL", found.url.render_as_string(hide_password=False))
        yield


@pytest.fixture
def surroundings(bucket_server: S3Server, database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide an empty working directory, and a bucket and a database in the usual environment variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket_server.endpoint_url)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_runs(path: Path) -> None:
    """The blocks of one document share a namespace and an event loop; one that awaits nothing runs outside of it."""
    document = Sybil(parsers=[CodeBlockParser("python", evaluate)]).parse(path)
    document.namespace |= {"EXAMPLES": ROOT / "examples", "__name__": "__main__"}
    examples = list(document)
    assert len(examples) == len(BLOCK.findall(path.read_text()))  # no block is skipped
    with asyncio.Runner() as runner:
        for example in examples:
            example.evaluate()
            result = example.namespace.pop("__result__")
            if inspect.iscoroutine(result):
                runner.run(result)
        assert not asyncio.all_tasks(runner.get_loop())


def modules() -> list[str]:
    found = pkgutil.walk_packages(granite_storage.__path__, "granite_storage.")
    return ["granite_storage", *(module.name for module in found)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module: ModuleType = importlib.import_module(name)
    gc.disable()  # doctest reads cached lines of generated classes, which are removed with a class
    try:
        assert doctest.testmod(module).failed == 0
    finally:
        gc.enable()
