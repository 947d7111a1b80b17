"""No test may fail because the machine was busy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def property_tests() -> Iterator[tuple[str, str]]:
    """("tests/room/test_it.py::test_name", its decorators as they are written)."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                written = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                if "given(" in written:
                    yield f"{path.relative_to(TESTS.parent)}::{node.name}", written


def test_hypothesis_deadline_of_200_ms_is_off_everywhere() -> None:
    found = dict(property_tests())
    assert len(found) > 40
    assert [name for name, written in found.items() if not ("deadline=None" in written or "FEW" in written)] == []
