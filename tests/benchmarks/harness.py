"""Measures contenders side by side: rate, peak memory growth and the worst stall of the event loop.

Each contender runs in a fresh process, so that none inherits another's heap, threads or caches, and the contenders of one
comparison take turns, so that a noisy machine is noisy for all of them. What counts is the ratio within one run. A contender is
an async function at the top level of its module, whose first argument is a `Meter`:

    async def hash_alone(meter: Meter, *, chunk_size: int) -> None:
        chunk = bytes(chunk_size)
        async with meter.measure(size=GIB):
            ...

    COMPARISONS = [
        Comparison(
            "1 GiB, 64 KiB chunks",
            {"granite": Contender(granite_stream, chunk_size=65536), "sha256 alone": Contender(hash_alone, chunk_size=65536)},
            baseline="sha256 alone",
            reach=0.85,
        )
    ]

    if __name__ == "__main__":
        main(COMPARISONS)

`python -m tests.benchmarks.<module>` prints a table, and below it the median and the spread of the ratios of the rounds with what
the contenders report besides; `--json FILE` keeps the numbers, `--rounds N` repeats, `--only TEXT`
chooses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
TICK = 0.002


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run of one contender took.

    Attributes:
        seconds: The time of the measured part.
        size: The bytes it moved, 0 where operations count.
        operations: How many operations it made.
        memory: How far the resident memory rose above where it was at the start, in bytes.
        stall: The longest that the event loop did not come round, in seconds.
        notes: What the contender reported besides.
    """

    seconds: float
    size: int
    operations: int
    memory: int
    stall: float
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes per second, or operations per second where no bytes are counted."""
        return (self.size or self.operations) / self.seconds


class Meter:
    """Handed to a contender, which prepares at leisure and then measures once."""

    def __init__(self) -> None:
        self.measurement: Measurement | None = None
        self.notes: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def measure(self, *, size: int = 0, operations: int = 1, ticking: bool = True) -> AsyncIterator[None]:
        """Measure what happens inside.

        Args:
            size: The bytes that it moves; give none where operations are to be counted.
            operations: How many operations it makes.
            ticking: Whether the loop's stalls are watched; of no use where the work itself is on the loop.
        """
        ticker = _Ticker()
        watch = asyncio.create_task(ticker.run()) if ticking else None
        await asyncio.sleep(5 * TICK)
        ticker.worst = 0.0
        before = _reset_peak_memory()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        memory = _peak_memory() - before
        if watch is not None:
            await asyncio.sleep(0)
            watch.cancel()
        self.measurement = Measurement(seconds, size, operations, max(memory, 0), ticker.worst, self.notes)

    def note(self, name: str, value: float) -> None:
        """Report one more number beside the measurement."""
        self.notes[name] = value


class _Ticker:
    """A task that asks to be called every two milliseconds, and remembers by how much it was called too late."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            self.worst = max(self.worst, now - before - TICK)
            before = now


@dataclass(frozen=True)
class Contender:
    """A function to measure and its arguments, which must survive JSON."""

    function: Callable[..., Awaitable[None]]
    arguments: Mapping[str, Any]

    def __init__(self, function: Callable[..., Awaitable[None]], **arguments: Any) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "arguments", arguments)

    def run(self) -> Measurement:
        """Measure in a fresh process."""
        module = self.function.__module__
        if module == "__main__":
            module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]  # it runs with -m
        command = [sys.executable, "-m", __name__, module, self.function.__name__, json.dumps(dict(self.arguments))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return Measurement(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Contenders on the same task.

    Attributes:
        title: The task.
        contenders: By name; the first is ours.
        baseline: The name of the one that ratios are taken against.
        reach: The least ratio of our rate to the baseline's, None where rates are not compared.
        max_memory: The most memory growth that we want, in bytes.
        max_stall: The longest stall that we want, in seconds.
        max_beyond: The most time that one operation may take beyond the baseline's, in seconds.
        rounds: How often each contender runs.
    """

    title: str
    contenders: Mapping[str, Contender]
    baseline: str
    reach: float | None = None
    max_memory: int | None = None
    max_stall: float | None = None
    max_beyond: float | None = None
    rounds: int = 3

    def run(self, rounds: int | None = None) -> dict[str, list[Measurement]]:
        """Run every contender in turn, `rounds` times."""
        results: dict[str, list[Measurement]] = {name: [] for name in self.contenders}
        for number in range(rounds or self.rounds):
            for name, contender in self.contenders.items():
                _progress(f"{self.title}: {name}, round {number + 1}")
                results[name].append(contender.run())
        return results


def main(comparisons: Sequence[Comparison]) -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description="Measure contenders side by side, each in a fresh process.")
    parser.add_argument("--rounds", type=int, help="how often each contender runs")
    parser.add_argument("--only", default="", help="run the comparisons whose title contains this")
    parser.add_argument("--json", type=Path, help="add the numbers to this file")
    options = parser.parse_args()
    chosen = [comparison for comparison in comparisons if options.only in comparison.title]
    results = [(comparison, comparison.run(options.rounds)) for comparison in chosen]
    _progress("")
    print(table(results))
    print(details(results))
    if options.json:
        _keep(options.json, results)


def table(results: Sequence[tuple[Comparison, Mapping[str, Sequence[Measurement]]]]) -> str:
    """Return the results as a Markdown table.

    Rates are the best of the rounds, memory growth the most of them, and a stall is the middle one of the rounds' worst.
    """
    rows = [("task", "contender", "rate", "ratio", "memory", "stall", "wanted", "reached")]
    for comparison, measured in results:
        base = _best(measured[comparison.baseline])
        for name, runs in measured.items():
            ours = name == next(iter(measured))
            verdict = _verdict(comparison, base, runs) if ours else ("", "")
            cells = (_rate(runs), f"{_best(runs) / base:.2f}", f"{_memory(runs) / MIB:.1f} MiB", f"{_stall(runs) * 1000:.1f} ms")
            rows.append((comparison.title if ours else "", name, *cells, *verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def details(results: Sequence[tuple[Comparison, Mapping[str, Sequence[Measurement]]]]) -> str:
    """Return how the ratios of the rounds spread, and what the contenders have reported besides, as lines of text."""
    lines = []
    for comparison, measured in results:
        for name, runs in measured.items():
            parts = [f"{note} {statistics.median(run.notes[note] for run in runs):.4g}" for note in runs[0].notes]
            if name != comparison.baseline:
                ratios = [run.rate / base.rate for run, base in zip(runs, measured[comparison.baseline], strict=True)]
                parts.insert(0, f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            if parts:
                lines.append(f"{comparison.title}, {name}: {', '.join(parts)}")
    return "\n".join(lines)


def _verdict(comparison: Comparison, base: float, runs: Sequence[Measurement]) -> tuple[str, str]:
    wanted, reached = [], []
    if comparison.reach is not None:
        wanted.append(f"ratio {comparison.reach:g}")
        reached.append(_best(runs) / base >= comparison.reach)
    if comparison.max_beyond is not None:
        beyond = 1 / _best(runs) - 1 / base
        wanted.append(f"{comparison.max_beyond * 1000:g} ms beyond")
        reached.append(beyond <= comparison.max_beyond)
    if comparison.max_memory is not None:
        wanted.append(f"{comparison.max_memory // MIB} MiB")
        reached.append(_memory(runs) <= comparison.max_memory)
    if comparison.max_stall is not None:
        wanted.append(f"{comparison.max_stall * 1000:g} ms")
        reached.append(_stall(runs) <= comparison.max_stall)
    return ", ".join(wanted), ", ".join("yes" if one else "NO" for one in reached)


def _best(runs: Sequence[Measurement]) -> float:
    return max(one.rate for one in runs)


def _rate(runs: Sequence[Measurement]) -> str:
    return f"{_best(runs) / MIB:,.0f} MiB/s" if runs[0].size else f"{_best(runs):,.1f} /s"


def _memory(runs: Sequence[Measurement]) -> int:
    return max(one.memory for one in runs)


def _stall(runs: Sequence[Measurement]) -> float:
    return statistics.median(one.stall for one in runs)


def _keep(path: Path, results: Sequence[tuple[Comparison, Mapping[str, Sequence[Measurement]]]]) -> None:
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept["machine"] = {"python": platform.python_version(), "system": platform.platform()}
    for comparison, measured in results:
        kept[comparison.title] = {name: [asdict(one) for one in runs] for name, runs in measured.items()}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _reset_peak_memory() -> int:
    """Return the resident memory of this process, and reset its peak where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    """Return the largest resident memory of this process since the last reset."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _run_contender(module: str, name: str, arguments: str) -> None:
    function = getattr(importlib.import_module(module), name)
    meter = Meter()
    asyncio.run(function(meter, **json.loads(arguments)))
    if meter.measurement is None:
        raise SystemExit(f"{name} measured nothing")
    print(json.dumps(asdict(meter.measurement)))


if __name__ == "__main__":
    _run_contender(*sys.argv[1:])
