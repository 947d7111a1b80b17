"""The daemon as a volunteer meets it: real processes, real libp2p on loopback, a coordinator in the test."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lutetia.node.control import ask
from lutetia.protocol.identity import Identity
from lutetia.protocol.records import claim_key, node_key
from lutetia.system.errors import IdentityError

from .small_disk import disk_free, small_disk
from .tiny_run import make_run
from .toy_coordinator import DaemonProcess, ToyCoordinator, all_gone, children_of, eventually, running, toy_coordinator

pytestmark = pytest.mark.timeout(600)  # seconds each on a quiet machine, minutes on a busy one


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[ToyCoordinator]:
    run = make_run(tmp_path / "run", epochs=50, steps=100, heartbeat=2.0)
    async with toy_coordinator(run, tmp_path / "coordinator") as toy:
        yield toy


async def command_of(pid: int) -> str:
    data = await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_bytes)
    return data.replace(b"\0", b" ").decode()


async def child(daemon: DaemonProcess, word: str) -> set[int]:
    return {pid for pid in running(children_of(daemon.process.pid)) if word in await command_of(pid)}


async def test_a_volunteers_day(coordinator: ToyCoordinator, tmp_path: Path):
    daemon = await DaemonProcess.start(coordinator, tmp_path / "box", "--duty", "0.5")
    status = await daemon.until(state="training", step=lambda step: step)
    assert status["device"] == "cpu"
    assert status["precision"] == "float32: CPU"
    assert "secret key" in daemon.words()

    second = await DaemonProcess.start(coordinator, tmp_path / "box")
    assert await second.ended() == IdentityError.code
    assert f"pid {daemon.process.pid}" in second.words()

    await daemon.until(accepted_today=lambda count: count >= 1)
    await ask(daemon.state, "pause")
    await daemon.until(state="paused", shard=None)
    shard, run = status["shard"], coordinator.run.manifest.run_id
    owner = Identity.load(daemon.state / "identity.key").public_key

    async def released() -> bool:
        return [claim.state for claim in await coordinator.records(claim_key(run, shard))] == ["released"]

    await eventually(released)
    await all_gone(await child(daemon, "node.trainer"))
    await ask(daemon.state, "resume")
    status = await daemon.until(state="training", shard=shard, step=lambda step: step)

    (p2pd,) = await child(daemon, "p2pd")
    os.kill(p2pd, signal.SIGKILL)
    await daemon.until(online=False)
    (trainer,) = await child(daemon, "node.trainer")
    status = await daemon.until(online=True, state="training")
    assert await child(daemon, "node.trainer") == {trainer}, "training went on"
    await daemon.until(accepted=lambda count: count > status["accepted"])

    family = children_of(daemon.process.pid)
    await ask(daemon.state, "finish")
    assert await daemon.ended() == 0, daemon.words()
    assert not running(family)
    assert [node.state for node in await coordinator.records(node_key(run, owner))] == ["left"]
    assert await released()
    assert not list(daemon.state.glob("*.sock"))


async def test_killed_daemon_leaves_nothing_running_and_the_next_one_goes_on(coordinator: ToyCoordinator, tmp_path: Path):
    coordinator.judging = False
    daemon = await DaemonProcess.start(coordinator, tmp_path / "box", "--duty", "0.3")
    await daemon.until(state="training", pending=1, step=lambda step: step)
    family = children_of(daemon.process.pid)
    assert len(family) >= 2
    daemon.process.kill()
    await daemon.process.wait()
    await all_gone(family)

    coordinator.judging = True
    again = await DaemonProcess.start(coordinator, tmp_path / "box", "--duty", "0.3")
    await again.until(state="training", accepted=lambda count: count >= 2)
    assert "this box was probed before" in again.words()
    assert "starts from local, epoch 1" in again.words() or "starts from kept, epoch 1" in again.words()
    again.process.send_signal(signal.SIGTERM)
    assert await again.ended() == 0
    lineage = next(iter(coordinator.accepted.values()))
    assert [record.epoch for record in lineage] == list(range(1, len(lineage) + 1))


async def test_full_disk_is_one_sentence_and_work_goes_on_when_there_is_space(coordinator: ToyCoordinator, tmp_path: Path):
    with small_disk(tmp_path / "small", "4m") as disk:
        daemon = await DaemonProcess.start(coordinator, disk / "box", "--duty", "0.5")
        status = await daemon.until(state="training", accepted=lambda count: count >= 1)
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (disk_free(disk) - 20_000))
        status = await daemon.until(problem=lambda text: text and "no space left" in text)
        assert status["problem"].count("\n") == 0
        assert str(disk) in status["problem"]
        assert daemon.process.returncode is None
        ballast.unlink()
        await daemon.until(problem=None, accepted=lambda count: count > status["accepted"])
        await ask(daemon.state, "leave")
        assert await daemon.ended() == 0, daemon.words()
