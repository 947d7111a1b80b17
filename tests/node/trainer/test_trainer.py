"""The trainer process: killed, stopped, held, slowed, and on a full disk."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal

import pytest

from lutetia.node.trainer.assignment import EXIT_CODES
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder, LocalState, ResumePoint, resume_point
from lutetia.node.trainer.checkpoint_writer import CheckpointWriter
from lutetia.node.trainer.exit_reasons import TrainerEnded
from lutetia.node.trainer.loop import build, manifest_of_epoch
from lutetia.node.trainer.messages import AllowTraining, DataArrived, SetDutyCycle, StopTraining
from lutetia.system.forked import TEMPLATE
from lutetia.system.process import Child
from tests.node.scripted_coordinator import all_gone
from tests.node.small_disk import fill, small_disk
from tests.node.tiny_run import TinyRun, make_run, next_message, raise_budget, trainer_process

pytestmark = pytest.mark.timeout(600)  # seconds each on a quiet machine, minutes on a busy one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), epochs=2, steps=40)


def files(work: CheckpointFolder, epoch: int) -> dict[str, bytes]:
    return {name: (work.epoch_folder(epoch) / f"{name}.safetensors").read_bytes() for name in ("weights", "state", "trace")}


async def train_through(run: TinyRun, work: CheckpointFolder) -> None:
    """Train from the newest state in `work` to the end of the budget."""
    place = resume_point(0, None, work.kept(), work.local())
    async with trainer_process(run.assignment(work, **of(work, place))) as child:
        await next_message(child, "progress", waiting=True)
        assert await child.stop(60) == 0
    assert len(work.kept()) == run.manifest.epochs


def of(work: CheckpointFolder, place: ResumePoint) -> dict:
    """Fields of an assignment for a resume point whose files are in the work folder."""
    fields: dict = {"epoch": place.epoch, "parent": place.parent, "local": place.local}
    if place.kept:
        folder = work.epoch_folder(place.epoch)
        fields |= {"weights": folder / "weights.safetensors", "state": folder / "state.safetensors"}
    return fields


@pytest.fixture(scope="module")
def uninterrupted(run: TinyRun) -> CheckpointFolder:
    work = run.work("uninterrupted")
    asyncio.run(train_through(run, work))
    return work


async def test_killed_and_resumed_training_gives_equal_bytes(run: TinyRun, uninterrupted: CheckpointFolder):
    chance = random.Random(7)
    work = run.work("killed")
    for _ in range(3):
        place = resume_point(0, None, work.kept(), work.local())
        async with trainer_process(run.assignment(work, **of(work, place), save_every=0.001, duty=0.3)) as child:
            await some_saves(child, chance.randrange(1, 6))
            await asyncio.sleep(chance.random() * 0.02)  # anywhere in a step or in the middle of a write
            await child.kill()
    await train_through(run, work)
    for epoch in (1, 2):
        assert files(work, epoch) == files(uninterrupted, epoch)
    assert work.kept() == uninterrupted.kept()
    assert not list(work.path.glob("**/.*.part"))


async def some_saves(child: Child, count: int) -> None:
    async for message in child.messages():
        count -= message["say"] == "saved"
        if not count or message.get("waiting"):
            return


async def test_training_waits_for_parts_of_its_data_and_equals_training_on_all(
    run: TinyRun, uninterrupted: CheckpointFolder, tmp_path: Path
):
    """A trainer that waits can be stopped, and goes on as soon as the part is there."""
    index, work = tmp_path / run.data(0).name, run.work("waiting")
    shutil.copy(run.data(0), index)
    index.with_suffix("").mkdir()
    first = run.assignment(work, data=index)
    async with trainer_process(first) as child:
        await next_message(child, "waiting")
        await child.send(StopTraining(save=True).to_wire())
        assert await child.process.wait() == EXIT_CODES["stopped"]
    asked: list[int] = []
    async with trainer_process(first) as child:
        async for message in child.messages():
            if message["say"] == "waiting" and message["part"] not in asked:
                asked.append(message["part"])
                name = f"{asked[-1]:04d}.safetensors"
                shutil.copy(run.data(0).with_suffix("") / name, tmp_path / name)
                (tmp_path / name).rename(index.with_suffix("") / name)
                await child.send(DataArrived().to_wire())
            if message.get("waiting"):
                break
        assert await child.stop(60) == 0
    assert sorted(asked) == [0, 1, 2]
    assert [files(work, epoch) for epoch in (1, 2)] == [files(uninterrupted, epoch) for epoch in (1, 2)]


async def test_checkpoints_form_a_chain_while_training_continues(run: TinyRun, uninterrupted: CheckpointFolder):
    first, second = uninterrupted.kept()
    assert (first.epoch, first.parent, second.epoch, second.parent) == (1, None, 2, first.digest)
    assert second.samples == run.manifest.samples_per_shard
    assert all(ref.size > 0 for ref in second.refs)


async def test_trainer_waits_for_allow_and_ignores_sigterm(run: TinyRun):
    work = run.work("held")
    async with trainer_process(run.assignment(work, until=1)) as child:
        await next_message(child, "progress", waiting=True, epoch=1)
        assert [kept.epoch for kept in work.kept()] in ([1], [])
        os.kill(child.process.pid, signal.SIGTERM)
        os.kill(child.process.pid, signal.SIGINT)
        await child.send(AllowTraining(until=2).to_wire())
        await next_message(child, "progress", waiting=True, epoch=2)
        assert await child.stop(60) == 0
    assert [kept.epoch for kept in work.kept()] == [1, 2]


async def test_stop_saves_and_duty_limits_the_processor(run: TinyRun):
    work = run.work("lazy")
    async with trainer_process(run.assignment(work)) as child:
        ready = await next_message(child, "ready")
        await child.send(SetDutyCycle(share=0.1).to_wire())
        assert (ready["epoch"], ready["step"], ready["device"]) == (0, 0, "cpu")
        start, before = time.monotonic(), cpu_seconds(child.process.pid)
        progress = await next_message(child, "progress", epoch=0)
        while progress["step"] < 10:
            progress = await next_message(child, "progress", epoch=0)
        share = (cpu_seconds(child.process.pid) - before) / (time.monotonic() - start)
        assert share < 0.4
        assert progress["samples"] == progress["step"] * 4
        assert progress["loss"] > 0
        await child.send(StopTraining(save=True).to_wire())
        assert (await next_message(child, "exit"))["reason"] == "stopped"
        assert await child.stop(60) == EXIT_CODES["stopped"]
    local = work.local()
    assert local is not None
    assert local.step >= progress["step"]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_bad_shard_and_bad_state_have_own_exit_reasons(run: TinyRun, tmp_path: Path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no tensors here")
    work = run.work("bad")
    with pytest.raises(TrainerEnded) as caught:
        build(run.assignment(work, epoch=1, weights=junk, state=junk))
    assert caught.value.reason == "bad-state"
    async with trainer_process(run.assignment(work, data=junk)) as child:
        message = await next_message(child, "exit")
        assert message["reason"] == "bad-shard"
        assert str(junk.name) in message["text"]
        assert await child.stop(60) == EXIT_CODES["bad-shard"]


async def test_full_disk_loses_nothing_and_training_resumes(run: TinyRun, uninterrupted: CheckpointFolder, tmp_path: Path):
    with small_disk(tmp_path / "small", "2m") as disk:
        work = CheckpointFolder(disk, run.manifest.run_id, 0)
        work.path.mkdir()
        ballast = fill(disk, leave=60_000)
        async with trainer_process(run.assignment(work)) as child:
            report = await next_message(child, "disk", full=True)
            assert str(work.path) in report["text"]
            assert "no space left" in report["text"]
            assert not list(work.path.glob("epoch-*")), "no incomplete checkpoint"
            ballast.unlink()
            await next_message(child, "disk", full=False)
            while len(work.kept()) < 2:
                await next_message(child, "checkpoint")
            assert await child.stop(60) == 0
        for epoch in (1, 2):
            assert files(work, epoch) == files(uninterrupted, epoch)


async def test_budget_raised_while_stopped_keeps_the_started_epoch(tmp_path: Path):
    """With a cosine schedule: the started epoch is finished under the old budget, the next one uses the new."""
    old = make_run(tmp_path / "run", epochs=2, steps=40)
    whole, cut = old.work("whole"), old.work("cut")
    await train(old, whole, 1)
    async with trainer_process(old.assignment(cut, duty=0.1)) as child:
        await in_the_middle(child)
        await child.send(StopTraining(save=True).to_wire())
        assert await child.stop(60) == 0
    local = cut.local()
    assert local
    assert (local.epoch, local.budget) == (0, 2)
    assert 0 < local.step < 40
    new = raise_budget(old, 4)
    async with trainer_process(new.assignment(cut, local=local, until=2, duty=0.1, save_every=0.001)) as child:
        await next_message(child, "saved")
        await child.kill()  # a second time in the same epoch
    local = cut.local()
    assert local
    assert (local.epoch, local.budget) == (0, 2)
    await train(new, cut, 2)
    await train(new, whole, 2)
    assert [files(cut, epoch) for epoch in (1, 2)] == [files(whole, epoch) for epoch in (1, 2)]
    assert cut.kept() == whole.kept()


async def train(run: TinyRun, work: CheckpointFolder, until: int) -> None:
    place = resume_point(0, None, work.kept(), work.local())
    async with trainer_process(run.assignment(work, **of(work, place), until=until)) as child:
        await next_message(child, "progress", waiting=True, epoch=until)
        assert await child.stop(60) == 0


async def in_the_middle(child: Child) -> None:
    progress = await next_message(child, "progress", epoch=0)
    while progress["step"] < 5:
        progress = await next_message(child, "progress", epoch=0)


def saved_state(run: TinyRun) -> tuple[CheckpointFolder, LocalState]:
    """A local state after three steps of the first epoch."""
    work = run.work("saved")
    trainer = build(run.assignment(work))
    for _ in range(3):
        trainer.step()
    work.path.mkdir(parents=True)
    writer = CheckpointWriter(work, None, lambda message: None)
    assert writer.submit(trainer.snapshot(), whole=False, budget=run.manifest.epochs)
    assert writer.close()
    local = work.local()
    assert local
    return work, local


@pytest.mark.parametrize(("schedule", "raised", "step"), [("cosine", True, 0), ("cosine", False, 3), ("constant", True, 3)])
def test_local_state_without_a_budget_counts_if_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: Literal["constant", "cosine"], raised: bool, step: int
):
    """Older software wrote no budget to `local.json`."""
    run = make_run(tmp_path / "run", schedule=schedule)
    work, local = saved_state(run)
    run = raise_budget(run, 4) if raised else run
    trainer = build(run.assignment(work, local=local.model_copy(update={"budget": None})))
    assert trainer.step_in_epoch == step
    assert ("does not name its epoch budget" in caplog.text) == (step == 0)


def test_damaged_local_state_starts_the_epoch_again(tmp_path: Path):
    run = make_run(tmp_path / "run")
    work, local = saved_state(run)
    run = raise_budget(run, 4)
    assert manifest_of_epoch(build(run.assignment(work, local=local)), local).epochs == 2
    (work.path / local.file).write_bytes(b"no tensors here")
    assert manifest_of_epoch(build(run.assignment(work, local=local)), local) == run.manifest


async def test_trainer_dies_with_its_parent_while_importing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TEMPLATE)  # a forked one has nothing to import
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
