"""A coordinator that lends its checks, and borrowers that tests drive by hand. A network in memory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lutetia.coordinator.acceptance.checks import CheckFailed
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.ledger.events import CheckerRefuted, Event, HoldoutBurnt, LentCheckCounted, PeerPardoned, ResultSeen
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.stalls import ShardFacts, shard_stall
from lutetia.coordinator.lending.reserve import Reserve
from lutetia.coordinator.lending.runner import LentCheckRunner, NoWorker
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.worker.messages import SizesMeasured
from lutetia.models.data.parts.index import IndexDocument, PartSpec, ShardIndex, write_index
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer, RateLimit
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.check_request import (
    KINDS,
    CheckAnswer,
    CheckJob,
    CheckReport,
    CheckRequest,
    ask_check,
    sign_check_report,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.system.errors import UnreachableError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge, make_manifest, make_record
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

PART = b"clips that only borrowers may see"
SLICES = [b"two held-out clips", b"two others"]
ROWS = tuple(1 + row / 10 for row in range(8))
ANN, BEN, EVE, DAN = (Identity.derived(name) for name in ("ann", "ben", "eve", "dan"))


@dataclass
class Site:
    """The coordinator. `named`: the setting checkers."""

    folder: Path
    named: tuple[Identity, ...] = ()
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        held = BlobStore(self.folder / "holdouts")
        manifest, slices = make_manifest(), tuple(held.add_bytes(data) for data in SLICES)
        self.part = held.add_bytes(PART)
        document = IndexDocument(latent=manifest.latent, split="holdout", parts=(PartSpec(blob=self.part, clips=16, texts=1),))
        write_index(self.folder / "index", ShardIndex(document, np.zeros(16, np.int32)))
        holdout = held.add_file(self.folder / "index", move=True)
        shards = tuple(shard.model_copy(update={"holdout": holdout, "holdout_clips": 16}) for shard in manifest.shards)
        self.manifest = manifest.model_copy(update={"shards": shards})
        self.network = MemoryNetwork()
        self.check = record_check(self.manifest, self.network.now)
        self.transport = self.network.peer(COORDINATOR, self.check)
        self.run: RunState = drive_judge().state.run
        self.lender = CheckLender(
            self.transport, lambda: self.manifest, lambda: self.run, list, lambda: None, self.append,
            frozenset(identity.public_key for identity in self.named),
        )  # fmt: skip
        self.blobs, self.incoming = BlobStore(self.folder / "blobs"), BlobStore(self.folder / "incoming")
        none: Any = NoWorker()
        sizes = SizesMeasured(weights={0: (1, 1)}, state={0: (1, 1)})
        self.runner = LentCheckRunner(
            self.transport, self.manifest, self.blobs, self.incoming, none, none, 65536.0, Holdouts(held, b"secret"),
            lender=self.lender, sizes=sizes, reserve=Reserve(clips=2, shards=(slices,) * len(shards)),
        )  # fmt: skip
        refs: dict[str, Any] = {name: self.incoming.add_bytes(name.encode()) for name in ("weights", "state", "trace")}
        self.record: CheckpointRecord = make_record(self.manifest, PEERS[0], **refs)

    async def append(self, event: Event) -> None:
        self.events.append(event)
        self.run = apply(self.run, event)

    async def serve(self) -> None:
        await self.lender.serve()
        await self.transport.serve(BLOB, BlobServer(self.blobs, RateLimit(None), self.lender.lent_store).answer)

    def borrower(self, identity: Identity) -> Borrower:
        return Borrower(self, identity)


@dataclass
class Borrower:
    site: Site
    identity: Identity

    def __post_init__(self) -> None:
        self.transport = self.site.network.peer(self.identity, self.site.check)

    async def ask(self) -> CheckAnswer:
        request = CheckRequest(owner=self.identity.public_key, kinds=KINDS, shards=(0,))
        return await ask_check(self.transport, self.site.transport.peer_id, request)

    async def job(self) -> CheckJob:
        answer = await self.ask()
        assert answer.job is not None, answer.text
        return answer.job

    async def report(self, job: CheckJob, factor: float = 1.0, **fields: Any) -> CheckAnswer:
        rows = {"parent": ROWS, "averages": tuple(row * factor for row in ROWS), "raw": ROWS}
        report = CheckReport(
            run=self.site.manifest.run_id, owner=self.identity.public_key, id=job.id,
            **{"outcome": "done", "seconds": 1e6, **rows, **fields},
        )  # fmt: skip
        return await ask_check(self.transport, self.site.transport.peer_id, sign_check_report(report, self.identity))

    async def fetch(self, ref: BlobRef) -> bytes:
        store = BlobStore(self.site.folder / f"borrowed by {self.identity.public_key[:8]}")
        path = await fetch_blob(self.transport, store, ref, [Provider(self.site.transport.peer_id, ())])
        return path.read_bytes()


def play(site: Site, scenario: Callable[[asyncio.Task[None]], Awaitable[None]]) -> None:
    async def main() -> None:
        await site.serve()
        checking = asyncio.create_task(site.runner.inspect(site.record))
        await asyncio.sleep(0.1)
        await scenario(checking)
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)

    run_virtual(main, START)


def test_two_agreeing_reports_are_the_losses_of_the_result(tmp_path: Path):
    site = Site(tmp_path, (ANN, BEN))

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann, ben = site.borrower(ANN), site.borrower(BEN)
        jobs = [await ann.job(), await ben.job()]
        assert jobs[0].id != jobs[1].id, "borrowers cannot find each other"
        assert jobs[0].result == jobs[1].result
        assert (await ann.job()).id == jobs[0].id
        await ann.report(jobs[0], 0.9)
        assert not checking.done()
        await ben.report(jobs[1], 0.9)
        await checking
        assert await site.runner.losses(site.record) == pytest.approx([0.9 * row for row in ROWS])
        assert await site.runner.parent_losses(site.record, None) == list(ROWS)
        assert 0 < site.lender.usual["result"] < 5.0, "by the coordinator's clock"
        await site.runner.inspect(site.record)  # tried again, it is not lent again
        assert not site.lender.desk.checks

    play(site, scenario)
    [event] = site.events  # the clips are not used up: their borrowers are named
    assert isinstance(event, LentCheckCounted)
    assert (event.owners, event.samples) == ((ANN.public_key, BEN.public_key), len(ROWS)), "scored three times"
    assert {owner: shards[0].audits for owner, shards in site.run.credit.items()} == dict.fromkeys(event.owners, len(ROWS))


def test_held_out_clips_go_to_their_borrowers_alone(tmp_path: Path):
    site = Site(tmp_path, (ANN, BEN))

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann, ben, eve = site.borrower(ANN), site.borrower(BEN), site.borrower(EVE)
        answer = await eve.ask()
        assert answer.job is None
        assert "named others" in answer.text
        held = site.manifest.shards[0].holdout
        for stranger in (eve, ben):
            with pytest.raises(UnreachableError):
                await stranger.fetch(held)
        job = await ann.job()
        assert job.result is not None
        assert job.result.holdout == held
        for ref in (held, site.part):
            with pytest.raises(UnreachableError):
                await ben.fetch(ref)
        assert len(await ann.fetch(held)) == held.size
        assert await ann.fetch(site.part) == PART, "the parts that the index lists"
        assert await ann.fetch(site.record.weights) == b"weights"
        await ann.report(job)
        with pytest.raises(UnreachableError):
            await ann.fetch(site.record.state)

    play(site, scenario)


def test_strangers_get_clips_of_the_reserve_once(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann, ben = site.borrower(ANN), site.borrower(BEN)
        for borrower in (ann, ben):
            job = await borrower.job()
            assert job.result is not None
            assert await borrower.fetch(job.result.holdout) == SLICES[0]
            assert job.result.rows == 8, "two clips with four noises each"
            await borrower.report(job)
        await checking
        assert [(event.holdout, event.checkpoint) for event in site.events if isinstance(event, HoldoutBurnt)] == [
            (ChunkTable.of_bytes(SLICES[0]).ref.digest, site.record.digest)
        ]
        second = make_record(site.manifest, PEERS[1], weights=site.record.weights, state=site.record.state)
        checks = [asyncio.create_task(site.runner.inspect(record)) for record in (second,)]
        await asyncio.sleep(0.1)
        job = await ann.job()
        assert job.result is not None
        assert job.result.holdout.digest == ChunkTable.of_bytes(SLICES[1]).ref.digest
        third = make_record(site.manifest, PEERS[2], weights=site.record.weights, state=site.record.state)
        with pytest.raises(CheckFailed, match="no held-out clips of shard 0 are left that strangers may see"):
            await site.runner.inspect(third)
        checks[0].cancel()

    play(site, scenario)


def test_a_liar_is_found_by_a_third_and_asked_no_more(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann, ben, eve = (site.borrower(identity) for identity in (ANN, BEN, EVE))
        await eve.report(await eve.job(), 3.0)
        await ann.report(await ann.job())
        await ben.report(await ben.job())
        await checking
        assert await site.runner.losses(site.record) == list(ROWS)
        [refuted] = [event for event in site.events if isinstance(event, CheckerRefuted)]
        assert (refuted.owner, refuted.check, refuted.shard) == (EVE.public_key, "result", 0)
        assert not site.run.credit, "newcomers could confirm to each other what nobody has computed"
        assert "contradicts" in (await eve.ask()).text
        await site.append(PeerPardoned(time=START, owner=EVE.public_key))
        assert not (await eve.ask()).text

    play(site, scenario)


def test_files_that_two_refuse_are_refused(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        for identity in (ANN, BEN):
            borrower = site.borrower(identity)
            await borrower.report(await borrower.job(), outcome="refused", check="numbers", text="it holds NaN")
        with pytest.raises(CheckFailed, match="it holds NaN") as failed:
            await checking
        assert (failed.value.verdict.outcome, failed.value.verdict.check) == ("invalid", "numbers")

    play(site, scenario)


def test_a_report_that_answers_nothing_counts_as_failed(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        eve = site.borrower(EVE)
        await eve.report(await eve.job(), parent=())
        assert (await eve.ask()).job is None
        [check] = site.lender.desk.checks.values()
        assert not check.reports
        assert EVE.public_key in check.failed

    play(site, scenario)


def test_a_check_that_nobody_takes_is_named_after_a_lease(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        lease = site.manifest.timing.lease
        assert site.lender.held_up(site.transport.now()) == {}
        await asyncio.sleep(lease + 1)
        why = site.lender.held_up(site.transport.now())[0]
        assert "a check (result) has waited" in why
        assert "0 reports and 0 borrowers" in why
        shown = ShardFacts(None, None, None, 0, why)
        await site.append(ResultSeen(time=START, record=site.record, via="offer"))
        stall = shard_stall(site.run, site.manifest, 0, shown, site.transport.now())
        assert stall is not None
        assert why in stall.remedy

    play(site, scenario)


def test_named_checkers_that_contradict_each_other_wait_for_one_more_name(tmp_path: Path):
    site = Site(tmp_path, (ANN, BEN))

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann, ben = site.borrower(ANN), site.borrower(BEN)
        await ann.report(await ann.job())
        await ben.report(await ben.job(), 1.5)
        await asyncio.sleep(site.manifest.timing.lease + 1)
        assert not checking.done()
        why = site.lender.held_up(site.transport.now())[0]
        assert "for another node that the setting checkers names; it has 2 reports, which contradict each other, and 0" in why
        assert why.endswith("; name more there, and start the coordinator again")

    play(site, scenario)


def test_a_cancelled_check_is_taken_back(tmp_path: Path):
    site = Site(tmp_path)

    async def scenario(checking: asyncio.Task[None]) -> None:
        ann = site.borrower(ANN)
        job = await ann.job()
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        assert not site.lender.desk.checks
        assert "no check of that id is lent" in (await ann.report(job)).text
        with pytest.raises(UnreachableError):
            await ann.fetch(site.record.weights)

    play(site, scenario)
