"""A trainer process of two devices that train one expert: real processes, probed, killed and resumed."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import psutil

from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.node.trainer.messages import AllowTraining, StopTraining
from lutetia.node.trainer.probe import ProbeQuestion, probe
from lutetia.system.files import sweep_parts
from tests.node.scripted_coordinator import all_gone, children_of
from tests.node.tiny_run import make_run, next_message, trainer_process

UNIT = "cpu:0+cpu:1"


async def test_killed_rank_ends_the_unit_and_the_next_goes_on_from_its_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=3, steps=8)
    work = run.work("node")
    async with trainer_process(run.assignment(work, device=UNIT, micro_batch=1, until=1)) as child:
        assert (await next_message(child, "ready"))["device"] == UNIT
        kept = KeptCheckpoint.model_validate((await next_message(child, "checkpoint"))["kept"])
        assert (kept.epoch, kept.made.device, kept.made.micro_batch) == (1, "cpu", 1)
        ranks = children_of(child.process.pid)
        assert len(ranks) == 1
        psutil.Process(next(iter(ranks))).send_signal(signal.SIGKILL)
        async with asyncio.timeout(60):
            assert await child.process.wait() == 70
        await all_gone(ranks)
    assert list(run.folder.glob(".unit.*.part")), "by which the ranks met"
    sweep_parts(run.folder)  # as a node does when it starts
    assert not list(run.folder.glob(".unit.*"))
    folder = work.epoch_folder(1)
    again = run.assignment(
        work, device=UNIT, micro_batch=1, epoch=1, parent=kept.digest, until=2,
        weights=folder / "weights.safetensors", state=folder / "state.safetensors",
    )  # fmt: skip
    async with trainer_process(again) as child:
        assert (await next_message(child, "checkpoint"))["kept"]["epoch"] == 2
        ranks = children_of(child.process.pid)
        await child.send(AllowTraining(until=3).to_wire())
        await next_message(child, "progress", epoch=2, waiting=False)
        await child.send(StopTraining(save=True).to_wire())
        assert (await next_message(child, "exit"))["reason"] == "stopped"
        assert await child.process.wait() == 0
        await all_gone(ranks)
    assert not list(run.folder.glob(".unit.*")), "nothing is left where it was not killed"


async def test_probe_tries_a_unit_on_all_its_cards(tmp_path: Path):
    run = make_run(tmp_path / "run")
    question = ProbeQuestion(manifest=run.manifest_file, device=UNIT, threads=1, free_disk=10**12)
    found = await asyncio.to_thread(probe, question)
    assert found.device == found.hardware.device == UNIT
    assert found.samples_per_second > 0
    assert {(fit.fitness, fit.micro_batch) for fit in found.shards.values()} == {(1.0, 2)}, "half of the batch on each"
