"""Child processes that end with their parent and exchange JSON lines with it over stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lutetia.system.forked import MAX_LINE, TEMPLATE, fork_child

_PR_SET_PDEATHSIG = 1

Message = dict[str, Any]
_log = logging.getLogger(__name__)


def die_with_parent(parent: int) -> None:
    """Ask Linux to SIGKILL this process when `parent` (the pid that started it) ends. Elsewhere do nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had ended before the request
            os.kill(os.getpid(), signal.SIGKILL)


def give_way(niceness: int) -> None:
    """Lower the CPU priority of this process by `niceness`, as `os.nice` counts.

    With autogroups Linux applies a nice value only within one session, and gives each session a value of its own (sched(7)). A
    process that leads its session sets that value too. It never changes a session that it only belongs to.
    """
    nice = os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # another kernel
            Path("/proc/self/autogroup").write_text(str(nice))


def raise_file_limit(wanted: int = 65_536) -> int | None:
    """Raise this process's limit of open files to `wanted`, or as far as its user may. Returns it; None where there is none.

    Many systems start programs with 1,024, which a service with many peers reaches.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses more than its kernel's own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class ChildProcess(Protocol):
    """The part of `asyncio.subprocess.Process` that a `Child` needs; a forked process has it, too."""

    @property
    def stdin(self) -> asyncio.StreamWriter | None: ...
    @property
    def stdout(self) -> asyncio.StreamReader | None: ...
    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...


class Child:
    """A child process `python -m module` in its own process group, as its parent's event loop sees it."""

    def __init__(self, process: ChildProcess) -> None:
        self.process = process

    @classmethod
    async def start(
        cls, module: str, *arguments: str, environment: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> Child:
        """Start a child with `environment` added to this process's. It writes to this process's stderr.

        `pass_fds`: descriptors that it inherits under the same numbers. Where LUTETIA_TEMPLATE names a template process, that
        forks the child, unless it inherits any.
        """
        if not pass_fds and (name := os.environ.get(TEMPLATE)):
            try:
                return cls(await fork_child(name, module, arguments, {**os.environ, **(environment or {})}))
            except (OSError, ValueError) as error:
                _log.warning("no process can be forked from the template %s (%s): starting %s anew", name, error, module)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE, start_new_session=True,
            pass_fds=tuple(pass_fds),
            env={**os.environ, **(environment or {}), "LUTETIA_PARENT": str(os.getpid())},
        )  # fmt: skip
        return cls(process)

    async def send(self, message: Message) -> None:
        """Raises ConnectionError when the child has ended."""
        await self.send_line(json.dumps(message).encode())

    async def send_line(self, line: bytes) -> None:
        """Send a message that is JSON already, without a line break. Raises ConnectionError when the child has ended."""
        stdin = self.process.stdin
        if stdin is None or stdin.is_closing():  # uvloop would raise a RuntimeError
            raise ConnectionResetError("the child has ended")
        stdin.write(line + b"\n")
        await stdin.drain()

    async def messages(self) -> AsyncIterator[Message]:
        """The messages of the child, until it ends. The partial last line of a killed child is dropped.

        Raises ValueError for a line longer than MAX_LINE or one that is not JSON. The stream cannot be read any further then.
        """
        assert self.process.stdout
        while (line := await self.process.stdout.readline()).endswith(b"\n"):
            yield json.loads(line)

    async def stop(self, grace: float) -> int:
        """Close the child's stdin, which asks it to end, and kill its group after `grace` seconds. Returns its exit status."""
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
    """The child's side. Make it first in main: it ties the child's life to the parent's and keeps prints off the channel."""

    def __init__(self) -> None:
        parent = os.environ.get("LUTETIA_PARENT")
        if parent:
            die_with_parent(int(parent))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of the terminal, and the parent handles it
        self._output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def send(self, message: Message) -> None:
        """Send `message`. Does nothing when the parent has ended, which `messages` shows by its end."""
        with contextlib.suppress(BrokenPipeError):
            self._output.write(json.dumps(message).encode() + b"\n")
            self._output.flush()

    def messages(self) -> Iterator[Message]:
        """The messages of the parent, until it closes the channel. Blocks."""
        return map(json.loads, self.lines())

    def lines(self) -> Iterator[bytes]:
        """The messages as they come, for a reader that parses JSON itself. Blocks."""
        yield from sys.stdin.buffer


def give_back_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    It keeps what lies between blocks that are still used: after a large file was converted tensor by tensor, as much as the file.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
