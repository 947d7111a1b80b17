"""A test run that is killed leaves no process behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lutetia.system import tether
from tests.child_environment import ROOT

STARTS_A_COORDINATOR = "tests/coordinator/test_serve.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has ended")
def test_killed_pytest_leaves_no_process(tmp_path: Path) -> None:
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", STARTS_A_COORDINATOR]
    run = subprocess.Popen([*tether.command(sys.executable), *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    children = wait_for_p2pd(psutil.Process(run.pid))
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [process.cmdline() for process in alive]


def wait_for_p2pd(process: psutil.Process, seconds: float = 300.0) -> list[psutil.Process]:
    """All descendants of `process`, once a coordinator's p2pd is one of them."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children = process.children(recursive=True)
        if any(child.name() == "p2pd" for child in children):
            return children
        ended, _ = psutil.wait_procs([process], timeout=0.2)
        assert not ended, "the test run ended before its coordinator was up"
    raise AssertionError(f"no p2pd within {seconds} s")
