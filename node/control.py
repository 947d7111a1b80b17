"""How a volunteer talks to the daemon: one JSON line each way over a socket in the state folder that only its owner can open.

Imports neither torch nor hivemind: `lutetia status` answers in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.records import NodeState
from lutetia.system.errors import LutetiaError, UnreachableError, UsageError
from lutetia.system.files import disk_errors

SOCKET = "control.sock"
MAX_REQUEST = 4096
MAX_ANSWER = 1 << 20
_SECONDS = 5.0
_LONGEST_PATH = 100  # sun_path holds 104 to 108 bytes


class ControlRequest(Frozen):
    """`seconds` ends a pause by itself."""

    verb: Literal["status", "pause", "resume", "finish", "leave"]
    seconds: float | None = Field(default=None, gt=0, le=366 * 86_400)


class LocalStatus(Frozen):
    """What this box does, and whether it counts. Times are Unix seconds; `accepted` counts since the daemon started."""

    state: NodeState
    reason: str
    since: float
    owner: str
    peer_id: str
    run: str | None = None
    name: str | None = None
    manifest_version: int | None = None
    shard: int | None = None
    shard_name: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    samples: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    pending: int = 0
    accepted: int = 0
    accepted_today: int = 0
    refused: int = 0
    last_accepted: float | None = None
    due: float | None = None
    paused_until: float | None = None
    device: str | None = None
    precision: str | None = None
    online: bool = False
    problem: str | None = None
    slowed: str | None = None
    addresses: tuple[str, ...] = ()
    blobs_bytes: int | None = None
    copies: int = 0
    pid: int
    software: str
    started: float


class _Refusal(Frozen):
    code: int
    message: str = Field(min_length=1)


class _Reply(Frozen):
    """The line that comes back: `answer` if `ok`, else `error`."""

    ok: bool
    answer: dict[str, Any] | None = None
    error: _Refusal | None = None


Answer = Callable[[ControlRequest], Awaitable[dict[str, Any]]]


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """A path of the socket that fits into a socket address, however deep `folder` is."""
    path = folder / SOCKET
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
    elif sys.platform.startswith("linux"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{descriptor}/{SOCKET}"
        finally:
            os.close(descriptor)
    else:
        raise UsageError(f"the path of the state folder {folder} is too long for a control socket; choose a shorter one")


def _listen(folder: Path) -> socket.socket:
    """The socket, mode 0600 from its first moment. Whoever calls holds the state folder's lock: an old socket is stale."""
    with disk_errors(folder / SOCKET):
        (folder / SOCKET).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            with _short_path(folder) as path:
                listener.bind(path)
        finally:
            os.umask(mask)
    listener.setblocking(False)
    return listener


@contextlib.asynccontextmanager
async def serve_control(folder: Path, answer: Answer):
    """Answer requests until the block ends. A failing request ends its own connection only."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                document = await _answered(answer, await reader.readline())
                writer.write(json.dumps(document).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass  # the caller went away, dawdled, or sent more than a line may hold
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, sock=_listen(folder), limit=MAX_REQUEST)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):  # on a read-only disk the next daemon replaces it
            (folder / SOCKET).unlink(missing_ok=True)


def read_request(line: bytes) -> ControlRequest:
    """Raises UsageError when `line` asks for nothing that the daemon knows."""
    try:
        return ControlRequest.model_validate_json(line)
    except ValidationError as error:
        raise UsageError(f"the daemon does not understand: {first_problem(error)}") from error


def read_answer(line: bytes) -> dict[str, Any]:
    """What the daemon answered. Raises UsageError when it refused, UnreachableError when whoever answers is no daemon of ours."""
    try:
        reply = _Reply.model_validate_json(line)
    except ValidationError as error:
        raise UnreachableError(f"the daemon's answer is malformed ({first_problem(error)}); restart it") from error
    if reply.ok and reply.answer is not None:
        return reply.answer
    raise UsageError(reply.error.message if reply.error else "the daemon refused without a reason; look at its log")


async def _answered(answer: Answer, line: bytes) -> dict[str, Any]:
    try:
        return {"ok": True, "answer": await answer(read_request(line))}
    except LutetiaError as error:
        return {"ok": False, "error": {"code": error.code, "message": str(error)}}


async def ask(state_folder: Path, verb: str, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon of `state_folder`. Raises UnreachableError when none runs there, UsageError when it refuses."""
    try:
        async with asyncio.timeout(_SECONDS):
            reader, writer = await _connect(state_folder)
            try:
                writer.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise UnreachableError(f"the daemon of {state_folder} did not answer within {_SECONDS:.0f} s; look at its log") from error
    except PermissionError as error:
        raise UnreachableError(f"{state_folder} belongs to another user; ask its daemon as that user") from error
    except (OSError, ValueError) as error:
        text = f"no daemon runs on {state_folder}; start it with `lutetia join TICKET`, or name its folder with --state-folder"
        raise UnreachableError(text) from error
    if not line:
        raise UnreachableError(f"the daemon of {state_folder} hung up; look at its log")
    return read_answer(line)


async def _connect(folder: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with _short_path(folder) as path:
        return await asyncio.open_unix_connection(path, limit=MAX_ANSWER)
