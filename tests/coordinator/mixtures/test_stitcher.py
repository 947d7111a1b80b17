"""When a mixture is made, and from what: never from epochs that were rolled back, and only when their blobs are here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lutetia.coordinator.acceptance.messages import LedgerFacts
from lutetia.coordinator.ledger.events import AcceptanceRecovered, MixtureStitched
from lutetia.coordinator.mixtures import stitcher
from lutetia.coordinator.mixtures.archive import MixtureArchive
from lutetia.coordinator.mixtures.stitcher import Measuring, Stitcher, next_step
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.worker.messages import Job, MixtureReady, StitchMixture
from lutetia.models.mixing.description import FILE, ExpertEntry, MixtureDocument, SignedMixture, read_mixture
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.files import write_atomic
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge, make_manifest
from tests.coordinator.acceptance.test_intake import PATIENCE, Intake, StrawShop, contents, intake, made_of


@dataclass
class StitchShop(StrawShop):
    """Writes the description of a mixture, without the experts' files."""

    manifest: Manifest = field(default_factory=make_manifest)
    losses: list[float] = field(default_factory=list)
    """Of the mixtures to come: each scores so in all rows."""

    async def ask(self, job: Job[Any], *, limit: float, sign: Any = None) -> Any:
        await super().ask(job, limit=limit)
        if not isinstance(job, StitchMixture):
            return None
        manifest = self.manifest
        document = MixtureDocument(
            name=manifest.name, run=manifest.run_id, manifest=manifest.run_id, manifest_version=1, latent=manifest.latent,
            sampling=manifest.sampling, files={},
            experts=tuple(
                ExpertEntry(
                    name=f"shard {record.shard}", folder=None, class_name="x", prediction="velocity", noise_schedule="linear",
                    prior=1.0, epoch=record.epoch, samples=record.samples, checkpoint=record.checkpoint,
                )
                for record in job.accepted
            ),
        )  # fmt: skip
        write_atomic(job.folder / FILE, canonical(SignedMixture.sign(document, sign)))
        if not self.losses:
            return MixtureReady(digest=document.digest)
        assert job.measure
        rows = tuple(self.losses[0] + 0.001 * row for row in range(16))
        self.losses = self.losses[1:]
        return MixtureReady(digest=document.digest, losses=rows, routing="top1, as the manifest says")


@asynccontextmanager
async def stitching_room(root: Path, epochs: int = 1, losses: Sequence[float] = ()) -> AsyncIterator[tuple[Intake, StitchShop]]:
    """A run of one shard. Its mixture is made at the end, or after every epoch if their `losses` are given."""
    async with intake(root, shards=1, epochs=epochs) as room:
        shop = StitchShop(manifest=room.manifest, losses=list(losses))
        archive = MixtureArchive(RunFolder(root).mixtures, room.tools.blobs, [])
        stitcher = Stitcher(
            RunFolder(root), room.manifest, COORDINATOR, room.tools.blobs, room.bench,
            shop, time.time, "refresh" if losses else "end", 0.0 if losses else 3600.0, False, archive,  # pyright: ignore[reportArgumentType]
            measuring=Measuring("secret", 10.0, True) if losses else None,
        )  # fmt: skip
        before = room.bench.changed

        def changed(run: Any) -> None:
            before(run)
            stitcher.wake()

        room.bench.changed = changed
        working = asyncio.create_task(stitcher.run())
        try:
            yield room, shop
            assert not working.done(), working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


@pytest.mark.timeout(120)
async def test_epoch_convicted_during_the_stitch_is_not_in_the_mixture(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "lutetia.coordinator.mixtures.stitcher")
    async with stitching_room(tmp_path) as (room, shop):
        gate, room.tools.found = shop.gate("stitch", -1), "invalid"
        faked = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("faked")))
        await room.offer(faked)
        await asyncio.wait_for(gate.reached.wait(), PATIENCE)
        room.tools.replays.set()
        await room.until(lambda run: run.shards[0].term == 1)
        room.tools.found = "valid"
        gate.opened.set()
        honest = made_of(room.manifest, PEERS[1], await room.peer(PEERS[1], *contents("honest")))
        await room.offer(honest)
        run = await room.until(lambda run: run.finished)
        held = read_mixture(RunFolder(tmp_path).mixture).mixture
        assert [expert.checkpoint for expert in held.experts] == [honest.digest]
        assert run.mixture
        assert run.mixture.mixture == held.digest
    assert f"all budgets are done; the mixture is {RunFolder(tmp_path).mixture}: lutetia generate PROMPT" in caplog.text


def test_mixture_of_rolled_back_epochs_is_not_recorded():
    c = drive_judge(shards=1, epochs=1)
    c.accept(PEERS[0])
    stitched = MixtureStitched(time=START, epochs=(1,), terms=c.state.run.terms, mixture="a" * 64)
    c.finish_audit("invalid")
    c.send(LedgerFacts((stitched,), c.now))
    c.accept(PEERS[1])
    c.finish_audit("valid")
    assert c.state.run.mixture is None
    assert next_step(c.state.run, when="end", rested=False) == "mixture"
    c.send(LedgerFacts((stitched.model_copy(update={"terms": (1,)}),), c.now))
    assert next_step(c.state.run, when="end", rested=False) == "finish"


def test_stitch_events_of_earlier_versions_have_no_terms():
    c = drive_judge(shards=1, epochs=1)
    c.accept(PEERS[0])
    c.finish_audit("valid")
    c.send(LedgerFacts((MixtureStitched(time=START, epochs=(1,), mixture="a" * 64),), c.now))
    assert next_step(c.state.run, when="end", rested=False) == "finish"


class LogWatch(logging.Handler):
    """Sets `seen` when a line with `words` is logged."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.seen = words, asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.seen.set()


@pytest.mark.timeout(120)
async def test_recovered_acceptance_is_stitched_once_its_weights_are_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stitcher, "_RETRY_SECONDS", 0.05)
    watch = LogWatch("could not make the mixture: blob ")
    logging.getLogger("lutetia.coordinator.mixtures.stitcher").addHandler(watch)
    try:
        async with stitching_room(tmp_path) as (room, _):
            weights, state, trace = await room.peer(PEERS[0], *contents("lost"))
            record = made_of(room.manifest, PEERS[0], [weights, state, trace])
            given = AcceptanceRecord(
                run=record.run, owner=COORDINATOR.public_key, issued=record.issued, shard=0, epoch=1, checkpoint=record.digest,
                parent=None, weights=weights, state=state, samples=record.samples, author=record.owner, tenure_until=0.0,
                holdout_loss=0.4,
            )  # fmt: skip
            await room.bench.append(AcceptanceRecovered(time=time.time(), acceptance=given))
            await asyncio.wait_for(watch.seen.wait(), PATIENCE)
            room.tools.blobs.add_bytes(contents("lost")[0])
            run = await room.until(lambda run: run.finished)
            assert run.mixture
    finally:
        logging.getLogger("lutetia.coordinator.mixtures.stitcher").removeHandler(watch)


@pytest.mark.timeout(120)
async def test_worse_mixture_is_kept_and_a_later_better_one_becomes_current(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "lutetia.coordinator.mixtures.stitcher")
    folder, epochs = RunFolder(tmp_path), [0.5, 0.7, 0.4]
    async with stitching_room(tmp_path, len(epochs), epochs) as (room, _):
        room.tools.replays.set()
        record, current = None, []
        texts = [text for number in range(len(epochs)) for text in contents(f"epoch {number}")]
        refs = await room.peer(PEERS[0], *texts)
        for number in range(1, len(epochs) + 1):
            blobs = refs[3 * number - 3 : 3 * number]
            record = made_of(room.manifest, PEERS[0], blobs, epoch=number, parent=record and record.digest)
            await room.offer(record)
            run = await room.until(lambda run, number=number: run.stitched is not None and run.stitched.epochs == (number,))
            assert run.mixture
            current.append(run.mixture.epochs[0])
            assert [expert.epoch for expert in read_mixture(folder.mixture).mixture.experts] == [current[-1]]
            assert read_mixture(folder.mixture).mixture.digest == run.mixture.mixture
        assert current == [1, 1, 3]
        stitched = [row.event() for row in room.bench.ledger.rows() if '"mixture-stitched"' in row.text]
        assert [event.current for event in stitched if isinstance(event, MixtureStitched)] == [True, False, True]
        assert len(list(folder.mixtures.glob("*.json"))) == len(epochs), "all stay addressable"
        assert not folder.next_mixture.exists()
    assert "it is kept, and not current: held-out loss 0.7075 after 0.5075 on 16 equal rows" in caplog.text
    assert "top1, as the manifest says" in caplog.text
