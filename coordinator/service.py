"""One run being served: what the coordinator does all the time, and which streams it answers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.acceptance.rate_limits import Admission
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.admin.pardon import noted_pardons, remove_notes
from lutetia.coordinator.admin.upgrade import published
from lutetia.coordinator.ledger.events import CoordinatorStarted, CoordinatorStopped, PeerPardoned
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.signed_head import HeadFile
from lutetia.coordinator.ledger.status_builder import status as status_of
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.audit_service import AuditService
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.runtime.manifest_watch import ManifestNotifier, ManifestWatch
from lutetia.coordinator.runtime.recovery import SignedLineages, fetch_missing
from lutetia.coordinator.runtime.split_brain import refuse_a_rival
from lutetia.coordinator.runtime.staging import restored_incoming
from lutetia.coordinator.runtime.stitcher import Stitcher
from lutetia.coordinator.runtime.swarm_monitor import SwarmMonitor
from lutetia.coordinator.settings import ServeSettings
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.worker.client import WorkerClient
from lutetia.models.mixing.description import FILE as MIXTURE_FILE
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedService
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply, serve_offers
from lutetia.protocol.rpc.introduction import MIXTURE, STATUS, serve_document, serve_introduction, software_version
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity, peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    CheckpointRecord,
    RecordLimits,
    RecordRefused,
    open_record,
    read_envelope,
)
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import DiskError, UnreachableError, one_error
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)

_STATUS_SECONDS = 2.0
_FRESH_SECONDS = 0.5
_ALIVE_SECONDS = 2.0


@dataclass
class Service:
    """One run being served."""

    folder: RunFolder
    live: LiveManifest
    identity: Identity
    ledger: Ledger
    transport: Transport
    settings: ServeSettings
    lineage: SignedLineages
    recovering: bool
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.software = software_version()
        self.herald = ManifestNotifier(self.transport, self.live)
        self.watch = ManifestWatch(self.folder, self.live, self.identity, self._upgraded)
        self.blobs = BlobStore(self.folder.blobs)
        self.incoming = restored_incoming(self.folder, self.blobs, self.ledger.state)
        self.head = HeadFile(self.folder.head, self.ledger, self.identity)
        self.ledger.append([CoordinatorStarted(time=self.transport.now(), software=f"lutetia {self.software}")], durable=True)
        self.checking, self.making, self.auditing = (self._workshop(name) for name in ("checking", "making", "auditing"))
        self.tools = NetworkCheckRunner(
            self.transport, self.manifest, self.blobs, self.incoming, self.checking,
            self.auditing, self.settings.slowest_bytes_per_second, self.ledger.accepted_states(), self.settings.kept_states,
        )  # fmt: skip
        self.tools.forget(self.ledger.state)
        self.crier = Announcer(self.transport, self.identity, lambda: self.bench.rules, lambda: self.bench.state.run)
        self.bench = JudgeLoop(self._rules(), self.ledger, self.tools, self.crier.announce, self.transport.now, self._changed)
        self.admission = Admission(4 * self.settings.offers_per_minute)
        self.lookout = self.crier.lookout = SwarmMonitor(self.transport, self.manifest, self._found, self._accepted)
        self.stitcher = Stitcher(
            self.folder, self.manifest, self.identity, self.blobs, self.bench, self.making, self.transport.now,
            self.settings.stitch, self.settings.refresh_seconds, self.settings.gallery,
        )  # fmt: skip
        self.desk = AuditService(
            self.transport, self.bench, self.tools, lambda: [node.record for node in self.lookout.view.nodes]
        )
        self._status: tuple[float, SwarmStatus] | None = None
        self._news = asyncio.Event()

    @property
    def manifest(self) -> Manifest:
        """The newest version."""
        return self.live()

    @property
    def limits(self) -> RecordLimits:
        return RecordLimits(self.manifest.timing.heartbeat, self.manifest.timing.maximum_clock_skew)

    def _lease(self) -> float:
        return self.manifest.timing.lease

    def _heartbeat(self) -> float:
        return self.manifest.timing.heartbeat

    async def _keep_word(self) -> None:
        """What the DHT shows under our key is looked at before our own renewals cover it: of each owner it keeps one record."""
        await self._keep_to_lineage()
        await self.crier.renew()

    async def _keep_to_lineage(self) -> None:
        """Peers that come back late may hold words of ours that the ledger lacks."""
        if self.recovering:
            try:
                lost = await self.lineage.lost(lambda: self.bench.state.run)
            except ConnectionError as error:
                _log.info("cannot compare the ledger with the DHT now: %s", error)
                return
            await self.bench.append(*lost)
        await self._refuse_a_rival()

    async def _fetch_missing(self) -> None:
        """After a recovery an accepted checkpoint may be only with peers."""
        await fetch_missing(self.transport, self.bench.state.run, self.blobs)

    async def _upgraded(self) -> None:
        """A newer version of the manifest lies in the folder: everything here goes on under it, and peers hear of it."""
        manifest = self.manifest
        await self.bench.append(published(manifest, self.identity.public_key, self.transport.now()))
        self.bench.rules = self._rules()
        self.tools.manifest = self.lookout.manifest = self.stitcher.manifest = manifest
        for workshop in (self.checking, self.making, self.auditing):
            workshop.renew()
        self._changed(self.bench.state.run)
        _log.info("serving version %d of the manifest: %d epochs", manifest.version, manifest.epochs)
        await self._tell_peers()

    async def _tell_peers(self) -> None:
        await self.herald.tell([node.record for node in self.lookout.view.nodes])

    def _workshop(self, name: str) -> WorkerClient:
        """Checks, stitching and audits have one each, so that a long training of the router or replay delays no acceptance."""
        return WorkerClient(self.folder.manifest, name=name, threads=self.settings.threads, nice=self.settings.nice)

    def _rules(self) -> JudgeRules:
        secret = hashlib.sha256(b"lutetia-audit-lottery" + self.identity.seed).digest()
        return JudgeRules(
            self.manifest, self.identity.public_key, secret,
            offers_per_minute=self.settings.offers_per_minute, checks_at_once=self.settings.checks_at_once,
        )  # fmt: skip

    async def serve(self, listener: socket.socket | None) -> None:
        """Everything at once; the first failure, or the request to stop, ends all of it."""
        try:
            await self._refuse_a_rival()
            with one_error():
                async with asyncio.TaskGroup() as group:
                    works = [self.bench.run(), self.lookout.run(), self.stitcher.run(), self.watch.run()]
                    works.append(self._keep_status_file())
                    works += [_every(lambda: _ALIVE_SECONDS, work) for work in (self._check_alive, self._pardon)]
                    works += [_every(self._lease, work) for work in (self._keep_word, self._remember_peers)]
                    works += [_every(self._heartbeat, work) for work in (self._tell_peers, self._fetch_missing)]
                    if listener:
                        works.append(serve_http(listener, build_app(self.status, self.blobs)))
                    tasks = [group.create_task(work) for work in works]
                    await self._offer_services()
                    self._changed(self.ledger.state)
                    _log.info("serving run %s at %s", self.manifest.run_id[:12], ", ".join(self.transport.addresses()))
                    await self.stopping.wait()
                    for task in tasks:
                        task.cancel()
            self.ledger.append([CoordinatorStopped(time=self.transport.now())])
            await asyncio.to_thread(write_atomic, self.folder.status, canonical(self.status()))
        finally:
            await asyncio.gather(*(workshop.close() for workshop in (self.checking, self.making, self.auditing)))

    async def _offer_services(self) -> None:
        await serve_introduction(self.transport, lambda: self.live.signed)
        await AcceptedService(self.transport, self.live).serve()
        await serve_document(self.transport, STATUS, lambda: canonical(self.status()))
        await serve_document(self.transport, MIXTURE, self._mixture)
        await serve_blobs(self.transport, self.blobs, self.settings.blob_bytes_per_second)
        await serve_offers(self.transport, self._answer, self._admit)
        await self.desk.serve()

    def _mixture(self) -> bytes:
        """The signed description of the last mixture; nothing before there is one."""
        path = self.folder.mixture / MIXTURE_FILE
        return path.read_bytes() if path.exists() else b""

    def status(self) -> SwarmStatus:
        """The status document; made anew at most twice a second."""
        now = self.transport.now()
        if self._status is None or not 0 <= now - self._status[0] < _FRESH_SECONDS:
            document = status_of(self.bench.state.run, self.manifest, self.lookout.view, now, software=self.software)
            self._status = (now, document.model_copy(update={"ledger": self.head.signed}))
        return self._status[1]

    def _admit(self, stream: Stream) -> OfferReply | None:
        shards = self.bench.state.run.shards.values()
        waiting = {candidate.record.peer_id for shard in shards for candidate in shard.candidates.values()}
        return self.admission.refusal(stream.peer_id, stream.origin, waiting, self.transport.now())

    async def _answer(self, peer_id: str, offer: Offer) -> OfferReply:
        """The offer stream. Results are offered by their owners, so that nobody spends another peer's patience."""
        data, now = offer.sealed.encode(), self.transport.now()
        owner = read_envelope(data).owner
        record = open_record(data, key=None, subkey=owner, expires=offer.expires, now=now, limits=self.limits)
        if not isinstance(record, CheckpointRecord):
            raise RecordRefused(f"a {record.kind} record is no result")
        if peer_id_of(owner) != peer_id:
            raise RecordRefused("a result is offered by its owner, over its owner's own connection")
        reply = await self.bench.submit(Offered(record, now))
        assert isinstance(reply, OfferReply)
        return reply

    async def _found(self, record: CheckpointRecord) -> None:
        await self.bench.submit(Offered(record, self.transport.now(), "poll"))

    def _accepted(self) -> list[AcceptanceRecord]:
        return [shard.acceptance for shard in self.bench.state.run.shards.values() if shard.acceptance]

    def _changed(self, state: RunState) -> None:
        self._status = None
        self._news.set()
        self.stitcher.wake()
        if state.finished and self.settings.exit_when_done:
            # two heartbeats, in which peers hear of the last acceptance
            asyncio.get_running_loop().call_later(2 * self.manifest.timing.heartbeat, self.stopping.set)

    async def _keep_status_file(self) -> None:
        """Written every two seconds, and soon after each event."""
        while True:
            self._news.clear()
            try:
                await asyncio.to_thread(write_atomic, self.folder.status, canonical(self.status()))
            except DiskError as error:
                _log.error("%s", error)  # the run does not depend on this file
            await asyncio.sleep(_FRESH_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS - _FRESH_SECONDS):
                    await self._news.wait()

    async def _remember_peers(self) -> None:
        nodes = [node.record for node in self.lookout.view.nodes]
        if nodes:
            cache = Peerstore(self.folder.peers)
            await asyncio.to_thread(cache.remember_nodes, nodes, except_peer=self.transport.peer_id)

    async def _pardon(self) -> None:
        """Lift the quarantines that the operator asked to lift."""
        if noted := await asyncio.to_thread(noted_pardons, self.folder):
            quarantined, now = self.bench.state.run.quarantined, self.transport.now()
            await self.bench.append(*(PeerPardoned(time=now, owner=owner) for owner in noted if owner in quarantined))
            await asyncio.to_thread(remove_notes, self.folder, noted)
            await self.crier.tell_quarantine()

    async def _refuse_a_rival(self) -> None:
        await refuse_a_rival(self.transport, self.ledger, self.identity.public_key)

    async def _check_alive(self) -> None:
        """Without its network process the coordinator is of no use: end, and let the service manager start it again."""
        if not self.transport.alive():
            raise UnreachableError("the libp2p process of the coordinator has ended; start the coordinator again")


async def _every(seconds: Callable[[], float], action: Callable[[], Awaitable[None]]) -> None:
    while True:
        await action()
        await asyncio.sleep(seconds())
