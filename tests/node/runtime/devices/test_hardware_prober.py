"""Repeated hardware probes with real trainer processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lutetia.node.device_settings import DeviceChoice
from lutetia.node.runtime.devices.hardware_prober import HardwareProber
from lutetia.node.runtime.devices.inventory import hardware_mark
from lutetia.node.runtime.devices.trainer_process import TrainerProcess
from lutetia.node.runtime.node_record import DeviceFacts, summary_of
from lutetia.node.runtime.workspace import RunPaths
from lutetia.node.services.standby_policy import is_standby
from lutetia.node.settings import NodeSettings
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import NodeRecord
from lutetia.system.errors import HardwareError
from tests.node.scripted_coordinator import children_of, running
from tests.node.tiny_run import TinyRun, make_run

pytestmark = pytest.mark.timeout(600)


def prober_of(run: TinyRun, folder: Path, hardware: Callable[[], str] = hardware_mark) -> HardwareProber:
    paths = RunPaths(folder / "node", run.manifest.run_id)
    paths.folder.mkdir(parents=True, exist_ok=True)
    paths.manifest.write_bytes(run.manifest_file.read_bytes())
    settings = NodeSettings(ticket="", state_folder=folder / "node", device="cpu", threads=1)
    return HardwareProber(settings, DeviceChoice("cpu", 1), paths, TrainerProcess(lambda event: None, time.time, 1), hardware)


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


async def test_result_of_other_hardware_is_not_used_again(tmp_path: Path):
    """A saved result said `cpu` for good, also to a daemon that was restarted after the driver had come up."""
    run, marks = make_run(tmp_path / "run"), iter(("without a card", "without a card", "with a card"))
    first = await (before := prober_of(run, tmp_path, lambda: next(marks))).probe(run.manifest)
    child = await before.trainer.take()
    again = prober_of(run, tmp_path, lambda: next(marks))
    assert await again.probe(run.manifest) == first
    changed = prober_of(run, tmp_path, lambda: next(marks))
    changed.trainer.adopt(child)
    assert (await changed.probe(run.manifest)).question != first.question
    await changed.trainer.close()


async def test_a_node_that_probes_is_announced_as_joining(tmp_path: Path):
    """Nobody saw it before for up to five minutes."""
    state, hardware, rate, *_ = summary_of([DeviceFacts("cpu", "probing", None, 0.0, None)])
    assert (state, hardware.device, rate) == ("joining", "not probed", 0.0)
    assert summary_of([DeviceFacts("cpu", "left", None, 0.0, None)]).state == "left"
    run, keeper = make_run(tmp_path / "run"), Identity.derived("a node that probes")
    record = NodeRecord(
        run=run.manifest.run_id, owner=keeper.public_key, issued=1.0, peer_id=keeper.peer_id, hardware=hardware,
        samples_per_second=rate, software="0.1", state=state,
    )  # fmt: skip
    assert not is_standby(record), "no copies and no shards are left to it"
    document = NodeRecord.model_validate_json(record.model_dump_json())
    assert document == record
