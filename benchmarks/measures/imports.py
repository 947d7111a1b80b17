"""Start-up times of the commands that people type most, as whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.report import Row

RUNS = 7


def _seconds(*arguments: str) -> list[float]:
    """Wall seconds of `python arguments`, one warm-up left out, run from an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        times = []
        for _ in range(RUNS + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=empty, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return times[1:]


def run() -> list[Row]:
    bare = _seconds("-c", "pass")
    rows = [Row.of("python -c pass", bare, "s")]
    for what, arguments, budget in (
        ("import typer", ["-c", "import typer"], ""),
        ("lutetia --help", ["-m", "lutetia.cli", "--help"], "≤ 0.3 s"),
        (
            "import lutetia.protocol.light_client.documents (py-libp2p client)",
            ["-c", "import lutetia.protocol.light_client.documents"],
            "",
        ),
        ("import hivemind (what the light client avoids)", ["-c", "import hivemind"], ""),
        ("import torch (what the light client avoids)", ["-c", "import torch"], ""),
    ):
        times = _seconds(*arguments)
        over = statistics.median(times) - statistics.median(bare)
        rows.append(Row.of(what, times, "s", budget, f"{over:.2f} s over a bare interpreter"))
    return rows
