"""The daemon as real processes with real libp2p on loopback; the coordinator runs in the test."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from lutetia.node.control import ask
from lutetia.node.journal import NodeJournal
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder, resume_point
from lutetia.protocol.schema.records import claim_key, node_key
from tests.node.scripted_coordinator import (
    DaemonProcess,
    ScriptedCoordinator,
    all_gone,
    children_of,
    eventually,
    running,
    scripted_coordinator,
)
from tests.node.small_disk import fill, small_disk
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)  # seconds each on a quiet machine, minutes on a busy one


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[ScriptedCoordinator]:
    run = make_run(tmp_path / "run", epochs=50, steps=100, heartbeat=2.0)
    async with scripted_coordinator(run, tmp_path / "coordinator") as coordinator:
        yield coordinator


def child(daemon: DaemonProcess, name: str) -> set[int]:
    return {pid for pid in running(children_of(daemon.process.pid)) if psutil.Process(pid).name().startswith(name)}


async def test_daemon_life_from_join_to_leave(coordinator: ScriptedCoordinator, tmp_path: Path):
    opening = datetime.now() + timedelta(hours=12)
    hours = f"{opening:%H:%M}-{opening + timedelta(minutes=1):%H:%M}"
    async with DaemonProcess.running(coordinator, tmp_path / "node", "--duty", "0.5", "--hours", hours) as daemon:
        status = await daemon.until(state="paused", reason="outside its hours")
        assert 11 * 3600 < status["paused_until"] - time.time() <= 12 * 3600
        await ask(daemon.state, "resume")
        status = await daemon.until(state="training", step=lambda step: step)
        assert status["paused_until"] is None
        assert status["device"] == "cpu"
        assert status["precision"] == "float32: CPU"
        assert "secret key" in daemon.log_text()
        await daemon.until(accepted_today=lambda count: count >= 1, blobs_bytes=lambda size: size)
        journal = NodeJournal.model_validate(await ask(daemon.state, "journal"))
        assert (journal.verdicts[0].outcome, journal.verdicts[0].shard) == ("accepted", status["shard"])
        assert journal.losses
        assert any("joining run" in line for line in journal.log)
        await pause_and_resume(coordinator, daemon, status["shard"])
        await finish(coordinator, daemon)


async def pause_and_resume(coordinator: ScriptedCoordinator, daemon: DaemonProcess, shard: int) -> None:
    trainer = child(daemon, "trainer")
    await ask(daemon.state, "pause")
    await daemon.until(state="paused", shard=None)
    await eventually(lambda: claims_are(coordinator, shard, "released"))
    await all_gone(trainer)
    await ask(daemon.state, "resume")
    await daemon.until(state="training", shard=shard, step=lambda step: step)


async def claims_are(coordinator: ScriptedCoordinator, shard: int, state: str) -> bool:
    key = claim_key(coordinator.run.manifest.run_id, shard)
    return [claim.state for claim in await coordinator.records(key)] == [state]


async def finish(coordinator: ScriptedCoordinator, daemon: DaemonProcess) -> None:
    status = await ask(daemon.state, "status")
    family = children_of(daemon.process.pid)
    await ask(daemon.state, "finish")
    assert await daemon.ended() == 0, daemon.log_text()
    assert not running(family)
    key = node_key(coordinator.run.manifest.run_id, status["owner"])
    assert [node.state for node in await coordinator.records(key)] == ["left"]
    assert await claims_are(coordinator, status["shard"], "released")
    accepted = coordinator.accepted[status["shard"]]
    assert len(accepted) <= status["epoch"] + status["pending"] + 2, "it finished the current epoch and no other"
    assert not list(daemon.state.glob("*.sock"))


async def test_killed_daemon_leaves_no_child_and_next_one_resumes(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=50, steps=100, heartbeat=2.0)
    async with contextlib.AsyncExitStack() as stack:
        async with scripted_coordinator(run, tmp_path / "coordinator") as before:
            address = before.ticket.addresses[0].partition("/p2p/")[0]
            daemon = await stack.enter_async_context(DaemonProcess.running(before, tmp_path / "node"))
            await daemon.until(state="training", accepted=lambda count: count >= 1)
        await daemon.until(state="training", pending=lambda count: count >= 2, online=True)
        family = children_of(daemon.process.pid)
        assert len(family) >= 2
        daemon.process.kill()
        await daemon.process.wait()
        await all_gone(family)
    torn = (
        next((tmp_path / "node" / "runs").iterdir()) / ".contributions.json.x.part"
    )  # as a kill in the middle of a write leaves it
    torn.write_bytes(b"{")
    async with scripted_coordinator(run, tmp_path / "coordinator", address) as after:
        after.accepted = before.accepted
        reached = after.epoch
        async with DaemonProcess.running(after, tmp_path / "node") as again:
            await again.until(state="training", accepted=lambda count: count >= reached + 3)
            words = again.log_text()
            assert "using the saved probe result" in words
            assert "starts from local" in words or "starts from kept" in words
            assert not torn.exists()
            again.process.send_signal(signal.SIGTERM)
            assert await again.ended() == 0
    lineage = next(iter(after.accepted.values()))
    assert [record.epoch for record in lineage] == list(range(1, len(lineage) + 1))


async def test_full_disk_is_one_sentence_and_work_resumes(coordinator: ScriptedCoordinator, tmp_path: Path):
    with small_disk(tmp_path / "small", "4m") as disk:
        async with DaemonProcess.running(coordinator, disk / "node") as daemon:
            status = await daemon.until(state="training", accepted=lambda count: count >= 1)
            ballast = fill(disk, leave=20_000)
            status = await daemon.until(problem=lambda text: text and "no space left" in text)
            assert status["problem"].count("\n") == 0
            assert str(disk) in status["problem"]
            assert daemon.process.returncode is None
            ballast.unlink()
            await daemon.until(problem=None, accepted=lambda count: count > status["accepted"])
            ballast = fill(disk, leave=20_000)
            status = await daemon.until(problem=lambda text: text and "no space left" in text)
            for pid in child(daemon, "trainer"):  # the process that waits for disk space is gone
                os.kill(pid, signal.SIGKILL)
            ballast.unlink()
            await daemon.until(problem=None, accepted=lambda count: count > status["accepted"])
            await ask(daemon.state, "leave")
            assert await daemon.ended() == 0, daemon.log_text()


async def test_two_devices_train_two_shards_under_one_identity(coordinator: ScriptedCoordinator, tmp_path: Path):
    """Two parts of the processor stand for two cards: each has a child process of its own, and one may fail or pause alone."""
    cards = ("--device", "cpu:0,cpu:1", "--threads", "cpu:0=1,cpu:1=1")
    async with DaemonProcess.running(coordinator, tmp_path / "node", *cards) as daemon:
        first, second = await both_train(daemon)
        assert {first["shard"], second["shard"]} == {0, 1}
        [record] = [node for node in await coordinator.records(await own_key(coordinator, daemon)) if node.shard is not None]
        assert {(one.device, one.state, one.shard) for one in record.devices} == {
            (each["device"], "training", each["shard"]) for each in (first, second)
        }
        [owner] = {claim.owner for shard in (0, 1) for claim in await coordinator.records(key_of(coordinator, shard))}
        assert owner == record.owner

        before = child(daemon, "trainer")
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        await daemon.until(devices=lambda each: any(one["problem"] and "signal 9" in one["problem"] for one in each))
        await both_train(daemon)
        assert child(daemon, "trainer") & before == before - {killed}, "the other device's process goes on"
        assert "killed by signal 9" in daemon.log_text()

        await ask(daemon.state, "pause", device="1")
        paused = await daemon.until(devices=lambda each: each[1]["state"] == "paused")
        assert paused["devices"][0]["state"] == "training"
        assert await claims_are(coordinator, second["shard"], "released")
        assert await claims_are(coordinator, first["shard"], "training")
        await ask(daemon.state, "resume", device="cpu:1")
        await both_train(daemon)
        family = children_of(daemon.process.pid)
        daemon.process.kill()
        await daemon.process.wait()
        await all_gone(family)
    begun = sum(has_begun_an_epoch(coordinator, daemon.state, shard) for shard in (0, 1))
    async with DaemonProcess.running(coordinator, tmp_path / "node", *cards) as again:
        await both_train(again)
        words = again.log.read_text().rpartition("joining run")[2]
        assert words.count("starts from local") + words.count("starts from kept") >= begun, "what it had done is not lost"
        await ask(again.state, "finish")
        assert await again.ended() == 0, again.log_text()
    for lineage in coordinator.accepted.values():
        assert [record.epoch for record in lineage] == list(range(1, len(lineage) + 1))
    assert {record.owner for lineage in coordinator.accepted.values() for record in lineage} == {owner}


async def both_train(daemon: DaemonProcess) -> list[dict[str, Any]]:
    status = await daemon.until(
        devices=lambda each: len(each) == 2 and all(one["state"] == "training" and one["step"] for one in each)
    )
    return status["devices"]


def has_begun_an_epoch(coordinator: ScriptedCoordinator, state: Path, shard: int) -> bool:
    """Whether the node has work of its own on the shard's accepted epoch; none right after an acceptance."""
    run, accepted = coordinator.run.manifest.run_id, coordinator.accepted.get(shard, [])
    [work] = state.glob("runs/*/work")
    folder = CheckpointFolder(work, run, shard)
    digest = accepted[-1].digest if accepted else None
    return resume_point(len(accepted), digest, folder.kept(), folder.local()).source != "base"


async def own_key(coordinator: ScriptedCoordinator, daemon: DaemonProcess) -> str:
    return node_key(coordinator.run.manifest.run_id, (await ask(daemon.state, "status"))["owner"])


def key_of(coordinator: ScriptedCoordinator, shard: int) -> str:
    return claim_key(coordinator.run.manifest.run_id, shard)
