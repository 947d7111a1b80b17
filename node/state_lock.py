"""One daemon per state folder: a pidfile that stays locked while its writer lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lutetia.system.errors import IdentityError
from lutetia.system.files import disk_errors

PIDFILE = "daemon.pid"


@contextlib.contextmanager
def state_lock(folder: Path) -> Iterator[None]:
    """Lock `folder`, created with mode 0700 if missing. Raises IdentityError with the pid of the daemon that holds it.

    The kernel releases the lock when the process ends, so a stale pidfile does no harm.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / PIDFILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise IdentityError(
                f"the state folder {folder} is in use by a daemon with pid {pid}; stop it with `lutetia finish`, "
                "or give this one its own --state-folder"
            ) from error
        with disk_errors(folder / PIDFILE):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
