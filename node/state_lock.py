"""One daemon per state folder: a pidfile that stays locked while its writer lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
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
        descriptor = _open_pidfile(folder / PIDFILE)
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


def _open_pidfile(path: Path) -> int:
    """Open or create the pidfile. Whoever may write in the folder must not make this process empty another file.

    Raises IdentityError when a link or anything but a plain file of one name is there.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise _foreign(path) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise _foreign(path)
    return descriptor


def _foreign(path: Path) -> IdentityError:
    return IdentityError(
        f"{path} is a link or no plain file, so another program made it; remove it or name another --state-folder"
    )
