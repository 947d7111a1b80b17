"""Lets a test act as a user who may not write everywhere, also where root runs the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NOBODY = 65534


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Within the block files are used as an ordinary user uses them."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that every user may enter and read. Write in it outside of `unprivileged`."""
    folder = Path(tempfile.mkdtemp(prefix="lutetia-shared-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)
