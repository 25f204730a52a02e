"""Recipes of functions: what is refused at once, what identifies them, and coroutine functions."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.derived import Derivation, DerivationSource, Derived, Effect, EffectEvent, ImageVariant, Recipe
from granite_storage.derived.base import make_digest
from granite_storage.exceptions import (
    BackendError,
    ChecksumMismatchError,
    ConfigurationError,
    DerivationFailedError,
    DerivationRefusedError,
)
from tests.core.support import PROJECT, SLOT, texts
from tests.derived import functions
from tests.derived.support import derive


def recipe(function: Any, **options: Any) -> Derived:
    return Derived(function, **{"content_type": "text/plain"} | options)


def local_function() -> Callable[[BinaryIO], bytes]:
    def nested(file: BinaryIO) -> bytes:
        return file.read()

    return nested


def of_the_main_module(file: BinaryIO) -> bytes:
    return file.read()


of_the_main_module.__module__ = "__main__"


class TestDeclaration:
    def test_both_are_recipes(self) -> None:
        for one in (recipe(functions.shout), ImageVariant(fit=(9, 9))):
            assert isinstance(one, Recipe)
            assert (one.when, one.missing) == ("flush", "nothing")

    @pytest.mark.parametrize(
        ("function", "problem"),
        [
            (lambda file: file.read(), "a lambda or is defined inside another function"),
            (local_function(), "a lambda or is defined inside another function"),
            (functions.Holder().method, "not a plain function"),
            (functools.partial(functions.shout), "not a plain function"),
            (of_the_main_module, "in the program that runs"),
            ("tests.derived.functions:shout", "not a plain function"),
            (None, "not a plain function"),
        ],
        ids=["lambda", "nested", "method", "partial", "main", "text", "nothing"],
    )
    def test_what_a_process_cannot_import(self, function: Any, problem: str) -> None:
        with pytest.raises(ConfigurationError, match=f"{problem}.*; define it at the top level of a module"):
            recipe(function)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"content_type": "text"}, "content_type"),
            ({"content_type": None}, "content_type"),
            ({"when": "soon"}, "when must be one of 'flush', 'later', 'request', not 'soon'"),
            ({"missing": None}, "missing must be"),
            ({"timeout": float("inf")}, "timeout"),
            ({"timeout": True}, "timeout"),
            ({"max_memory": -1}, "max_memory"),
            ({"max_size": 1.5}, "max_size"),
            ({"max_source": 0}, "max_source"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            recipe(functions.shout, **options)

    def test_effects(self) -> None:
        async def handle(event: EffectEvent) -> None:
            raise AssertionError(event)

        effect = Effect(put=handle, remove=handle)
        assert (effect.put, effect.version) == (handle, 1)


class TestDigests:
    def test_it_is_the_same_everywhere(self) -> None:
        code = "from granite_storage.derived import Derived; from tests.derived.functions import shout;"
        code += "print(Derived(shout, content_type='text/plain').digest('text'))"
        for seed in ("1", "2"):
            command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": seed}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert done.stdout.strip() == recipe(functions.shout).digest("text") == "sha256:620e78f74c6ef9ab18b9fd4ba58fa4d9"

    def test_it_knows_all_that_decides_the_content(self) -> None:
        same = [
            {},
            {"when": "later"},
            {"missing": "original"},
            {"timeout": 5},
            {"max_memory": 9},
            {"max_size": 9},
            {"max_source": 9},
        ]
        assert len({recipe(functions.shout, **options).digest("a") for options in same}) == 1
        different = [{}, {"version": 2}, {"version": "1"}, {"content_type": "text/csv"}, {"filename": "a.txt"}]
        digests = [recipe(functions.shout, **options).digest(name) for options in different for name in ("a", "b")]
        digests += [recipe(functions.count).digest("a"), ImageVariant(fit=(9, 9)).digest("a")]
        assert len(set(digests)) == len(digests)
        assert all(len(digest) <= 40 for digest in digests)

    @given(
        st.dictionaries(texts(max_size=5), texts() | st.integers()), st.dictionaries(texts(max_size=5), texts() | st.integers())
    )
    def test_two_are_equal_where_all_parameters_are(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        turned = dict(reversed(one.items()))
        assert make_digest("kind", "name", one) == make_digest("kind", "name", turned)
        assert (make_digest("kind", "name", one) == make_digest("kind", "name", other)) == (one == other)


class TestCoroutineFunctions:
    async def test_it_runs_on_the_loop(self) -> None:
        made = await derive(recipe(functions.shout_elsewhere, filename="loud.txt"), b"abc")
        assert made == Derivation(b"ABC", "text/plain", None, "loud.txt")

    async def test_one_of_the_main_module_is_fine(self) -> None:
        async def local(source: DerivationSource) -> str:
            return "text"

        local.__qualname__, local.__module__ = "local", "__main__"
        assert (await derive(recipe(local), b"")).content == b"text"

    async def test_its_errors(self) -> None:
        with pytest.raises(DerivationFailedError, match=r"raised ValueError$") as caught:
            await derive(recipe(functions.fail_elsewhere), b"")
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(DerivationFailedError, match=r"functions:hang_elsewhere took longer than 0\.05 s$"):
            await derive(recipe(functions.hang_elsewhere, timeout=0.05), b"")
        with pytest.raises(DerivationFailedError, match="3 bytes, more than 2"):
            await derive(recipe(functions.shout_elsewhere, max_size=2), b"abc")
        with pytest.raises(DerivationRefusedError, match="no poem"):
            await derive(recipe(functions.refuse_elsewhere), b"")

    @pytest.mark.parametrize("made", [None, 3, ["x"], Derivation("x"), Derivation(Path("/none")), Derivation(Path("/"))])  # type: ignore[arg-type]
    async def test_results_that_are_none(self, made: Any) -> None:
        """The words are those for a plain function, which a process calls."""

        async def local(_: DerivationSource) -> Any:
            return made

        local.__qualname__ = "local"
        if isinstance(made, Derivation) and isinstance(made.content, str):
            assert (await derive(recipe(local), b"")).content == b"x"
            return
        problem = "TypeError: it must return bytes, text or a Derivation, not"
        if isinstance(made, Derivation):
            problem = "FileNotFoundError" if made.content == Path("/none") else "IsADirectoryError"
        with pytest.raises(DerivationFailedError, match=f"test_functions:local raised {problem}"):
            await derive(recipe(local), b"")

    @pytest.mark.parametrize("content", [bytearray(b"abc"), memoryview(b"abc"), "abc"])
    async def test_other_content(self, content: Any) -> None:
        async def local(_: DerivationSource) -> Any:
            return content

        local.__qualname__ = "local"
        assert await derive(recipe(local), b"") == Derivation(b"abc", "text/plain")

    async def test_a_file_is_measured(self, tmp_path: Path) -> None:
        path = tmp_path / "made"
        path.write_bytes(b"abc")

        async def local(_: DerivationSource) -> Derivation:
            return Derivation(path)

        local.__qualname__ = "local"
        assert (await derive(recipe(local), b"")).content == b"abc"
        with pytest.raises(DerivationFailedError, match="3 bytes, more than 2"):
            await derive(recipe(local, max_size=2), b"")

    @pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x")])
    async def test_ends_that_were_not_asked_for(self, error: BaseException) -> None:
        async def local(_: DerivationSource) -> bytes:
            raise error

        local.__qualname__ = "local"
        with pytest.raises(DerivationFailedError, match=f"test_functions:local raised {type(error).__name__}, but nothing"):
            await derive(recipe(local), b"")

    async def test_a_cancelled_caller(self) -> None:
        deriving = asyncio.create_task(derive(recipe(functions.hang_elsewhere), b""))
        await asyncio.sleep(0.01)
        deriving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deriving


class TestStoredOriginals:
    async def test_a_verified_reader_of_a_manager(self, tmp_path: Path) -> None:
        backend = MemoryStorageBackend()
        manager = StorageManager(backends={"store": backend}, policies={"files": StoragePolicy("files", "store")})
        async with manager:
            ref = await manager.put_bytes(**SLOT, content=b"abc" * 700_000)
            source = DerivationSource(ref, lambda: manager.open(ref, verify=True))
            assert (await derive(recipe(functions.count), source)).content == b"2100000"
            damaged = type(ref).from_dict({**ref.to_dict(), "checksum": "sha256:" + "0" * 64})
            with pytest.raises(ChecksumMismatchError):
                await derive(recipe(functions.count), DerivationSource(ref, lambda: manager.open(damaged, verify=True)))
            await manager.delete(ref)
            with pytest.raises(BackendError):
                await derive(recipe(functions.count), source)
