"""How tests start processes of their own: with one thread for torch, and so that none outlives a test run that is killed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with the repository's root on PYTHONPATH, one thread for torch, and `more`.

    LUTETIA_PARENT: a `lutetia` command asks the kernel to kill it when this process ends. Start other programs by
    `system.tether.command`.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LUTETIA_PARENT": str(os.getpid()), **more}
