"""Runs the command line in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ticket import Ticket

Result = TypeVar("Result")


def lutetia(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`lutetia ARGUMENTS` with this interpreter, away from the caller's own LUTETIA_ variables."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("LUTETIA_")}
    return subprocess.run(
        [sys.executable, "-m", "lutetia.cli", *map(str, arguments)],
        cwd=cwd, timeout=timeout, capture_output=True, text=True, env={**base, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def one_process(
    commands: Sequence[Sequence[str | Path]], *, without: str = "", missing: str = "", **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Each of `commands` as `lutetia` would be, all in one process: for tests of many.

    `without`: capabilities that root lets go of, such as `-dac_override`, so that permissions count for it too.
    `missing`: a package that cannot be imported, as if it were not installed.
    """
    base = {key: value for key, value in os.environ.items() if not key.startswith("LUTETIA_")}
    prefix = ["setpriv", f"--bounding-set={without}", "--"] if without and os.geteuid() == 0 else []
    run = subprocess.run(
        [*prefix, sys.executable, "-c", _EACH, missing, json.dumps([[str(word) for word in command] for command in commands])],
        timeout=240, capture_output=True, text=True, env={**base, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [subprocess.CompletedProcess(*outcome) for outcome in json.loads(run.stdout)]


_EACH = """
import contextlib, io, json, sys

commands, missing = json.loads(sys.argv.pop()), sys.argv.pop()
if missing:
    sys.modules[missing] = None

from lutetia.cli.main import main

outcomes = []
for words in commands:
    sys.argv[1:] = words
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as ended:
            outcomes.append((words, ended.code, out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
"""


def failure(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error document that a command printed under --json."""
    error = json.loads(run.stdout)["error"]
    assert error["code"] == run.returncode
    assert "Traceback" not in run.stderr
    return error


def processor_time(run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and the least processor time in seconds that its child processes took in three attempts.

    Clock time would measure whoever else uses the machine.
    """
    attempts = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        attempts.append((after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, result))
    seconds, result = min(attempts, key=lambda attempt: attempt[0])
    return result, seconds


def ticket(port: int = 9) -> str:
    """A well-formed ticket of a run that nobody serves on `port` of this machine."""
    owner = Identity.derived("command line owner")
    return Ticket(run="c" * 64, owner=owner.public_key, addresses=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{owner.peer_id}",)).encode()
