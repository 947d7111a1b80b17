"""The daemon's control socket: one JSON line each way over a socket in the state folder that only its owner can open.

Imports neither torch nor hivemind, so that `lutetia status` answers in milliseconds.
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
from lutetia.system.errors import LutetiaError, UnreachableError, UsageError
from lutetia.system.files import disk_errors

SOCKET = "control.sock"
MAX_REQUEST = 4096
MAX_ANSWER = 1 << 20
_SECONDS = 5.0
_LONGEST_PATH = 100  # sun_path holds 104 to 108 bytes


class ControlRequest(Frozen):
    """One request of the volunteer."""

    verb: Literal["status", "journal", "pause", "resume", "finish", "leave"] = Field(
        description="What to do; all verbs return the status, but journal the journal"
    )
    seconds: float | None = Field(default=None, gt=0, le=366 * 86_400, description="Length of a pause; None: until resume")
    device: str | None = Field(
        default=None, max_length=16, description="The device that pauses or resumes, by name or number; None: all of them"
    )


class _Refusal(Frozen):
    code: int
    message: str = Field(min_length=1)


class _Reply(Frozen):
    """The answer line: `answer` if `ok`, else `error`."""

    ok: bool
    answer: dict[str, Any] | None = None
    error: _Refusal | None = None


Answer = Callable[[ControlRequest], Awaitable[dict[str, Any]]]


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """A path of the socket that is short enough for a socket address, however deep `folder` is."""
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
    """The listening socket, created with mode 0600. The caller holds the state lock, so an old socket is stale."""
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
    """Answer requests on `folder`'s socket until the block ends. A failing request ends only its own connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                document = await _answered(answer, await reader.readline())
                writer.write(json.dumps(document).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass  # the client left, was too slow, or sent a line that is too long
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
    """Raises UsageError when the daemon does not know the request."""
    try:
        return ControlRequest.model_validate_json(line)
    except ValidationError as error:
        raise UsageError(f"the daemon does not know this request: {first_problem(error)}") from error


def read_answer(line: bytes) -> dict[str, Any]:
    """The daemon's answer. Raises UsageError when it refused, UnreachableError when the answer is malformed."""
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
    """Send a request to the daemon of `state_folder` and return its answer.

    Raises UnreachableError when no daemon runs there or it does not answer, UsageError when it refuses.
    """
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
        raise UnreachableError(f"{state_folder} belongs to another user; run this command as that user") from error
    except (OSError, ValueError) as error:
        text = f"no daemon runs on {state_folder}; start it with `lutetia join TICKET`, or name its folder with --state-folder"
        raise UnreachableError(text) from error
    if not line:
        raise UnreachableError(f"the daemon of {state_folder} closed the connection; look at its log")
    return read_answer(line)


async def _connect(folder: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with _short_path(folder) as path:
        return await asyncio.open_unix_connection(path, limit=MAX_ANSWER)
