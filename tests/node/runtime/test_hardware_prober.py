"""Repeated hardware probes with real trainer processes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from lutetia.node.runtime.hardware_prober import HardwareProber
from lutetia.node.runtime.trainer_process import TrainerProcess
from lutetia.node.runtime.workspace import RunPaths
from lutetia.node.settings import NodeSettings
from lutetia.system.errors import HardwareError
from tests.node.scripted_coordinator import children_of, running
from tests.node.tiny_run import TinyRun, make_run

pytestmark = pytest.mark.timeout(600)


def prober_of(run: TinyRun, folder: Path) -> HardwareProber:
    paths = RunPaths(folder / "node", run.manifest.run_id)
    paths.folder.mkdir(parents=True)
    paths.manifest.write_bytes(run.manifest_file.read_bytes())
    settings = NodeSettings(ticket="", state_folder=folder / "node", device="cpu", threads=1)
    return HardwareProber(settings, paths, TrainerProcess(lambda event: None, time.time, 1))


async def test_two_probes_at_once_keep_the_result_and_no_child(tmp_path: Path):
    before, run = children_of(os.getpid()), make_run(tmp_path / "run")
    prober = prober_of(run, tmp_path)
    first = await prober.probe(run.manifest)
    probes = asyncio.gather(prober.probe(run.manifest), prober.probe(run.manifest))
    known = []
    while not probes.done():
        known.append(prober.result)
        await asyncio.wait([probes], timeout=0.05)
    assert None not in known
    assert known[0] is first
    assert prober.result in await probes
    own = children_of(os.getpid()) - before
    assert len(running(own)) <= 1, "at most one spare process"
    await prober.trainer.close()
    assert not running(own)


async def test_failed_probe_keeps_the_previous_result(tmp_path: Path):
    run = make_run(tmp_path / "run")
    prober = prober_of(run, tmp_path)
    first = await prober.probe(run.manifest)
    prober.paths.manifest.write_text("torn")
    with pytest.raises(HardwareError):
        await prober.probe(run.manifest)
    assert prober.result is first
    await prober.trainer.close()
