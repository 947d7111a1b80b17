"""The trainer child: a real process that is killed, stopped, held, slowed and starved of disk."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from lutetia.node.assignment import EXIT_CODES
from lutetia.node.messages import Exit
from lutetia.node.workfolder import Resume, WorkFolder, resume_point

from .small_disk import disk_free, small_disk
from .tiny_run import TinyRun, hear, make_run, start_trainer
from .toy_coordinator import all_gone

pytestmark = pytest.mark.timeout(600)  # seconds each on a quiet machine, minutes on a busy one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), epochs=2, steps=40)


def files(work: WorkFolder, epoch: int) -> dict[str, bytes]:
    return {name: (work.epoch_folder(epoch) / f"{name}.safetensors").read_bytes() for name in ("weights", "state", "trace")}


async def train_through(run: TinyRun, work: WorkFolder, **fields) -> None:
    """From wherever `work` stands to the end of the budget."""
    place = resume_point(0, None, work.kept(), work.local())
    child = await start_trainer(run.assignment(work, **of(work, place), **fields))
    await hear(child, "checkpoint")
    while len(work.kept()) < run.manifest.epochs:
        await hear(child, "checkpoint")
    assert await child.stop(20) == 0


def of(work: WorkFolder, place: Resume) -> dict:
    """An assignment's fields for a resume point whose files still lie in the work folder."""
    fields: dict = {"epoch": place.epoch, "parent": place.parent, "local": place.local}
    if place.kept:
        folder = work.epoch_folder(place.epoch)
        fields |= {"weights": folder / "weights.safetensors", "state": folder / "state.safetensors"}
    return fields


@pytest.fixture(scope="module")
def uninterrupted(run: TinyRun) -> WorkFolder:
    work = run.work("uninterrupted")
    asyncio.run(train_through(run, work))
    return work


async def test_killed_at_random_steps_and_resumed_ends_with_equal_bytes(run: TinyRun, uninterrupted: WorkFolder):
    chance = random.Random(7)
    work = run.work("killed")
    kills = 0
    while kills < 4 and len(work.kept()) < run.manifest.epochs:
        place = resume_point(0, None, work.kept(), work.local())
        child = await start_trainer(run.assignment(work, **of(work, place), save_every=0.001))
        for _ in range(chance.randrange(1, 6)):
            await hear(child, "saved")
        await asyncio.sleep(chance.random() * 0.02)  # anywhere in a step or in the middle of a write
        await child.kill()
        kills += 1
    assert kills >= 2
    if len(work.kept()) < run.manifest.epochs:
        await train_through(run, work)
    for epoch in (1, 2):
        assert files(work, epoch) == files(uninterrupted, epoch)
    assert work.kept() == uninterrupted.kept()
    assert not list(work.path.glob("**/.*.part"))


async def test_checkpoints_form_a_chain_and_training_goes_straight_on(run: TinyRun, uninterrupted: WorkFolder):
    first, second = uninterrupted.kept()
    assert (first.epoch, first.parent, second.epoch, second.parent) == (1, None, 2, first.digest)
    assert second.samples == run.manifest.samples_per_shard
    assert all(ref.size > 0 for ref in second.refs)


async def test_held_at_its_epoch_until_allowed_on(run: TinyRun):
    work = run.work("held")
    child = await start_trainer(run.assignment(work, until=1))
    await hear(child, "progress", waiting=True, epoch=1)
    assert [kept.epoch for kept in work.kept()] in ([1], [])
    await child.send({"do": "allow", "until": 2})
    await hear(child, "progress", waiting=True, epoch=2)
    assert await child.stop(20) == 0
    assert [kept.epoch for kept in work.kept()] == [1, 2]


async def test_stop_saves_the_place_and_progress_says_where_it_is(run: TinyRun):
    work = run.work("stopped")
    child = await start_trainer(run.assignment(work, duty=0.05))
    ready = await hear(child, "ready")
    assert (ready["epoch"], ready["step"], ready["device"]) == (0, 0, "cpu")
    progress = await hear(child, "progress", epoch=0)
    while progress["step"] < 2:
        progress = await hear(child, "progress", epoch=0)
    assert progress["samples"] == progress["step"] * 4
    assert progress["loss"] > 0
    await child.send({"do": "stop", "save": True})
    assert (await hear(child, "exit"))["reason"] == "stopped"
    assert await child.stop(20) == EXIT_CODES["stopped"]
    local = work.local()
    assert local is not None
    assert local.step >= progress["step"]


async def test_duty_leaves_the_processor_to_its_owner(run: TinyRun):
    work = run.work("lazy")
    child = await start_trainer(run.assignment(work, duty=0.2, until=1))
    await hear(child, "ready")
    start, before = time.monotonic(), cpu_seconds(child.process.pid)
    await hear(child, "progress", waiting=True)
    share = (cpu_seconds(child.process.pid) - before) / (time.monotonic() - start)
    await child.kill()
    assert share < 0.45


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_bad_shard_and_bad_state_are_told_apart(run: TinyRun, tmp_path: Path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no tensors here")
    work = run.work("bad")
    cases: list[tuple[dict, Exit]] = [
        ({"data": junk}, "bad-shard"),
        ({"epoch": 1, "weights": junk, "state": junk}, "bad-state"),
    ]
    for fields, reason in cases:
        child = await start_trainer(run.assignment(work, **fields))
        message = await hear(child, "exit")
        assert message["reason"] == reason, message
        assert message["text"].count(".") <= 3
        assert await child.stop(10) == EXIT_CODES[reason]


async def test_two_starts_share_nothing_but_the_folder_and_terminate_signals_are_for_the_daemon(run: TinyRun):
    child = await start_trainer(run.assignment(run.work("signals")))
    await hear(child, "ready")
    child.process.send_signal(signal.SIGTERM)
    child.process.send_signal(signal.SIGINT)
    await hear(child, "checkpoint")
    await child.kill()


async def test_full_disk_loses_nothing_and_goes_on_when_there_is_space(run: TinyRun, uninterrupted: WorkFolder, tmp_path: Path):
    with small_disk(tmp_path / "small", "2m") as disk:
        work = WorkFolder(disk, run.manifest.run_id, 0)
        work.path.mkdir()
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (disk_free(disk) - 60_000))
        child = await start_trainer(run.assignment(work))
        said = await hear(child, "disk", full=True)
        assert str(work.path) in said["text"]
        assert "no space left" in said["text"]
        assert not list(work.path.glob("epoch-*")), "nothing half-written"
        ballast.unlink()
        await hear(child, "disk", full=False)
        while len(work.kept()) < 2:
            await hear(child, "checkpoint")
        assert await child.stop(20) == 0
        for epoch in (1, 2):
            assert files(work, epoch) == files(uninterrupted, epoch)


async def test_ends_with_its_parent_even_while_it_imports():
    script = """
        import asyncio
        from lutetia.system.process import Child
        async def main():
            child = await Child.start('lutetia.node.trainer')
            print(child.process.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(script), stdout=subprocess.PIPE)
    assert parent.stdout
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    await all_gone({pid})
