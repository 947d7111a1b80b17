"""Blobs of undecided results: which results name them, and when they may be removed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Replayed
from lutetia.coordinator.acceptance.messages import Offered, StartAudit
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.ledger.events import Outcome
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.messages import Job, LossMeasured, MeasureLoss, MeasureSizes, SizesMeasured
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord
from lutetia.system.errors import DiskError, one_error
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, blob, first_event, make_manifest, make_record
from tests.memory_transport.network import MemoryNetwork

PATIENCE = 60.0
SIZE = 3000


@dataclass
class Gate:
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class StrawShop:
    """A worker process that finds everything in order; a job of a shard that has a gate waits before it."""

    gates: dict[tuple[str, int], Gate] = field(default_factory=dict)
    broken: BaseException | None = None

    async def ask(self, job: Job[Any], *, limit: float, sign: Any = None) -> Any:
        name = "raw" if getattr(job, "raw", False) else job.name()
        if gate := self.gates.get((name, getattr(job, "shard", -1))):
            gate.reached.set()
            await gate.opened.wait()
        if isinstance(job, MeasureSizes):
            sizes: dict[int, tuple[int, int]] = dict.fromkeys(range(2), (1 << 24, 1))
            return SizesMeasured(weights=sizes, state=sizes)
        if isinstance(job, MeasureLoss) and self.broken:
            raise self.broken
        return LossMeasured(loss=0.4, by_time=(), rows=(0.4,)) if isinstance(job, MeasureLoss) else None

    def gate(self, job: str, shard: int = 0) -> Gate:
        return self.gates.setdefault((job, shard), Gate())


@dataclass
class Tools(NetworkCheckRunner):
    """The service's own tools; `found` says what replays come to once they may, and is raised where it is an error."""

    found: Outcome | BaseException = "valid"
    replays: asyncio.Event = field(default_factory=asyncio.Event)

    async def replay(self, audit: StartAudit) -> Replayed:
        await self.replays.wait()
        if isinstance(self.found, BaseException):
            raise self.found
        return Replayed(AuditFinding(outcome=self.found, text="step 2: 0.7 and 0.9"), 0.1)


@dataclass
class Intake:
    """The judge loop with the service's check runner, on a network in memory."""

    manifest: Manifest
    network: MemoryNetwork
    tools: Tools
    shop: StrawShop
    ledger: Ledger
    root: Path
    bench: JudgeLoop = field(init=False)
    running: asyncio.Task[None] = field(init=False)
    published: list[AcceptanceRecord | ResetRecord] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        """Start a judge loop that goes on from the ledger."""
        rules = JudgeRules(self.manifest, COORDINATOR.public_key, b"s", retry_delay=0.1, newcomer_epochs=0)
        self.bench = JudgeLoop(rules, self.ledger, self.tools, self._publish, time.time, lambda run: self._news.set())
        self.running = asyncio.create_task(self.bench.run())

    async def _publish(self, record: AcceptanceRecord | ResetRecord) -> None:
        self.published.append(record)

    async def peer(self, identity: Identity, *contents: bytes) -> list[BlobRef]:
        """`identity` joins and serves `contents`."""
        transport = self.network.peer(identity, record_check(self.manifest, time.time))
        store = BlobStore(self.root / identity.peer_id)
        await serve_blobs(transport, store)
        return [store.add_bytes(content) for content in contents]

    async def offer(self, record: CheckpointRecord) -> OfferReply:
        reply = await self.bench.submit(Offered(record, time.time()))
        assert isinstance(reply, OfferReply)
        return reply

    async def until(self, reached: Callable[[RunState], bool]) -> RunState:
        """Wait for a state of the run; fails when the judge loop ends before."""
        async with asyncio.timeout(PATIENCE):
            while not reached(self.bench.state.run):
                self._news.clear()
                news = asyncio.ensure_future(self._news.wait())
                await asyncio.wait((news, self.running), return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                assert not self.running.done(), self.running
        return self.bench.state.run


@asynccontextmanager
async def intake(root: Path, shards: int = 2, epochs: int = 3) -> AsyncIterator[Intake]:
    """Fails when the judge loop has ended by itself: that ends the coordinator."""
    now = time.time()
    manifest = make_manifest(shards, epochs, created=now - 10, expires=now + 1e6)
    held = [b"%s %d" % (name, shard.index) for shard in manifest.shards for name in (b"train", b"holdout")]
    refs = [ChunkTable.of_bytes(content).ref for content in held]
    spec = tuple(
        shard.model_copy(update={"train": refs[2 * shard.index], "holdout": refs[2 * shard.index + 1]})
        for shard in manifest.shards
    )
    manifest = manifest.model_copy(update={"shards": spec})
    network, shop = MemoryNetwork(latency=0.001), StrawShop()
    transport = network.peer(COORDINATOR, record_check(manifest, time.time))
    blobs, incoming = BlobStore(root / "blobs"), BlobStore(root / "incoming")
    for content in held:
        blobs.add_bytes(content)
    await serve_blobs(transport, blobs)
    tools = Tools(transport, manifest, blobs, incoming, shop, shop, 65536.0, Holdouts(blobs, b"secret"))  # pyright: ignore[reportArgumentType]
    ledger = Ledger.create(root / "ledger.sqlite", first_event(manifest, now))
    room = Intake(manifest, network, tools, shop, ledger, root)
    room.start()
    try:
        yield room
        assert not room.running.done(), room.running
    finally:
        room.running.cancel()
        await asyncio.gather(room.running, return_exceptions=True)
        ledger.close()


def contents(text: str) -> list[bytes]:
    return [f"{name} of {text} ".encode() * SIZE for name in ("weights", "state", "trace")]


def made_of(manifest: Manifest, peer: Identity, refs: list[BlobRef], **changes: object) -> CheckpointRecord:
    blobs = dict(zip(("weights", "state", "trace"), refs, strict=True))
    return make_record(manifest, peer, **{"issued": time.time(), **blobs, **changes})  # pyright: ignore[reportArgumentType]


async def test_a_known_blob_with_a_wrong_size_is_refused(tmp_path: Path):
    """Its name covers its size: under another size nobody could ever fetch what was accepted."""
    async with intake(tmp_path) as room:
        weights, state, trace = await room.peer(PEERS[1], *contents("evil"))
        await room.peer(PEERS[2], *contents("evil"))
        stuck = made_of(room.manifest, PEERS[1], [weights, state, blob("nowhere")])
        assert (await room.offer(stuck)).verdict == "queued"
        await room.until(lambda run: bool(run.refusals))
        assert room.tools.incoming.has(weights.digest)

        longer = [ref.model_copy(update={"size": ref.size + 1}) for ref in (weights, state)]
        lie = made_of(room.manifest, PEERS[2], [*longer, trace])
        assert (await room.offer(lie)).verdict == "queued"
        run = await room.until(lambda run: not run.shards[0].undecided_of(PEERS[2].public_key))
        assert run.accepted == 0
        reply = await room.offer(lie)
        assert (reply.verdict, reply.check) == ("invalid", "transfer")
        assert f"{weights.size + 1} bytes" in reply.text

        honest = made_of(room.manifest, PEERS[2], [weights, state, trace], addresses=())
        await room.offer(honest)
        await room.until(lambda run: run.accepted == 1)
        reader = room.network.peer(PEERS[3], record_check(room.manifest, time.time))
        given = room.bench.state.run.shards[0].acceptance
        assert given
        await fetch_blob(reader, BlobStore(tmp_path / "reader"), given.weights, [Provider(COORDINATOR.peer_id, ())])


async def test_naming_another_results_blobs_does_not_remove_them(tmp_path: Path):
    """A record on another shard that is refused at once must not remove blobs of the same names that are under check."""
    async with intake(tmp_path) as room:
        last = room.shop.gate("raw")
        honest = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        await room.offer(honest)
        await last.reached.wait()
        await room.peer(PEERS[1])
        thief = honest.model_copy(
            update={
                "shard": 1, "owner": PEERS[1].public_key, "peer_id": PEERS[1].peer_id,
                "trace": blob("trace that nobody has", 1 << 20),
            }
        )  # fmt: skip
        assert (await room.offer(thief)).verdict == "queued"
        await room.until(lambda run: bool(run.refusals) and run.refusals[-1].again_at is None)
        last.opened.set()
        run = await room.until(lambda run: run.accepted == 1)
        assert run.shards[0].accepted == honest.digest
        assert all(room.tools.blobs.has(ref.digest) for ref in (honest.weights, honest.state, honest.trace))
        assert room.tools.incoming.digests() == []


async def test_a_conviction_during_a_check_ends_the_check(tmp_path: Path):
    async with intake(tmp_path) as room:
        room.tools.found = "invalid"
        faked = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("faked")))
        await room.offer(faked)
        await room.until(lambda run: run.accepted == 1)
        gate = room.shop.gate("loss")
        on_top = made_of(
            room.manifest, PEERS[1], await room.peer(PEERS[1], *contents("on top")), epoch=2, parent=faked.digest, samples=8
        )
        assert (await room.offer(on_top)).verdict == "queued"
        await gate.reached.wait()
        room.tools.replays.set()
        await room.until(lambda run: run.shards[0].term == 1)
        gate.opened.set()
        again = made_of(room.manifest, PEERS[2], await room.peer(PEERS[2], *contents("again")))
        await room.offer(again)
        run = await room.until(lambda run: run.accepted == 2)
        assert run.shards[0].accepted == again.digest
        assert not room.tools.incoming.has(on_top.state.digest)


async def test_a_blob_lost_during_a_check_is_fetched_again(tmp_path: Path):
    async with intake(tmp_path) as room:
        gate = room.shop.gate("loss")
        record = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        await room.offer(record)
        await gate.reached.wait()
        room.tools.incoming.remove(record.state.digest)  # as by hand, or by a disk that is mended
        gate.opened.set()
        run = await room.until(lambda run: run.accepted == 1)
        assert [(why.verdict, why.check) for why in run.refusals] == [("inconclusive", "raw")]
        assert "is not in the store" in run.refusals[0].text


async def test_an_acceptance_is_published_after_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Status, renewals and mixtures show the judge loop's state; a coordinator that dies now must not have published it."""
    async with intake(tmp_path) as room:
        reached, opened, keep = threading.Event(), threading.Event(), room.tools.keep

        def slow_keep(record: CheckpointRecord, of_lane: bool = False) -> None:
            reached.set()
            assert opened.wait(PATIENCE)
            keep(record, of_lane)

        monkeypatch.setattr(room.tools, "keep", slow_keep)
        await room.offer(made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest"))))
        assert await asyncio.to_thread(reached.wait, PATIENCE)
        assert room.bench.state.run.shards[0].acceptance is None
        opened.set()
        await room.until(lambda run: run.accepted == 1)


async def test_a_blob_lost_after_its_check_is_noticed(tmp_path: Path):
    async with intake(tmp_path) as room:
        gate = room.shop.gate("raw")
        record = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        await room.offer(record)
        await gate.reached.wait()
        room.tools.incoming.remove(record.trace.digest)
        gate.opened.set()
        run = await room.until(lambda run: run.accepted == 1)
        assert [(why.verdict, why.check) for why in run.refusals] == [("inconclusive", "transfer")]
        assert "went missing meanwhile" in run.refusals[0].text
        assert room.tools.blobs.has(record.trace.digest)


@pytest.mark.parametrize("place", ["a check", "a replay"])
async def test_an_unexpected_error_ends_only_its_own_job(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture):
    async with intake(tmp_path) as room:
        error = ValueError("a line without end")
        room.tools.replays.set()
        if place == "a check":
            room.shop.broken = error
        else:
            room.tools.found = error
        record = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        await room.offer(record)
        if place == "a check":
            run = await room.until(lambda run: bool(run.refusals))
            assert run.refusals[0].verdict == "inconclusive"
            assert "a line without end" in run.refusals[0].text
            room.shop.broken = None
            await room.until(lambda run: run.accepted == 1)
        else:
            await room.until(lambda run: any(audit.attempts for audit in run.audits.values()))
        assert "Traceback" in caplog.text


async def test_a_result_that_cannot_be_judged_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """By stream and by DHT record, and it is logged once: 10**5000 is a number that Python refuses to write as text."""
    async with intake(tmp_path) as room:
        good = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        worse = made_of(room.manifest, PEERS[1], [good.weights, good.state, good.trace]).model_copy(update={"epoch": 10**5000})
        asked = [room.bench.submit(Offered(worse, time.time(), via)) for via in ("offer", "poll", "poll")]
        replies = await asyncio.gather(*asked, room.offer(good))
        assert [reply.verdict for reply in replies if isinstance(reply, OfferReply)] == [*["inconclusive"] * 3, "queued"]
        await room.until(lambda run: run.accepted == 1)
        assert caplog.text.count("could not judge") == 1


@pytest.mark.parametrize("place", ["a check", "a replay"])
async def test_a_full_disk_ends_the_coordinator_without_a_verdict(tmp_path: Path, place: str):
    """As a ledger that cannot be written does: nodes wait for it, while three inconclusive verdicts would make them give up."""
    async with intake(tmp_path) as room:
        full = DiskError("cannot write state: no space left on device")
        if place == "a check":
            room.shop.broken = full
        else:
            room.tools.found = full
        room.tools.replays.set()
        record = made_of(room.manifest, PEERS[0], await room.peer(PEERS[0], *contents("honest")))
        await room.offer(record)
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(DiskError, match="no space left"), one_error():
                await room.running
        room.shop.broken, room.tools.found = None, "valid"
        room.start()
        await room.offer(record)
        run = await room.until(lambda run: run.accepted == 1 and not run.audits)
        assert not run.refusals
        assert [peer.streak for peer in run.peers.values()] == [1]
