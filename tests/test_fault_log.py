"""The log of the fault suite counts runs of one commit: what it takes for the suite's code is all of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import ROOT, SUITE


def needed(file: Path) -> Iterator[Path]:
    """The files of tests that `file` imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            module = ROOT.joinpath(*(node.module or "").split("."))
            if module.is_dir():
                yield from (module / f"{alias.name}.py" for alias in node.names)
            else:
                yield module.with_suffix(".py")


def test_everything_that_the_fault_tests_import_is_counted() -> None:
    seen, new = set[Path](), set((ROOT / "tests" / "faults").rglob("*.py"))
    while new:
        seen |= new
        new = {other for file in new for other in needed(file)} - seen
    counted = [ROOT / name for name in SUITE]
    assert all(path.exists() for path in counted)
    assert not [file for file in seen if not any(file.is_relative_to(path) for path in counted)]


def test_every_room_that_ships_is_counted() -> None:
    rooms = {folder.name for folder in (ROOT / "typings" / "lutetia").iterdir()}
    assert rooms - set(SUITE) == {"simulation"}, "no swarm of the suite runs the simulation"
