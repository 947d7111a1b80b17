"""`python -m benchmarks faults [--times N] [--until HH:MM]`: run the real fault suite again and again, and keep the log.

Each run is a pytest of its own over `tests/faults`. A line per run is appended to docs/results/faults.md: when, which commit,
what passed, failed and was skipped, how long it took, the machine's load before and after. The exit code is 1 when any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs" / "results" / "faults.md"
HEAD = """# Runs of the real fault suite

Each line is one run of `tests/faults` (`make faults ARGS="--times N"`), written by the runner itself, failures included. *load*
is the machine's load average of one minute before and after.

| begun (UTC) | commit | cores | passed | failed | skipped | seconds | load | failed tests |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    begun: datetime
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float
    load: tuple[float, float]

    def line(self, commit: str) -> str:
        names = ", ".join(f"`{name}`" for name in self.failed)
        counts = f"{self.passed} | {len(self.failed)} | {self.skipped} | {self.seconds:.0f}"
        load = f"{self.load[0]:.1f} → {self.load[1]:.1f}"
        return f"| {self.begun:%Y-%m-%d %H:%M:%S} | {commit} | {os.cpu_count()} | {counts} | {load} | {names} |\n"


def commit_of(root: Path) -> str:
    """The commit that is checked out, with a + when the tracked files differ from it; "-" outside a git checkout."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=root, capture_output=True, text=True)
    return asked.stdout.strip() or "-"


def suite(arguments: Sequence[str], words: Path) -> Outcome:
    """Run the suite once; what pytest prints goes to `words`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/faults", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LUTETIA_FAULTS": "all"}
        begun, start, load = datetime.now(UTC), time.monotonic(), os.getloadavg()[0]
        with words.open("a") as out:
            subprocess.run([*command, *arguments], cwd=ROOT, stdout=out, stderr=out, env=environment)
        seconds = time.monotonic() - start
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = {case.get("name", "?") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = tuple(sorted(failed)) if cases else ("the suite did not run",)
    passed = len({case.get("name") for case in cases}) - len(failed) - skipped
    return Outcome(begun, passed, names, skipped, seconds, (load, os.getloadavg()[0]))


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="how often to run the suite (default: 1)")
    parser.add_argument("--until", help="begin no run after this time of day, HH:MM in UTC")
    parser.add_argument("--log", type=Path, default=LOG, help="where the lines go")
    parser.add_argument(
        "--output", type=Path, default=Path(tempfile.gettempdir()) / "lutetia-faults.txt", help="pytest's own words"
    )
    options, rest = parser.parse_known_args(words)
    if not options.log.exists():
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text(HEAD)
    bad = 0
    for number in range(1, options.times + 1):
        if options.until and datetime.now(UTC).strftime("%H:%M") >= options.until:
            break
        outcome = suite(rest, options.output)
        line = outcome.line(commit_of(ROOT))
        with options.log.open("a") as log:
            log.write(line)
        print(f"run {number}: {line}", end="", flush=True)
        bad += bool(outcome.failed)
    sys.exit(1 if bad else 0)
