"""The walls between the rooms, and the shape of the tree: who may import whom, how much a folder holds, and what stays pure."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.recorded.wire_documents import wire_documents

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
WITHOUT_WEIGHTS = ("AutoTokenizer", "CLIPImageProcessor", "MixtureTransformer", "LutetiaPipeline")
"""Loaders of files without weights, and our own two, which pass on what a mixture needs."""
BACKENDS = ("protocol/transport/hivemind/", "protocol/light_client/bindings.py")
"""The only places of the light rooms that import a network library; they are imported when it is needed."""
PURE = (
    "node/machine/",
    "coordinator/acceptance/",
    "coordinator/alerts/causes.py",
    "coordinator/credit/accounts.py",
    "coordinator/credit/copies.py",
    "coordinator/credit/fold.py",
    "coordinator/lending/agreement.py",
    "coordinator/lending/loans.py",
    "coordinator/lending/reports.py",
    "coordinator/lending/reserve.py",
    "coordinator/ledger/events.py",
    "coordinator/ledger/reducer.py",
    "coordinator/ledger/audit_reducer.py",
    "coordinator/ledger/run_state.py",
    "protocol/claims.py",
    "protocol/stalled_claims.py",
    "protocol/blobs/scheduler.py",
)
"""Decisions: what they conclude depends on their arguments alone."""
IMPURE = {"asyncio", "time", "os", "random", "socket", "secrets", "subprocess", "threading"}
MOST_FILES = 12
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[list[str]]:
    """Every imported module as parts. All imports of the source tree are absolute (`test_imports_are_absolute`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")


def module_level(tree: ast.Module) -> Iterator[list[str]]:
    """The imports that run when the module is imported: bodies of functions and `if TYPE_CHECKING` blocks left out."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        waiting += ast.iter_child_nodes(node)


def imported_files(path: Path) -> set[Path]:
    """The files of the source tree that `path` imports, type-checking imports and imports within functions counted."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lutetia."):
            base = ROOT.joinpath(*(node.module or "").split(".")[1:])
            for file in (base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)):
                if file.is_file():
                    found.add(file)
    return found


def circles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan 1972)."""
    order: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[str]] = []

    def visit(file: Path) -> None:
        order[file] = low[file] = len(order)
        stack.append(file)
        for other in graph[file]:
            if other not in order:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], order[other])
        if low[file] == order[file]:
            cut = stack.index(file)
            component, stack[cut:] = stack[cut:], []
            if len(component) > 1:
                found.append(sorted(map(name_of, component)))

    for file in graph:
        if file not in order:
            visit(file)
    return found


def test_rooms_import_only_rooms_below() -> None:
    wrong = []
    for path in FILES:
        room = name_of(path).split("/")[0]
        for parts in imports(tree_of(path)):
            if parts[0] == "lutetia" and len(parts) > 1 and parts[1] != room and parts[1] not in MAY_IMPORT[room]:
                wrong.append(f"{name_of(path)} imports {'.'.join(parts)}")
            if parts[0] in BANNED:
                wrong.append(f"{name_of(path)} imports {parts[0]}, which can run code when it loads")
            if room == "protocol" and (
                parts[0] == "torch" or (parts[0] == "hivemind" and not name_of(path).startswith(BACKENDS))
            ):
                wrong.append(f"{name_of(path)} imports {parts[0]}")
    assert not wrong


def test_imports_are_absolute() -> None:
    relative = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_light_rooms_import_nothing_heavy_when_imported() -> None:
    wrong = [
        f"{name_of(path)} imports {parts[0]}"
        for path in FILES
        if name_of(path).startswith(("system/", "protocol/", "cli/")) and not name_of(path).startswith(BACKENDS)
        for parts in module_level(tree_of(path))
        if parts[0] in HEAVY
    ]
    assert not wrong


def test_tensors_are_read_and_written_as_safetensors_only() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in BANNED_CALLS
    ]
    assert not wrong


def test_every_loader_reads_safetensors_and_says_where_from() -> None:
    """`from_pretrained` falls back to pickle without `use_safetensors`, and to the hub without `local_files_only`."""
    wrong = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "from_pretrained":
                continue
            loader = ast.unparse(node.func.value)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = options.get("use_safetensors") == "True" or loader in WITHOUT_WEIGHTS
            placed = options.get("local_files_only") == "True" or options.get(None, "").endswith(".options")
            placed |= loader in ("MixtureTransformer", "LutetiaPipeline")
            trusting = loader.startswith("Auto") and options.get("trust_remote_code") != "False"
            if not safe or not placed or trusting:
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong


def test_media_are_opened_for_reading_in_one_place() -> None:
    """FFmpeg reads names as addresses: `open_media` is the only way in."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("av.open", "av.container.open")
        and not (len(node.args) > 1 and ast.unparse(node.args[1]) == "'w'")
    ]
    assert [place.split(":")[0] for place in found] == ["models/data/decode/media.py"], found


def test_no_folder_holds_more_than_twelve_files() -> None:
    held: dict[str, list[str]] = defaultdict(list)
    for top in (*MAY_IMPORT, "tests", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            if path.stem not in ("__init__", "__main__", "conftest"):
                held[name_of(path.parent)].append(path.name)
    assert not {folder: len(names) for folder, names in held.items() if len(names) > MOST_FILES}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circles({path: imported_files(path) & set(FILES) for path in FILES})


def test_decisions_are_pure() -> None:
    """No clock, socket, file, thread or randomness of their own; imports inside functions counted."""
    pure = [path for path in FILES if name_of(path).startswith(PURE)]
    assert all(any(name_of(path).startswith(place) for path in pure) for place in PURE), "a place has moved"
    assert not [f"{name_of(path)} imports {parts[0]}" for path in pure for parts in imports(tree_of(path)) if parts[0] in IMPURE]


def test_no_public_class_name_means_two_things() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name_of(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def unbounded(schema: dict[str, Any], place: str) -> Iterator[str]:
    """The places within a JSON schema whose numbers, texts, lists or tables have no limit, definitions left out."""
    kind = schema.get("type")
    if kind in ("integer", "number") and not {"enum", "const"} & schema.keys():
        low, high = {"minimum", "exclusiveMinimum"} & schema.keys(), {"maximum", "exclusiveMaximum"} & schema.keys()
        if not (low and high):
            yield place
    if kind == "string" and not {"maxLength", "enum", "const"} & schema.keys() and endless(schema.get("pattern")):
        yield place
    limit = {"array": "maxItems", "object": "maxProperties"}.get(kind or "")
    if limit and limit not in schema and "properties" not in schema:
        yield place
    for name in ("anyOf", "oneOf", "prefixItems"):
        for each in schema.get(name, ()):
            yield from unbounded(each, place)
    for name in ("items", "propertyNames"):
        if isinstance(schema.get(name), dict):
            yield from unbounded(schema[name], f"{place}[]")
    for name, each in schema.get("properties", {}).items():
        yield from unbounded(each, f"{place}.{name}")


def endless(pattern: str | None) -> bool:
    """Whether a regular expression allows texts of any length."""
    return pattern is None or bool(re.search(r"[^\\\[][*+]|\{\d+,\}", pattern)) or not pattern.endswith("$")


def test_everything_that_crosses_the_wire_has_bounds() -> None:
    found: set[str] = set()
    for document in wire_documents():
        schema = document.model_json_schema(by_alias=False)
        for name, part in {document.__name__: schema, **schema.get("$defs", {})}.items():
            found.update(unbounded(part, name))
    assert not sorted(found)


def test_a_field_that_a_release_lacks_is_optional_and_not_written_unless_used() -> None:
    """Declare a new field with `fields.added`: else older peers refuse what carries it, and older documents' signatures break."""
    wrong = set()
    for fields in (ROOT / "tests/protocol/recorded").glob("*/fields.json"):
        recorded = json.loads(fields.read_text())
        for kind in wire_documents():
            for name, field in kind.model_fields.items():
                new = kind.__name__ in recorded and name not in recorded[kind.__name__]
                hashed = not kind.__module__.endswith((".status", ".events"))
                if new and (field.is_required() or (hashed and field.exclude_if is None)):
                    wrong.add(f"{kind.__name__}.{name}")
    assert not wrong


@pytest.mark.parametrize("module", ["cli.main", "protocol.light_client.documents", "node.control", "protocol.joining"])
def test_light_modules_load_no_heavy_library(module: str, tmp_path: Path) -> None:
    code = f"import sys, json, lutetia.{module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True).stdout)
    assert not set(loaded) & (HEAVY - {"libp2p"})
