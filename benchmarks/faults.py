"""`python -m benchmarks faults [--times N] [--until HH:MM]`: run the real fault suite many times and keep a log.

Each run is a pytest over `tests/faults`, two files at a time, because a fault test mostly waits. It appends a line to
docs/results/faults.md: start, commit, what passed, failed and was skipped, seconds, and the machine's load before and after. So
it may be interrupted at any time (only the current run is lost) and started again. At the end it prints how many runs in a row
have passed on one commit, including earlier starts. The exit code is 1 when a run failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
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


SUITE = (
    *("cli", "coordinator", "models", "node", "protocol", "system"),
    *("pyproject.toml", "setup.py", "constraints.txt", "tests/conftest.py", "tests/child_environment.py", "tests/faults"),
    *(
        "tests/coordinator/tiny_data.py",
        "tests/node/small_disk.py",
        "tests/memory_transport",
        "tests/protocol/networks.py",
        "tests/protocol/example_documents.py",
    ),
)
"""All files that the suite depends on."""


def commit_of(root: Path) -> str:
    """The last commit that changed a file of SUITE, with a + when tracked files of it have changed since; "-" outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments, "--", *SUITE], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("log", "-1", "--format=%h") or "-") + ("+" if changed else "")


def in_a_row(log: str) -> tuple[str, int]:
    """(commit, runs): how many of the newest runs in a row passed on one commit. A commit with a + does not count."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in log.splitlines() if re.match(r"\| \d{4}-", line)]
    commit = rows[-1][1] if rows else "-"
    alike = itertools.takewhile(lambda row: row[1] == commit and row[4] == "0" and not commit.endswith("+"), reversed(rows))
    return commit, sum(1 for _ in alike)


def suite(arguments: Sequence[str], output: Path) -> Outcome:
    """Run the suite once; what pytest prints is appended to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/faults", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LUTETIA_FAULTS": "all"}
        begun, start, load = datetime.now(UTC), time.monotonic(), os.getloadavg()[0]
        with output.open("a") as out:
            subprocess.run([*command, *arguments], cwd=ROOT, stdout=out, stderr=out, env=environment)
        seconds = time.monotonic() - start
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = {case.get("name", "?") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = tuple(sorted(failed)) if cases else ("the suite did not run",)
    passed = len({case.get("name") for case in cases}) - len(failed) - skipped
    return Outcome(begun, passed, names, skipped, seconds, (load, os.getloadavg()[0]))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="how often to run the suite (default: 1)")
    parser.add_argument("--until", help="start no run after this time of day, HH:MM in UTC")
    parser.add_argument("--log", type=Path, default=LOG, help="the log file (default: docs/results/faults.md)")
    parser.add_argument(
        "--output", type=Path, default=Path(tempfile.gettempdir()) / "lutetia-faults.txt", help="where the output of pytest goes"
    )
    options, pytest_arguments = parser.parse_known_args(argv)
    if not options.log.exists():
        options.log.parent.mkdir(parents=True, exist_ok=True)
        options.log.write_text(HEAD)
    bad = 0
    at_once = (
        []
        if any(argument.startswith(("-n", "--numprocesses")) for argument in pytest_arguments)
        else ["--numprocesses", "2", "--dist", "loadfile"]
    )
    for number in range(1, options.times + 1):
        if options.until and datetime.now(UTC).strftime("%H:%M") >= options.until:
            break
        outcome = suite([*at_once, *pytest_arguments], options.output)
        line = outcome.line(commit_of(ROOT))
        with options.log.open("a") as log:
            log.write(line)
        print(f"run {number}: {line}", end="", flush=True)
        bad += bool(outcome.failed)
    commit, passed = in_a_row(options.log.read_text())
    print(f"{passed} runs in a row have passed on commit {commit}")
    sys.exit(1 if bad else 0)
