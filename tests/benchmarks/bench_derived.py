"""What derived images cost: thumbnails of photographs in worker processes, against bare Pillow in as many processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from PIL import Image

from granite_storage import StoredObjectRef
from granite_storage.derived import DerivationSource, Derived, ImageVariant, limit_processes
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main

PROCESSES = 2
PHOTOS = 60
CALLS = 2000
CHUNK = 256 * 1024
SIZE = (6000, 4000)
SIDE = 200


@functools.cache
def photo() -> bytes:
    """A JPEG of 24 megapixels."""
    grain = Image.effect_noise((SIZE[0] // 2, SIZE[1] // 2), 40).resize(SIZE)
    sky = Image.linear_gradient("L").resize(SIZE)
    out = io.BytesIO()
    Image.merge("RGB", (grain, sky, grain.rotate(180))).save(out, "JPEG", quality=88)
    return out.getvalue()


def source_of(content: bytes) -> DerivationSource:
    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(content), CHUNK):
                yield content[start : start + CHUNK]

        yield chunks()

    return DerivationSource(StoredObjectRef("files", "memory", "x", len(content), ""), opened)


async def variants(meter: Meter, *, engine: str, count: int) -> None:
    """Make thumbnails, as many at a time as there are processes."""
    limit_processes(PROCESSES)
    recipe = ImageVariant(fit=(SIDE, SIDE), format="webp", engine=engine)  # type: ignore[arg-type]
    source = source_of(photo())

    async def one() -> None:
        async with recipe.make(source) as made:
            assert (made.media or {})["width"] == SIDE

    await repeat(one, PROCESSES)
    async with meter.measure(operations=count):
        await repeat(one, count)


async def bare(meter: Meter, *, count: int) -> None:
    """Make them with nothing but Pillow, from files that are on the disk already."""
    with tempfile.TemporaryDirectory(prefix="granite-") as folder:
        path = Path(folder) / "photo.jpg"
        path.write_bytes(photo())
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(PROCESSES, context) as executor:

            async def one() -> None:
                await asyncio.get_running_loop().run_in_executor(executor, shrink, str(path))

            await repeat(one, 2 * PROCESSES)
            async with meter.measure(operations=count):
                await repeat(one, count)


def shrink(path: str) -> bytes:
    with Image.open(path, formats=["JPEG"]) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "WEBP", quality=80)
        return out.getvalue()


async def calls(meter: Meter) -> None:
    """Call a function that does nothing, in a process."""
    limit_processes(PROCESSES)
    recipe = Derived(nothing, content_type="text/plain")
    source = source_of(b"abc")

    async def one() -> None:
        async with recipe.make(source):
            pass

    await repeat(one, PROCESSES)
    async with meter.measure(operations=CALLS):
        await repeat(one, CALLS)


async def executor_calls(meter: Meter) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, context) as executor:

        async def one() -> None:
            await asyncio.get_running_loop().run_in_executor(executor, nothing, b"abc")

        await repeat(one, 2 * PROCESSES)
        async with meter.measure(operations=CALLS):
            await repeat(one, CALLS)


def nothing(_: Any) -> bytes:
    return b""


nothing.__module__ = "tests.benchmarks.bench_derived"


async def repeat(work: Callable[[], Any], count: int) -> None:
    """Do work so many times, twice as often at a time as there are processes."""
    left = iter(range(count))

    async def take() -> None:
        for _ in left:
            await work()

    await asyncio.gather(*(take() for _ in range(2 * PROCESSES)))


def photographs(title: str, engine: str, **bounds: Any) -> Comparison:
    contenders = {engine: Contender(variants, engine=engine, count=PHOTOS), "bare Pillow": Contender(bare, count=PHOTOS)}
    return Comparison(f"derived: {title}", contenders, baseline="bare Pillow", **bounds)


COMPARISONS = [
    photographs("24 MP JPEG to a WebP of 200 pixels", "pillow", reach=0.9, max_memory=8 * MIB, max_stall=0.05),
    photographs("the same with libvips", "vips", max_memory=8 * MIB, max_stall=0.05),
    Comparison(
        "derived: a function that does nothing",
        {"granite": Contender(calls), "ProcessPoolExecutor": Contender(executor_calls)},
        baseline="ProcessPoolExecutor",
        max_beyond=0.002,
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
