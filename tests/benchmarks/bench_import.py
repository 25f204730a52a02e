"""What `import granite_storage` adds to the start of Python."""

from __future__ import annotations

import subprocess
import sys

from tests.benchmarks.harness import Comparison, Contender, Meter, main

STARTS = 20


async def start_python(meter: Meter, *, program: str) -> None:
    """Start fresh interpreters, one after the other."""
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True)  # compiles what is not compiled yet
    async with meter.measure(operations=STARTS, ticking=False):
        for _ in range(STARTS):
            subprocess.run(command, check=True)


COMPARISONS = [
    Comparison(
        "import: the package",
        {
            "granite": Contender(start_python, program="import granite_storage"),
            "python alone": Contender(start_python, program="pass"),
        },
        baseline="python alone",
        max_beyond=0.060,
    ),
    Comparison(
        "import: the manager and a local backend",
        {
            "granite": Contender(
                start_python,
                program="import granite_storage.backends.local; from granite_storage import StorageManager, StoragePolicy",
            ),
            "asyncio, hashlib, aiofiles": Contender(start_python, program="import asyncio, hashlib, aiofiles"),
        },
        baseline="asyncio, hashlib, aiofiles",
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
