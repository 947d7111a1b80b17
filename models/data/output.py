"""An output folder that appears whole or not at all, and never overwrites foreign files."""

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
    """Raises DataError unless `out` is absent, empty, or holds an earlier build and nothing else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out} is not a folder; name a new folder for the data")
    names = {path.name for path in out.iterdir()} if out.exists() else set[str]()
    foreign = sorted(names - OWN_NAMES)
    if foreign or (names and DATA_FILE not in names):
        name = (foreign or sorted(names))[0]
        raise DataError(f"{out} holds {name}, which no build wrote, and is not overwritten; name a new folder")


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`. On success it replaces `out`, otherwise it is removed.

    Raises DataError if `out` holds foreign files, or if another build is writing it.
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
            if old.exists() and not out.exists():  # an earlier build was killed between the two renames below
                os.rename(old, out)
            _empty(part)
            try:
                yield part
                (part / _LOCK).unlink()
                _swap(part, out, old)
            finally:
                shutil.rmtree(part, ignore_errors=True)


def _empty(part: Path) -> None:
    """Remove the files of a killed build."""
    for path in part.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _swap(part: Path, out: Path, old: Path) -> None:
    check_output(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        if any(out.iterdir()):
            read_data(out)  # raises unless the earlier result is complete
        os.rename(out, old)
    os.rename(part, out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
