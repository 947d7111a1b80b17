"""An output folder that appears whole or not at all, and never overwrites what somebody else put there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lutetia.models.data.description import DATA_FILE, read_data
from lutetia.system.errors import DataError
from lutetia.system.files import disk_errors, fsync_folder

OWN_NAMES = frozenset({"shards", "sheets", "clips.jsonl", DATA_FILE})
_LOCK = ".lock"


def check_output(out: Path) -> None:
    """Raises DataError unless `out` is absent, empty, or an earlier result of a build and nothing else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} is no folder; name a new folder for the data")
    found = {path.name for path in out.iterdir()} if out.exists() else set[str]()
    foreign = sorted(found - OWN_NAMES)
    if foreign or (found and DATA_FILE not in found):
        name = (foreign or sorted(found))[0]
        raise DataError(
            f"{out} is not empty and holds {name}, which no build wrote; name a new folder, so that nothing is overwritten"
        )


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on success it becomes `out`, replacing an earlier result, else it is removed.

    Raises DataError when `out` holds foreign files or another build is writing it.
    """
    check_output(out)
    out = out.absolute()
    part, old = out.parent / f".{out.name}.part", out.parent / f".{out.name}.old"
    with disk_errors(out):
        part.mkdir(parents=True, exist_ok=True)
        with (part / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"another build is writing {out}; wait for it or name another folder") from error
            if old.exists() and not out.exists():  # a build was killed between the two renames below
                os.rename(old, out)
            _empty(part)
            try:
                yield part
                (part / _LOCK).unlink()
                _swap(part, out, old)
            finally:
                shutil.rmtree(part, ignore_errors=True)


def _empty(part: Path) -> None:
    """Remove what a killed build left."""
    for path in part.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _swap(part: Path, out: Path, old: Path) -> None:
    check_output(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        if any(out.iterdir()):
            read_data(out)  # only a sound earlier result is replaced
        os.rename(out, old)
    os.rename(part, out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
