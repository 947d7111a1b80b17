"""A template process: it imports modules once, and forks a child for each request. Linux only.

`python -m lutetia.system.template DESCRIPTOR IMPORT…` serves the listening Unix socket DESCRIPTOR. IMPORT is a module; all are
imported when the first request comes. Trainers and workers spend three seconds of processor time importing torch and diffusers.
Where several nodes run on one machine, they fork them from one template instead: `Child.start` does so when LUTETIA_TEMPLATE
names it.

A client connects, and sends one JSON line (`ForkRequest`) with three file descriptors: stdin, stdout and stderr of the child. It
is answered with two lines, the child's pid and, once it has ended, its exit code (minus the signal that killed it). A client
that closes the connection, for example by dying, has its child's process group killed. Children die with the template.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lutetia.system.forked import ForkRequest, same_user
from lutetia.system.process import die_with_parent

_log = logging.getLogger(__name__)
_PR_SET_NAME = 15
_NAME = 15  # characters that Linux keeps
_MAX_REQUEST = 1 << 20
_PATIENCE = 5.0  # seconds for a client on this machine to send its request


class Template:
    """Serves requests one at a time; the children run on their own.

    Args:
        listener: the Unix socket, listening.
        imports: what to import before the first fork.
    """

    def __init__(self, listener: socket.socket, imports: Sequence[str]) -> None:
        self._listener, self._imports = listener, imports
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._clients: dict[socket.socket, tuple[int, int]] = {}
        """Of each client the pid of its child, and a descriptor that becomes readable when the child ends."""

    def run(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._finish(key.data, killed=key.fileobj is key.data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(_PATIENCE)
        if self._imports:
            _import(self._imports)
            self._imports = ()
        try:
            request, streams = _receive(client)
        except (OSError, ValueError, TypeError) as error:
            _log.warning("a request to fork is refused: %s", error)
            client.close()
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()  # before the client learns the pid: it may kill the process group
            _take_name(request)
            self._selector.close()
            for other in (self._listener, client, *self._clients):
                other.close()
            for descriptor in (reading, writing, *(ended for _, ended in self._clients.values())):
                os.close(descriptor)
            _become(request, streams)
        for descriptor in (writing, *streams):
            os.close(descriptor)
        os.read(reading, 1)  # ends when the child has closed its side
        os.close(reading)
        ended = os.pidfd_open(pid)
        self._clients[client] = pid, ended
        self._selector.register(client, selectors.EVENT_READ, client)
        self._selector.register(ended, selectors.EVENT_READ, client)
        with contextlib.suppress(OSError):
            client.sendall(b"%d\n" % pid)

    def _finish(self, client: socket.socket, *, killed: bool) -> None:
        """Report the end of a client's child. `killed`: the client has gone, and its child has to."""
        if client not in self._clients:
            return  # both descriptors became readable at once
        pid, ended = self._clients.pop(client)
        if killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        for descriptor in (client, ended):
            self._selector.unregister(descriptor)
        client.close()
        os.close(ended)


def _import(names: Sequence[str]) -> None:
    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # a collection in a child would write to the pages that it shares with the template


def _receive(client: socket.socket) -> tuple[ForkRequest, Sequence[int]]:
    if not same_user(client):
        raise PermissionError("it comes from another user")
    data, streams, _, _ = socket.recv_fds(client, _MAX_REQUEST, 3)
    while data and not data.endswith(b"\n") and len(data) < _MAX_REQUEST:
        data += client.recv(_MAX_REQUEST)
    if len(streams) != 3:
        raise ValueError(f"it brings {len(streams)} file descriptors instead of 3")
    return ForkRequest(**json.loads(data)), streams


def _take_name(request: ForkRequest) -> None:
    """Otherwise `ps` and `top` would show every child as the template."""
    name = f"{request.module.rpartition('.')[2]} {request.parent}"[:_NAME]
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _become(request: ForkRequest, streams: Sequence[int]) -> NoReturn:
    """Turn this fork into the child, and end with it."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request.cwd)
        os.environ.clear()
        os.environ.update(request.environment, LUTETIA_PARENT=str(os.getppid()))
        if "torch" in sys.modules and (threads := request.environment.get("OMP_NUM_THREADS")):
            sys.modules["torch"].set_num_threads(int(threads))  # the variable was read when the template started
        sys.argv = [request.module, *request.arguments]
        runpy.run_module(request.module, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (the interpreter would print it and end, too)
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main(descriptor: str, *imports: str) -> NoReturn:
    if parent := os.environ.pop("LUTETIA_PARENT", None):
        die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Template(socket.socket(fileno=int(descriptor)), imports).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
