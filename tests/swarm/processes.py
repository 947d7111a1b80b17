"""Commands that stay, and waiting for what they bring about."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 400.0) -> None:
    """Ask again and again (every question is a process of its own, so there is no pause between)."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"


@contextlib.contextmanager
def command(log: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A `lutetia` command that stays, ended by SIGTERM."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LUTETIA_PARENT": str(os.getpid()), "LUTETIA_STOP_WITHIN": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lutetia.cli", *map(str, arguments)], stdout=output, stderr=output, text=True, env=environment
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(100)
