"""Children that die with their parent, and talk to it in JSON lines over stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
MAX_LINE = 1 << 20

Message = dict[str, Any]


def die_with_parent(parent: int) -> None:
    """Ask Linux to SIGKILL this process when `parent` (the pid that started it) ends; elsewhere do nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had ended before the request
            os.kill(os.getpid(), signal.SIGKILL)


def give_way(niceness: int) -> None:
    """Let whoever else wants the processor have it first: nicer by `niceness`, as `os.nice` counts.

    Linux with autogroups weighs a nice value within one session only, and sessions against each other by a value of their own
    (sched(7)). A process that leads its session sets that too; it never touches a session that it only belongs to.
    """
    nice = os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # another kernel
            Path("/proc/self/autogroup").write_text(str(nice))


class Child:
    """A Python child `python -m module` in its own process group, seen from its parent's event loop."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start it; `environment` is added to ours. Its stderr is ours."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE, start_new_session=True,
            env={**os.environ, **(environment or {}), "LUTETIA_PARENT": str(os.getpid())},
        )  # fmt: skip
        return cls(process)

    async def send(self, message: Message) -> None:
        """Raises ConnectionError when the child has ended."""
        stdin = self.process.stdin
        if stdin is None or stdin.is_closing():  # uvloop would raise a RuntimeError
            raise ConnectionResetError("the child has ended")
        stdin.write(json.dumps(message).encode() + b"\n")
        await stdin.drain()

    async def messages(self) -> AsyncIterator[Message]:
        """What the child says, until it ends; half a line of one that was killed is nothing.

        Raises ValueError, after which it cannot be understood any more: a line longer than MAX_LINE, or no JSON.
        """
        assert self.process.stdout
        while (line := await self.process.stdout.readline()).endswith(b"\n"):
            yield json.loads(line)

    async def stop(self, grace: float) -> int:
        """Close its stdin (the request to end), then kill its group after `grace` seconds. Returns its exit status."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(grace):
                return await self.process.wait()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return await self.process.wait()


class ParentChannel:
    """The child's side, made first thing in its main: ties its life to the parent's and keeps prints off the channel."""

    def __init__(self) -> None:
        parent = os.environ.get("LUTETIA_PARENT")
        if parent:
            die_with_parent(int(parent))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides what it means
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def send(self, message: Message) -> None:
        """Nothing happens where the parent has ended: that shows at the end of `messages`."""
        with contextlib.suppress(BrokenPipeError):
            self._output.write(json.dumps(message).encode() + b"\n")
            self._output.flush()

    def messages(self) -> Iterator[Message]:
        """What the parent says, until it closes the channel; blocks."""
        for line in sys.stdin.buffer:
            yield json.loads(line)
