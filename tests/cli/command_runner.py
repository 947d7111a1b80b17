"""Runs the command line in processes of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.forked import TEMPLATE, ForkRequest, ask_to_fork
from tests.child_environment import clean_environment, template_process

Result = TypeVar("Result")


def lutetia(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`lutetia ARGUMENTS` in a process forked from one that has the imports done (see `lutetia.system.template`)."""
    return _forked(arguments, cwd or Path.cwd(), timeout, environment)


def _forked(
    arguments: Sequence[str | Path], cwd: Path, timeout: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in arguments]
    template_process()
    request = ForkRequest("lutetia.cli", tuple(words), str(cwd), _environment(environment), os.getpid())
    with Path(os.devnull).open() as empty, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with ask_to_fork(os.environ[TEMPLATE], request, (empty.fileno(), out.fileno(), err.fileno())) as connection:
            connection.settimeout(timeout)
            code = connection.makefile().read().split()[1]  # after its process id
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, int(code), out.read(), err.read())


def fresh_lutetia(*arguments: str | Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lutetia ARGUMENTS` by an interpreter of its own, imports included."""
    return subprocess.run(
        [sys.executable, "-m", "lutetia.cli", *map(str, arguments)],
        timeout=timeout, capture_output=True, text=True, env=_environment(environment),
    )  # fmt: skip


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Without the caller's own LUTETIA_ variables; the process ends with this one."""
    return {**clean_environment(), "OMP_NUM_THREADS": "1", "LUTETIA_PARENT": str(os.getpid()), **more}


def each(
    commands: Sequence[Sequence[str | Path]], *, without: str = "", missing: str = "", **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run each of `commands` by `lutetia`; without something, all in one process with an interpreter of its own.

    `without`: capabilities that root drops, such as `-dac_override`, so that permissions apply to it too.
    `missing`: a package that cannot be imported, as if it were not installed.
    """
    if not without and not missing:
        return [_forked(command, Path.cwd(), 240, environment) for command in commands]
    prefix = ["setpriv", f"--bounding-set={without}", "--"] if without and os.geteuid() == 0 else []
    run = subprocess.run(
        [*prefix, sys.executable, "-c", _EACH, missing, json.dumps([[str(word) for word in command] for command in commands])],
        timeout=240, capture_output=True, text=True, env=_environment(environment),
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
for arguments in commands:
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as ended:
            outcomes.append((arguments, ended.code, out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
"""


def failure(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error document that a command printed with --json."""
    error = json.loads(run.stdout)["error"]
    assert error["code"] == run.returncode
    assert "Traceback" not in run.stderr
    return error


def processor_time(run: Callable[[], Result]) -> tuple[Result, float]:
    """The result of `run`, and the least processor time in seconds of its child processes in three attempts.

    Clock time would depend on what else the machine runs.
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
    """A well-formed ticket of a run that is not served, on `port` of this machine."""
    owner = Identity.derived("command line owner")
    return Ticket(run="c" * 64, owner=owner.public_key, addresses=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{owner.peer_id}",)).encode()
