"""Processes of a swarm under test, and what they may not leave behind (invariant I5)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.child_environment import clean_environment, forked_for, template_process

PATIENCE = 300.0
"""Seconds for anything that should take seconds: the machine may be busy with ten other things."""
POLL = 0.08


async def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true answer of `condition` (which may be async). Fails saying `what` was waited for."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        await asyncio.sleep(POLL)


@dataclass
class Member:
    """One `lutetia` command; its output goes to `log`, its temporary files to `temporary`."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    temporary: Path

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def words(self, start: int = 0) -> str:
        """Its log from byte `start` on."""
        return self.log.read_bytes()[start:].decode(errors="replace")

    def mark(self) -> int:
        """Where the log ends now."""
        return self.log.stat().st_size if self.log.exists() else 0

    def family(self) -> list[psutil.Process]:
        """The process, all its descendants and those forked for it, the process itself first."""
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True), *forked_for(own.pid)]
        except psutil.NoSuchProcess:
            return []

    def child(self, word: str) -> psutil.Process:
        """The one living descendant called `word`, or whose command line has it."""
        found = [one for one in self.family()[1:] if lives(one) and (word in one.name() or word in " ".join(command_line(one)))]
        assert len(found) == 1, f"{self.name} has {len(found)} children of {word}: {found}"
        return found[0]

    def signal_all(self, number: signal.Signals) -> list[psutil.Process]:
        """Signal the whole family at once: what a pulled plug, or a laptop's lid, does."""
        family = self.family()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        return family

    async def end(self, number: signal.Signals, seconds: float = PATIENCE) -> int:
        """Signal the process alone; its exit code, once all of its family are gone and nothing of it is left."""
        family = self.family()
        sockets = unix_sockets(family)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        async with asyncio.timeout(seconds):
            code = await self.process.wait()
        await gone(family)
        assert not (left := outside(sockets, self.log.parent)), f"{self.name} left sockets: {left}"
        return code


M = TypeVar("M", bound=Member)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def unix_sockets(family: Sequence[psutil.Process]) -> set[str]:
    """Paths of the Unix sockets that these processes have bound."""
    paths: set[str] = set()
    for process in family:
        with contextlib.suppress(psutil.Error):
            paths |= {str(link.laddr) for link in process.net_connections("unix") if str(link.laddr).startswith("/")}
    return paths


def outside(paths: set[str], folder: Path) -> set[str]:
    """Those of `paths` that exist and do not lie below `folder` (where the next start sweeps what a killed process leaves)."""
    return {path for path in paths if os.path.exists(path) and not path.startswith(str(folder))}


async def gone(family: Sequence[psutil.Process], seconds: float = PATIENCE) -> None:
    """Until none of these processes lives."""
    await until(lambda: not any(lives(one) for one in family), f"{[one.pid for one in family]} to be gone", seconds)


async def start(
    kind: type[M],
    name: str,
    folder: Path,
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    program: Sequence[str | Path] = ("-m", "lutetia.cli"),
    **more: Any,
) -> M:
    """`lutetia ARGUMENTS` with its log and temporary files in `folder`; `more` are the fields of `kind`. It dies with us."""
    temporary = folder / "tmp" / name
    temporary.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *prefix, sys.executable, *map(str, program), *map(str, arguments),
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={
                **clean_environment(), "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary),
                **(environment or {}), "LUTETIA_PARENT": str(os.getpid()),
            },
        )  # fmt: skip
    return kind(name, process, log, temporary, **more)


@dataclass(frozen=True)
class Said:
    """What a command that ended printed."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Its last line on stderr, which must be one sentence for people."""
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("lutetia: "), self.err
        assert "Traceback" not in self.err
        return last


async def say(*arguments: str | Path, prefix: Sequence[str] = (), seconds: float = PATIENCE) -> Said:
    """Run `lutetia ARGUMENTS` to its end."""
    process = await asyncio.create_subprocess_exec(
        *prefix, sys.executable, "-m", "lutetia.cli", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, 
        env={**clean_environment(), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "LUTETIA_PARENT": str(os.getpid())},
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return Said(process.returncode or 0, out.decode(), err.decode())


_HALF = re.compile(r"\.part$|^incoming-|\.sock$|^p2pd$|-journal$")


def litter(folder: Path) -> list[Path]:
    """What a process that ended in order should have taken along: half-written files and sockets."""
    return [path for path in folder.rglob("*") if _HALF.search(path.name)]


def relatives(folder: Path) -> list[str]:
    """Living processes that have anything to do with `folder`: by command line, environment or working directory.

    A forked process counts with the one it was forked for, or if that has ended.
    """
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values(), process.cwd()]
            if process.pid != os.getpid() and lives(process) and any(str(folder) in word for word in words):
                found[process.pid] = " ".join(process.cmdline())[:160]
    for process in template_process().children():
        with contextlib.suppress(psutil.Error):
            parent = int(process.name().rpartition(" ")[2])
            if lives(process) and (parent in found or not psutil.pid_exists(parent)):
                found[process.pid] = process.name()
    return [f"{pid} {text}" for pid, text in found.items()]
