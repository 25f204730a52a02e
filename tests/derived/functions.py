"""Functions that worker processes run in the tests: honest ones, and what a decoder of a hostile file may do."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO

from granite_storage.derived import Derivation, DerivationSource
from granite_storage.exceptions import DerivationRefusedError


def shout(file: BinaryIO) -> bytes:
    return file.read().upper()


def count(file: BinaryIO) -> str:
    return str(len(file.read()))


def describe(file: BinaryIO) -> Derivation:
    return Derivation(file.read(3), "text/csv", {"pages": 2, "title": "ü"}, "page.csv")


def lengthen(file: BinaryIO) -> bytes:
    return file.read() * 1_000_000


def name_process(_: BinaryIO) -> str:
    return str(os.getpid())


def read_by_program(file: BinaryIO) -> bytes:
    return subprocess.run(["/bin/cat", file.name], capture_output=True, check=True).stdout


def list_modules(_: BinaryIO) -> str:
    return " ".join(sys.modules)


def refuse(_: BinaryIO) -> bytes:
    raise DerivationRefusedError("this is no poem")


def fail(_: BinaryIO) -> bytes:
    raise ValueError("cannot read this")


def segfault(_: BinaryIO) -> bytes:
    ctypes.string_at(0)
    return b""


def abort(_: BinaryIO) -> bytes:
    os.abort()


def exit_at_once(_: BinaryIO) -> bytes:
    os._exit(3)


def exit_politely(_: BinaryIO) -> bytes:
    sys.exit(4)


def interrupt(_: BinaryIO) -> bytes:
    raise KeyboardInterrupt


def eat_memory(_: BinaryIO) -> bytes:
    eaten = []
    while True:
        eaten.append(bytearray(8 << 20))


def load_library_without_memory(_: BinaryIO) -> bytes:
    eaten, size = [], 8 << 20
    while size > 1 << 12:
        try:
            eaten.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except (OSError, MemoryError):
            size //= 2
    from PIL import _imaging  # nothing has loaded it yet

    return bytes(len(eaten)) + bytes(_imaging.__doc__ is None)


def loop(_: BinaryIO) -> bytes:
    while True:
        pass


def sleep(_: BinaryIO) -> bytes:
    time.sleep(600)
    return b""


def sleep_a_little(file: BinaryIO) -> bytes:
    time.sleep(0.05)
    return file.read()


def touch_and_sleep(file: BinaryIO) -> bytes:
    """Make a file of the name that is the content, and go on for a while."""
    name = file.read()
    os.mknod(name)
    time.sleep(1)
    return name


def leave_a_child(_: BinaryIO) -> str:
    """Return what goes on running, and which process was asked."""
    child = subprocess.Popen(["sleep", "600"])  # noqa: S607
    return f"{os.getpid()} {child.pid}"


def leave_a_thread(_: BinaryIO) -> str:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return str(os.getpid())


def return_nothing(_: BinaryIO) -> None:
    pass


def fork_and_hang(file: BinaryIO) -> bytes:
    """Leave children that hold all descriptors, then die."""
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(600)
    os._exit(5)


def write_to_stdout(file: BinaryIO) -> bytes:
    sys.stdout.write("x" * 1_000_000)
    sys.stderr.write("y" * 1_000_000)
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"z" * 100_000)
    return file.read()


def close_all(_: BinaryIO) -> bytes:
    os.closerange(0, 1000)
    return b"x"


def close_all_and_hang(_: BinaryIO) -> bytes:
    os.closerange(0, 1000)
    time.sleep(600)
    return b"x"


def babble(_: BinaryIO) -> bytes:
    """Write into every descriptor, the one to the parent included."""
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff" * 4096)
    return b"x"


def answer_strangely(file: BinaryIO) -> Any:
    return {
        b"none": None,
        b"number": 7,
        b"media": Derivation(b"", media={"x": object()}),
        b"deep": Derivation(b"", media=json.loads('{"x":' + "[" * 500 + "]" * 500 + "}")),
        b"type": Derivation(b"", "text/html\r\nSet-Cookie: x=1"),
        b"name": Derivation(b"", filename="a\nb"),
        b"long name": Derivation(b"", filename="a" * 256),
        b"long": Derivation(b"", media={"x": "y" * 300_000}),
    }[file.read()]


def fill_disk(_: BinaryIO) -> bytes:
    with tempfile.TemporaryFile() as file:
        for _ in range(1000):
            file.write(bytes(1 << 20))
    return b""


async def shout_elsewhere(source: DerivationSource) -> bytes:
    async with source.open() as chunks:
        return b"".join([chunk async for chunk in chunks]).upper()


async def hang_elsewhere(source: DerivationSource) -> bytes:
    import asyncio

    await asyncio.sleep(600)
    return b""


async def fail_elsewhere(source: DerivationSource) -> bytes:
    raise ValueError("secret")


class Holder:
    def method(self, file: BinaryIO) -> bytes:
        return file.read()

    @staticmethod
    def static(file: BinaryIO) -> bytes:
        return file.read().lower()


def take_over(_: BinaryIO, **arguments: Any) -> Derivation:
    """Say of an image what a decoder might say that runs the code of a hostile file."""
    media = {"type": "text/html", "width": "1", "height": -1, "frames": True, "placeholder": "javascript:alert(1)", "x": 1}
    return Derivation(b"<script>", "text/html", media, "a.html")


def list_loaders(file: BinaryIO, **arguments: Any) -> str:
    """Make an image with libvips, then tell which loaders would open a file."""
    import pyvips

    from granite_storage.derived._vips import render

    render(file, **arguments)
    found = []
    for suffix, content in {"png": None, "svg": b"<svg/>", "csv": b"1,2", "ppm": b"P6 1 1 255\n123"}.items():
        if content is None:
            found.append(pyvips.vips_lib.vips_foreign_find_load(file.name.encode()))
        else:
            with tempfile.NamedTemporaryFile(suffix=f".{suffix}") as other:
                other.write(content)
                other.flush()
                found.append(pyvips.vips_lib.vips_foreign_find_load(other.name.encode()))
    return " ".join(pyvips.ffi.string(name).decode() for name in found if name != pyvips.ffi.NULL)


async def refuse_elsewhere(source: DerivationSource) -> bytes:
    raise DerivationRefusedError("this is no poem")
