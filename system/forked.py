"""A child process that a template process forked (`system.template`), as its client's event loop sees it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

TEMPLATE = "LUTETIA_TEMPLATE"
MAX_LINE = 1 << 20
_PATIENCE = 120.0  # seconds for the template's imports, during which requests wait
_CREDENTIALS = struct.Struct("3i")  # pid, user, group (unix(7))


@dataclass(frozen=True)
class ForkRequest:
    """What to run: `python -m module arguments` in folder `cwd` with exactly this environment."""

    module: str
    arguments: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    parent: int
    """Process id of the client, which becomes part of the child's name: `trainer 4711`."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class ForkedProcess:
    """Behaves as an `asyncio.subprocess.Process` does. Killed when the client ends.

    Args:
        pid: its process id.
        stdin, stdout: its pipes.
        control: the connection to the template, on which the exit code arrives.
    """

    def __init__(
        self, pid: int, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader, control: asyncio.StreamReader,
        connection: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._connection = connection
        self._end = asyncio.create_task(self._wait_for_end(control))

    async def _wait_for_end(self, control: asyncio.StreamReader) -> int:
        line = await control.readline()
        self._connection.close()
        return int(line) if line else -9  # the template died, and its children with it

    @property
    def returncode(self) -> int | None:
        return self._end.result() if self._end.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self._end)


def start_template(*imports: str, environment: Mapping[str, str] | None = None) -> tuple[str, subprocess.Popen[bytes]]:
    """Start a template (`system.template`) that dies with this process. Linux only.

    Returns the value of LUTETIA_TEMPLATE for processes that may use it, and the template's process. `imports`: what it imports
    when it is first asked. `environment` is added to its own; its children have that of who asks for them.

    The socket is in Linux's abstract namespace: no file is left when the template is killed.
    """
    name = f"@lutetia-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_address(name))
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "lutetia.system.template", str(listener.fileno()), *imports],
            stdin=subprocess.DEVNULL, pass_fds=(listener.fileno(),), start_new_session=True,
            env={**os.environ, **(environment or {}), "LUTETIA_PARENT": str(os.getpid())},
        )  # fmt: skip
    return name, process


def _address(name: str) -> str:
    return "\0" + name.removeprefix("@")


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end has this process's user. Everybody can reach an abstract socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] == os.getuid()


def ask_to_fork(name: str, request: ForkRequest, streams: Sequence[int]) -> socket.socket:
    """The connection to template `name`, on which the child's pid and then its exit code arrive as lines.

    `streams`: descriptors for the child's stdin, stdout and stderr. The child is killed when the connection closes.
    Raises OSError when no template of this user listens.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(name))
        if not same_user(connection):
            raise PermissionError(f"the template {name} belongs to another user")
        data = request.encode()
        sent = socket.send_fds(connection, [data], list(streams))
        connection.sendall(data[sent:])
    except BaseException:
        connection.close()
        raise
    return connection


async def fork_child(name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
    """Have template `name` fork a child; it writes to this process's stderr.

    Raises OSError when no template listens, TimeoutError when it takes longer than two minutes, ValueError when it dies.
    """
    loop = asyncio.get_running_loop()
    request = ForkRequest(module, tuple(arguments), os.getcwd(), dict(environment), os.getpid())
    stdin, to_child = os.pipe()
    from_child, stdout = os.pipe()
    try:
        connection = ask_to_fork(name, request, (stdin, stdout, 2))
    except BaseException:
        os.close(to_child)
        os.close(from_child)
        raise
    finally:
        os.close(stdin)
        os.close(stdout)
    control, control_writer = await asyncio.open_unix_connection(sock=connection)
    reader = asyncio.StreamReader(limit=MAX_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_child, "rb"))
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())  # `drain` waits by way of it
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(to_child, "wb"))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    try:
        async with asyncio.timeout(_PATIENCE):
            pid = int(await control.readline())
    except BaseException:
        control_writer.close()
        writer.close()
        raise
    return ForkedProcess(pid, writer, reader, control, control_writer)
