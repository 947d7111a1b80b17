"""The rows that a benchmark returns, the machine it ran on, and the table of both."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure: the median of `runs` repetitions and its range; `budget` is the limit that it should keep."""

    what: str
    value: float
    unit: str
    low: float
    high: float
    runs: int
    budget: str = ""
    detail: str = ""

    @classmethod
    def of(cls, what: str, values: Sequence[float], unit: str, budget: str = "", detail: str = "") -> Row:
        return cls(what, statistics.median(values), unit, min(values), max(values), len(values), budget, detail)


Benchmark = Callable[[], list[Row]]


@dataclass(frozen=True)
class Machine:
    """The machine that measured the figures."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str = field(default_factory=platform.python_version)
    lutetia: str = field(default_factory=lambda: version("lutetia"))

    @classmethod
    def this(cls) -> Machine:
        import psutil

        return cls(
            _processor(), os.cpu_count() or 1, round(psutil.virtual_memory().total / 2**30, 1), platform.platform(terse=True)
        )

    def __str__(self) -> str:
        hardware = f"{self.processor}, {self.cores} cores, {self.memory_gib} GiB"
        return f"{hardware}, {self.system}, Python {self.python}, lutetia {self.lutetia}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def markdown(name: str, rows: Sequence[Row]) -> str:
    """A table for docs/benchmarks.md."""
    lines = [f"### {name}", "", "| what | median | range | runs | budget | detail |", "|---|---|---|---|---|---|"]
    for row in rows:
        figure, spread = f"{row.value:.3g} {row.unit}".strip(), f"{row.low:.3g} to {row.high:.3g}"
        lines.append(f"| {row.what} | {figure} | {spread} | {row.runs} | {row.budget} | {row.detail} |")
    return "\n".join([*lines, ""])


def as_json(results: dict[str, list[Row]]) -> dict[str, Any]:
    return {"machine": asdict(Machine.this()), "results": {name: [asdict(row) for row in rows] for name, rows in results.items()}}
