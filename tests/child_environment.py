"""The environment of a Python process that a test starts and that imports `tests.…` itself."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with the repository's root on PYTHONPATH, one thread for torch, and `more`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
