"""How tests start processes of their own: with one thread for torch, and so that none outlives a test run that is killed."""

from __future__ import annotations

import atexit
import os
from functools import cache
from pathlib import Path

import psutil

from lutetia.system.forked import TEMPLATE, start_template

ROOT = Path(__file__).resolve().parents[1]
_IMPORTS = (
    "diffusers.models.transformers",
    "lutetia.node.trainer.loop",
    "lutetia.coordinator.worker.process",
    "lutetia.cli.main",
    "lutetia.models.pipeline",
    "lutetia.models.mixing.stitch",
    "lutetia.models.data.build",
    "lutetia.models.metrics.report",
    "lutetia.coordinator.admin.create",
    "lutetia.cli.study.stages",
)


@cache
def template_process() -> psutil.Process:
    """The template (`lutetia.system.template`) from which the processes that import torch are forked. All tests share it."""
    os.environ[TEMPLATE], process = start_template(*_IMPORTS, environment={"DIFFUSERS_VERBOSITY": "error"})
    atexit.register(process.kill)
    return psutil.Process(process.pid)


def forked_for(pid: int) -> list[psutil.Process]:
    """The living processes that the template forked for process `pid`: its trainers or workers."""
    return [child for child in template_process().children() if child.name().endswith(f" {pid}")]


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of Lutetia."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LUTETIA_") or key == TEMPLATE}


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with the repository's root on PYTHONPATH, one thread for torch, and `more`.

    LUTETIA_PARENT: a `lutetia` command asks the kernel to kill it when this process ends. Start other programs by
    `system.tether.command`.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LUTETIA_PARENT": str(os.getpid()), **more}
