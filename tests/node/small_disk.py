"""Small disks for tests: full or read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`; skips the test where it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the disk until only `leave` bytes are free. Returns the file to remove to make space again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (left := _free(disk) - leave) > 0:
            with contextlib.suppress(OSError):
                file.write(bytes(min(left, 1 << 20)))
    return ballast


def _free(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


def make_read_only(disk: Path) -> None:
    """Remount read-only, as the kernel does after a disk error. No file may be open for writing."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
