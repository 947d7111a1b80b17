"""A private working folder beside the place of a result. It is removed in every case."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lutetia.system.errors import DiskError, UsageError
from lutetia.system.files import disk_errors, lock_file, make_folder, takes_writes

_LOCK = "in-use"


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` and remove it at the end. Folders that killed processes left are removed first."""
    parent = target.absolute().parent
    with disk_errors(target):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, target.name)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    lock_file(descriptor)
    try:
        yield folder
    finally:
        os.close(descriptor)  # first, since Windows removes no open file
        shutil.rmtree(folder, ignore_errors=True)


def arriving(target: Path) -> Path:
    """The folder beside `target` that keeps what has arrived of it, also after a killed process."""
    return target.absolute().parent / f".{target.name}.fetch"


def _sweep(parent: Path, name: str) -> None:
    """Remove the folders whose process has ended: the kernel has released their locks."""
    for stale in parent.glob(f".{name}.*.part"):
        try:
            descriptor = os.open(stale / _LOCK, os.O_RDWR)
        except OSError:
            continue  # not a workspace, or not locked yet
        free = lock_file(descriptor)
        os.close(descriptor)
        if free:
            shutil.rmtree(stale, ignore_errors=True)


def ready(folder: Path) -> None:
    """Make `folder` and check that it can be written, before long work whose result goes there. Raises DiskError."""
    with disk_errors(folder):
        make_folder(folder)
    if not takes_writes(folder):
        raise DiskError(f"cannot write {folder}; free space or choose another folder")


def check_replaceable(target: Path, marks: tuple[str, ...]) -> None:
    """Raise UsageError when `target` is a file, or a folder with files but without all of `marks` (so not an earlier result)."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; choose another --out")
    if any(target.iterdir()) and not all((target / mark).exists() for mark in marks):
        raise UsageError(f"{target} holds other files, which would be replaced; choose another --out or remove it")
