"""The walls between the rooms: who may import whom, and what may not be imported at all."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "system": set(),
    "protocol": {"system"},
    "models": {"system", "protocol"},
    "node": {"system", "protocol", "models"},
    "coordinator": {"system", "protocol", "models"},
    "simulation": {"system", "protocol", "node", "coordinator"},
    "cli": {"system", "protocol", "models", "node", "coordinator", "simulation"},
}
HEAVY = {"torch", "diffusers", "transformers", "hivemind", "libp2p", "sklearn", "matplotlib", "av"}
BANNED = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
BANNED_CALLS = {("torch", "load"), ("torch", "save")}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
LIGHT_FILES = [
    path
    for path in FILES
    if path.relative_to(ROOT).parts[0] in ("system", "protocol", "cli")
    and not path.stem.startswith(("transport_hivemind", "thin_library"))
]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(tree: ast.AST, package: list[str]) -> Iterator[list[str]]:
    """Every imported module as absolute parts, where `package` is the importing file's package below `lutetia`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")
        elif isinstance(node, ast.ImportFrom):
            base = ["lutetia", *package][: len(package) + 2 - node.level]
            names = [(node.module or "").split(".")] if node.module else [[alias.name] for alias in node.names]
            yield from (base + name for name in names)


def module_level(tree: ast.Module) -> ast.Module:
    """The statements that run at import: functions' bodies and `if TYPE_CHECKING` blocks left out."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...
        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Outer().visit(tree)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room, package = room_of(path), list(path.relative_to(ROOT).parent.parts)
    for parts in imports(ast.parse(path.read_text()), package):
        if parts[0] == "lutetia" and len(parts) > 1:
            assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{room} imports {'.'.join(parts)}"
        assert parts[0] not in BANNED, f"{path} imports {parts[0]}"
        if room == "protocol":
            assert parts[0] != "torch"
            assert parts[0] != "hivemind" or path.stem.startswith("transport_hivemind")


@pytest.mark.parametrize("path", LIGHT_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_heavy_is_imported_with_the_light_rooms(path: Path) -> None:
    package = list(path.relative_to(ROOT).parent.parts)
    heavy = {parts[0] for parts in imports(module_level(ast.parse(path.read_text())), package)} & HEAVY
    assert not heavy


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_safetensors_is_loaded(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in BANNED_CALLS, f"{path}:{node.lineno}"


@pytest.mark.parametrize("module", ["cli.main", "protocol.thin", "node.control", "protocol.services"])
def test_light_modules_leave_the_heavy_ones_alone(module: str, tmp_path: Path) -> None:
    code = f"import sys, json, lutetia.{module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True).stdout)
    assert not set(loaded) & (HEAVY - {"libp2p"})
