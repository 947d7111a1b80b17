"""Files and folders that are whole or absent, also after a power loss."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lutetia.system.errors import ConfigError, DiskError, disk_reason

_DISK_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip
# without ENOENT: the caller has to handle a missing file


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a folder, and its file system needs no such request."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(descriptor: int) -> bool:
    """Lock an open file for this process until it is closed. Returns whether nobody else holds the lock."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_on_windows(descriptor: int) -> bool:
    try:
        import msvcrt
    except ImportError:  # neither system: go on without a lock
        return True
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents durably: a file is lost in a power loss if its folder is."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        fsync_folder(new.parent)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full, read-only or forbidden disk or an impossible path into a DiskError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRNOS:
            raise DiskError(f"cannot write {path}: {disk_reason(error)}; free space or choose another folder") from error
        raise


@contextlib.contextmanager
def atomic_path(target: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `target`. On success fsync it and rename it over `target`, else remove it."""
    with disk_errors(target):
        make_folder(target.parent)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, mode)
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, target)
            fsync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def part_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` for files that nobody needs later. It is removed at the end; after a kill `sweep_parts` removes it.

    Raises DiskError when it cannot be made.
    """
    with disk_errors(parent):
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_parts(folder: Path) -> None:
    """Remove the half-written files of killed processes in `folder` and below. Call it with the folder's lock, before writing.

    What cannot be removed stays until the next start.
    """
    for place, folders, files in os.walk(folder):  # unlike rglob it goes on where a folder vanishes meanwhile
        for name in [name for name in (*folders, *files) if is_part(name)]:
            left = Path(place, name)
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


def is_part(name: str) -> bool:
    """Whether a file of this name is a half-written one."""
    return name.startswith(".") and name.endswith(".part")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a configuration file. Raises ConfigError when it cannot be read or is not TOML."""
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}; name an existing file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, too long numbers or too deep nesting
        raise ConfigError(f"configuration {path} is not TOML: {error}; correct it") from error


def write_atomic(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `target`. A reader sees the old file or the new one, never a part."""
    with atomic_path(target, mode) as temporary:
        temporary.write_bytes(data)


def takes_writes(folder: Path) -> bool:
    """Whether a small file can be written in `folder`. The file is not kept."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def replace_folder(new: Path, target: Path) -> None:
    """Replace the folder `target` by `new` (same parent), durably, and remove the old one.

    On Linux a reader always finds one whole folder. Elsewhere there is none for a moment.
    """
    with disk_errors(target):
        for folder, _, _ in os.walk(new):
            fsync_folder(Path(folder))
        if not target.exists():
            os.rename(new, target)
        elif _exchange(new, target):
            shutil.rmtree(new)
        else:
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
            os.rename(target, old / target.name)
            os.rename(new, target)
            shutil.rmtree(old)
        fsync_folder(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically with renameat2 (Linux, most file systems). False where that is not supported."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_current_folder, exchange = -100, 2
    return rename is not None and rename(at_current_folder, os.fsencode(a), at_current_folder, os.fsencode(b), exchange) == 0
