"""docs/explanation/faults.md names tests and scenarios: they exist, and none of the twenty faults is missing."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.faults import in_a_row

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "docs" / "explanation" / "faults.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]


def test_every_fault_is_named() -> None:
    assert {int(row[0]) for row in ROWS} == set(range(1, 21))


def test_every_real_test_that_is_named_exists() -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "\n".join(row[3] for row in ROWS)):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no {name}"


def test_every_real_fault_test_is_named() -> None:
    named = {name for row in ROWS for name in re.findall(r"::(\w+)`", row[3])}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != Path(__file__).name:
            missing = set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)) - named
            assert not missing, f"docs/explanation/faults.md does not name {missing}"


def test_every_scenario_that_is_named_exists() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "simulation" / "scenarios").glob("*.py"))
    for name in {name for row in ROWS for name in re.findall(r"`([\w-]+)`", row[2])}:
        assert f'"{name}"' in written, f"no scenario is called {name}"


def test_runs_in_a_row_are_of_one_commit_and_without_failures() -> None:
    def log(*runs: tuple[str, int]) -> str:
        lines = [f"| 2026-01-01 00:00:00 | {commit} | 2 | 36 | {failed} | 0 | 300 | 1.0 → 1.0 |  |" for commit, failed in runs]
        return "\n".join(["| begun (UTC) | commit |", *lines])

    assert in_a_row(log()) == ("-", 0)
    assert in_a_row(log(("a", 0), ("b", 0), ("b", 1), ("b", 0), ("b", 0))) == ("b", 2)
    assert in_a_row(log(("a", 0), ("b", 1))) == ("b", 0)
    assert in_a_row(log(("b+", 0), ("b+", 0))) == ("b+", 0), "nobody can check out a tree with changes"
