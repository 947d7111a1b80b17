"""The owner's tutorial says what to do for every red line that the code can write, and for no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.test_docs import section
from tests.test_walls import ROOT

STALLS, PAGE = ROOT / "coordinator/ledger/stalls.py", ROOT / "coordinator/web/frontend/src/health.tsx"


def template(node: ast.expr) -> str | None:
    """The text of a string or f-string, with … in place of what is put in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def reasons() -> Iterator[str]:
    """Every text that becomes the `why` of a stall."""
    for node in ast.walk(ast.parse(STALLS.read_text())):
        found: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    found += zip(target.elts, node.value.elts, strict=True)
                else:
                    found.append((target, node.value))
        elif isinstance(node, ast.keyword) and node.arg == "why":
            found.append((ast.Name("why"), node.value))
        for target, value in found:
            if isinstance(target, ast.Name) and target.id == "why" and (text := template(value)):
                yield text


def reasons_of_the_page() -> list[str]:
    """Those that only the page finds."""
    red = re.findall(r"level: 'red'.*?why: (?:'([^']*)'|`([^`]*)`)", PAGE.read_text())
    return [re.sub(r"\$\{[^}]*\}", "…", plain or put_in) for plain, put_in in red]


def test_every_red_line_has_its_row_and_every_row_its_line() -> None:
    rows = re.findall(r'^\| "([^"]+)" \|', section("tutorials/owner.md", "What to do for each red line"), re.MULTILINE)
    lines = [*reasons(), *reasons_of_the_page()]
    assert len(lines) > 15
    assert not [line for line in lines if sum(row in line for row in rows) != 1]
    assert not [row for row in rows if not any(row in line for line in lines)]
