"""A swarm of real processes on this machine: each is a `lutetia` command with its own folder and log, and dies with us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.system.errors import LutetiaError, UnreachableError

STOP_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@dataclass
class LocalProcess:
    """One process of the swarm."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    killed: bool = False

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def kill(self) -> None:
        """SIGKILL the process alone, as a crash or a pulled plug would: what becomes of its children is its own affair."""
        self.killed = True
        self.process.kill()

    def last_words(self, lines: int = 4) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(text[-lines:])


@dataclass
class LocalSwarm:
    """Starts, watches and ends the processes of one swarm; leave it by `async with` and none is left."""

    logs: Path
    members: dict[str, LocalProcess] = field(default_factory=dict)

    async def __aenter__(self) -> LocalSwarm:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.stop(*self.members))

    async def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> LocalProcess:
        """Run `lutetia ARGUMENTS` as process `name`; its output goes to `logs/name.log`."""
        log = self.logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lutetia.cli", *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "NO_COLOR": "1", **(environment or {}), "LUTETIA_PARENT": str(os.getpid())},
            )  # fmt: skip
        self.members[name] = member = LocalProcess(name, process, log)
        return member

    def check(self) -> None:
        """Raises when a process that nobody killed has ended in failure."""
        for member in self.members.values():
            code = member.process.returncode
            if code and not member.killed:
                problem = UnreachableError if code == UnreachableError.code else LutetiaError
                words = member.last_words() or "it said nothing"
                raise problem(f"{member.name} ended with exit code {code}: {words}")

    async def stop(self, *names: str) -> None:
        """SIGTERM them together, SIGKILL the group of whoever is still there after the grace."""
        members = [self.members[name] for name in names]
        for member in members:
            if member.running:
                member.killed = True
                with contextlib.suppress(ProcessLookupError):
                    member.process.terminate()
        await asyncio.gather(*(self._end(member) for member in members))

    async def _end(self, member: LocalProcess) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE):
                await member.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(member.process.pid, signal.SIGKILL)  # also what a killed member may have left behind
        await member.process.wait()
