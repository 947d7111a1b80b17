"""Runs commands in the background, and waits for their effects."""

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
    """Wait until `condition()` is true. It runs a child process each time, so there is no pause in between."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"


@contextlib.contextmanager
def command(log: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A `lutetia` command in the background; SIGTERM ends it with the block."""
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
