"""What README promises for Windows: `swarm status`, `swarm fetch`, `run why` and `generate` need nothing that Windows lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.child_environment import child_environment
from tests.cli.command_runner import ticket
from tests.test_walls import ROOT, imported_files, module_level, name_of, tree_of

WITHOUT_UNIX = """
import builtins, json, os, select, signal, sys

ABSENT = {"fcntl", "grp", "pwd", "resource", "termios", "hivemind", "uvloop"}

load = builtins.__import__

def without(name, globals=None, *more, **named):  # other packages look at the system before they import
    if name.partition(".")[0] in ABSENT and (globals or {}).get("__name__", "").startswith("lutetia"):
        raise ImportError(f"{name} is not there on Windows")
    return load(name, globals, *more, **named)

builtins.__import__ = without
for module, names in ((os, ("O_DIRECTORY", "O_NOFOLLOW", "sched_getaffinity")), (signal, ("SIGHUP",)), (select, ("poll",))):
    for name in names:
        delattr(module, name)

from lutetia.cli.main import main

codes = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["lutetia", *command]
    try:
        main()
    except SystemExit as exit:
        codes.append(exit.code)
from lutetia.cli.workspace import workspace
from pathlib import Path
with workspace(Path("result")) as work:
    (work / "file").write_text("x")
from lutetia.system.files import replace_folder, write_atomic
write_atomic(Path("made/file"), b"x")
print(json.dumps(codes))
"""


def test_commands_for_windows_run_without_unix(tmp_path: Path) -> None:
    commands = [
        ["swarm", "status", ticket(), "--timeout", "0.5"],
        ["swarm", "fetch", ticket(), "--timeout", "0.5", "--out", "mixture"],
        ["run", "why", f"lutetia join {ticket()}", "0", "--timeout", "0.5"],
        ["swarm", "fetch", ticket(), "--checkpoints", "--timeout", "0.5", "--out", "checkpoints"],
    ]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**child_environment(), "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [30, 30, 30, 30], run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_generate_imports_nothing_that_windows_lacks() -> None:
    """Read and not run, because running it imports torch."""
    waiting, seen, wrong = [ROOT / "cli/commands/generate.py"], set(), []
    while waiting:
        path = waiting.pop()
        seen.add(path)
        wrong += [f"{name_of(path)}: {parts[0]}" for parts in module_level(tree_of(path)) if parts[0] in UNIX]
        waiting += imported_files(path) - seen
    assert ROOT / "models/pipeline.py" in seen
    assert not wrong


UNIX = {"fcntl", "grp", "pwd", "resource", "termios", "hivemind", "uvloop"}
