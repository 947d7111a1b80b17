"""A swarm of real processes on this machine: each is a `lutetia` command with its own log, and dies with this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.system.errors import LutetiaError, UnreachableError
from lutetia.system.forked import TEMPLATE, start_template

STOP_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
COORDINATOR = "coordinator"
_IMPORTS = ("diffusers.models.transformers", "lutetia.node.trainer.loop", "lutetia.coordinator.worker.process")
"""What the trainers and workers of a swarm import. On Linux they are forked from one process that has done it."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free at the moment."""
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
        """SIGKILL the process but not its children, as a crash would."""
        self.killed = True
        self.process.kill()

    def log_tail(self, lines: int = 4) -> str:
        """The last `lines` of its log, on one line."""
        text = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(text[-lines:])


@dataclass
class LocalSwarm:
    """Starts, watches and ends the processes of one swarm. As an `async with` block it leaves no process behind."""

    logs: Path
    members: dict[str, LocalProcess] = field(default_factory=dict)
    _template: tuple[str, subprocess.Popen[bytes]] | None = None

    async def __aenter__(self) -> LocalSwarm:
        self.logs.mkdir(parents=True, exist_ok=True)
        if sys.platform.startswith("linux") and not os.environ.get(TEMPLATE):
            self._template = start_template(*_IMPORTS)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.stop(*self.members))
        if self._template:
            self._template[1].kill()
            self._template[1].wait()

    async def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> LocalProcess:
        """Run `lutetia ARGUMENTS` as process `name`; its output goes to `logs/name.log`."""
        log = self.logs / f"{name}.log"
        template = {TEMPLATE: self._template[0]} if self._template else {}
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lutetia.cli", *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, **template, "NO_COLOR": "1", **(environment or {}), "LUTETIA_PARENT": str(os.getpid())},
            )  # fmt: skip
        self.members[name] = member = LocalProcess(name, process, log)
        return member

    async def serve(self, run: Path, *options: str) -> LocalProcess:
        """Start the coordinator of the run in folder `run`."""
        return await self.start(COORDINATOR, ["coordinator", "serve", str(run), *options])

    async def join(self, name: str, ticket: str, state_folder: Path, *options: str, **environment: str) -> LocalProcess:
        """Start a node called `name` on loopback; SIGTERM ends it without waiting for its current checkpoint."""
        arguments = ["join", ticket, "--state-folder", str(state_folder), "--listen", "/ip4/127.0.0.1/tcp/0", *options]
        return await self.start(name, arguments, {"LUTETIA_STOP_WITHIN": "0", **environment})

    def check(self) -> None:
        """Raise LutetiaError when a process has failed that was not killed by `kill` or `stop`."""
        for member in self.members.values():
            code = member.process.returncode
            if code and not member.killed:
                problem = UnreachableError if code == UnreachableError.code else LutetiaError
                raise problem(f"{member.name} ended with exit code {code}: {member.log_tail() or 'its log is empty'}")

    async def stop(self, *names: str) -> None:
        """SIGTERM the named processes together, then SIGKILL the groups of those that still run after STOP_GRACE."""
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
            os.killpg(member.process.pid, signal.SIGKILL)  # also the children that a killed process left behind
        await member.process.wait()
