"""What holds for all tests.

Several files are tested at a time, on few cores. So torch gets one thread, here and in the processes that tests start: threads
that share a core wait for each other. This is set before anything imports torch; a value that the caller has set is kept.
No property test has a deadline (hypothesis gives each example 200 ms): none may fail because the machine is busy.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.child_environment import template_process

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LONGEST = (
    "cli/study/test_study_command.py",
    "swarm/test_demo.py",
    "faults",
    "node/trainer/test_trainer.py",
    "simulation",
    "models/metrics/test_evaluator.py",
    "node/test_daemon.py",
    "coordinator/admin/test_upgrade_live.py",
)
"""Start with these: a long file that comes last keeps one process busy while the others have nothing left to do."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # not where xdist only hands out the tests
        template_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix()
        return next((number for number, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))

    items.sort(key=place)
