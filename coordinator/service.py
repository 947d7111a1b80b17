"""Serves one run: builds the coordinator's parts, starts its long-running tasks and answers its streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lutetia.coordinator.acceptance.intake.rate_limits import Admission
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.admin.upgrade import published
from lutetia.coordinator.alerts.bootstrap import BootstrapWatch, ticket_addresses
from lutetia.coordinator.alerts.channels import channels_of
from lutetia.coordinator.alerts.service import OwnerAlerts
from lutetia.coordinator.credit.copies import CopyKeeping
from lutetia.coordinator.credit.cost import measure_missing_cost
from lutetia.coordinator.holdouts import Holdouts, holdout_store
from lutetia.coordinator.ledger.events import CoordinatorStarted, CoordinatorStopped, SnapshotDropped
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.signed_head import HeadFile
from lutetia.coordinator.ledger.status_builder import LiveView
from lutetia.coordinator.ledger.status_builder import status as status_of
from lutetia.coordinator.lending.measuring import LentMeasuring
from lutetia.coordinator.lending.mixtures import LentMixtures
from lutetia.coordinator.lending.prepare import prepare_lending
from lutetia.coordinator.lending.reserve import read_reserve
from lutetia.coordinator.lending.runner import LentCheckRunner, NoWorker
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.mixtures.archive import MixtureArchive
from lutetia.coordinator.mixtures.stitcher import Measuring, Stitcher
from lutetia.coordinator.owner.names import PeerNames
from lutetia.coordinator.owner.service import OwnerService
from lutetia.coordinator.periodic import every, log_if_out_of_files
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.audit_service import AuditService, free_auditors
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.runtime.lanes.merger import LaneMerger
from lutetia.coordinator.runtime.manifest_watch import ManifestNotifier, ManifestWatch
from lutetia.coordinator.runtime.offer_service import OfferService
from lutetia.coordinator.runtime.operator_notes import OperatorNotes
from lutetia.coordinator.runtime.recovery import SignedLineages, fetch_missing
from lutetia.coordinator.runtime.split_brain import refuse_split_brain
from lutetia.coordinator.runtime.staging import restored_incoming
from lutetia.coordinator.runtime.swarm_monitor import SwarmMonitor
from lutetia.coordinator.settings import ServeSettings
from lutetia.coordinator.snapshot.document import LedgerSnapshot
from lutetia.coordinator.snapshot.keeper import SnapshotKeeper
from lutetia.coordinator.web.rendered import Rendered
from lutetia.coordinator.web.server_process import HttpOrder, HttpServer
from lutetia.coordinator.worker.client import WorkerClient
from lutetia.coordinator.worker.messages import SizesMeasured
from lutetia.models.mixing.description import FILE as MIXTURE_FILE
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedService
from lutetia.protocol.rpc.introduction import (
    MIXTURE,
    MIXTURE_BY_DIGEST,
    STATUS,
    serve_document,
    serve_introduction,
    serve_named_document,
    software_version,
)
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity, peer_id_of, public_key_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import DiskError, UnreachableError, one_error
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)

_STATUS_SECONDS = 2.0
"""The status file is written so often, and soon after each event."""
_FRESH_SECONDS = 0.5
"""For so long the last status document is served again."""
_POLL_SECONDS = 2.0
"""How often the network process and the operator's notes are looked at."""


@dataclass
class Service:
    """One run being served.

    Args:
        folder: the run's files.
        live: the newest manifest.
        identity: the coordinator's key.
        ledger: open for writing.
        lineage: finds what the DHT holds and the ledger lacks; used when `recovering`.
        stopping: set it to end `serve`.
        sizes: of the shards' files; given, no worker process is started, and nodes check.
        snapshot: the one from which `ledger` was opened, if any; it is verified while the run is served.
        on_serving: called once peers can reach it.
    """

    folder: RunFolder
    live: LiveManifest
    identity: Identity
    ledger: Ledger
    transport: Transport
    settings: ServeSettings
    lineage: SignedLineages
    recovering: bool
    sizes: SizesMeasured | None = None
    snapshot: LedgerSnapshot | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    on_serving: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.software = software_version()
        self._orders = self.manifest.orders
        self.manifest_notifier = ManifestNotifier(self.transport, self.live)
        self.manifest_watch = ManifestWatch(self.folder, self.live, self.identity, self._adopt_manifest)
        self.blobs = BlobStore(self.folder.blobs)
        self.upload = RateLimit(self.settings.blob_bytes_per_second)
        self.incoming = restored_incoming(self.folder, self.blobs, self.ledger.state)
        self.head = HeadFile(self.folder.head, self.ledger, self.identity)
        self.ledger.append([CoordinatorStarted(time=self.transport.now(), software=f"lutetia {self.software}")], durable=True)
        holdouts = Holdouts(holdout_store(self.folder), self.identity.secret_for("held-out draws"))
        common = (self.settings.slowest_bytes_per_second, holdouts, set[str](), self.settings.kept_states)
        self.lender = self._lender() if self.sizes else None
        self.archive = self._archive()
        self.mixture_worker: WorkerClient
        if self.lender and self.sizes:
            none = NoWorker()
            slowest, reserve = self.settings.slowest_bytes_per_second, read_reserve(self.folder)
            measuring = LentMeasuring(lambda: self.manifest, self.lender, holdouts, reserve, self.archive, slowest)
            self.mixture_worker = LentMixtures(self.folder, lambda: self.manifest, self.lender, self.incoming, slowest, measuring)
            self.workers = (self.mixture_worker,)
            self.check_runner = LentCheckRunner(
                self.transport, self.manifest, self.blobs, self.incoming, none, none, *common, lender=self.lender,
                check_seconds=self.settings.check_seconds, keep_all_weights=self.settings.keep_all_weights, sizes=self.sizes,
                reserve=reserve,
            )  # fmt: skip
        else:
            checks, audits, proofs = (self._worker(name) for name in ("checking", "auditing", "proving"))
            parents, self.mixture_worker = self._worker("proving-parents"), self._worker("making")
            self.workers = (checks, self.mixture_worker, audits, proofs, parents)
            self.check_runner = NetworkCheckRunner(
                self.transport, self.manifest, self.blobs, self.incoming, checks, audits, *common, proofs, parents,
                self.settings.check_seconds, self.settings.keep_all_weights,
            )  # fmt: skip
        self.check_runner.mixture_blobs = self.archive.named_blobs
        self.announcer = Announcer(
            self.transport, self.identity, lambda: self.judge_loop.rules, lambda: self.judge_loop.state.run
        )
        self.judge_loop = JudgeLoop(
            self._rules(), self.ledger, self.check_runner, self.announcer.announce, self.transport.now, self._changed
        )
        admission = Admission(4 * self.settings.offers_per_minute)
        self.judge_loop.origin_of = lambda owner: admission.origin(peer_id_of(owner)) if owner else ""
        self.offer_service = OfferService(self.transport, self.judge_loop, admission)
        self.swarm_monitor = SwarmMonitor(
            self.transport, self.manifest, self.offer_service.offer_found, self._accepted,
            lambda slot: self.judge_loop.state.run.slot_view(slot), self._credit_copies, self._barred,
        )  # fmt: skip
        self.announcer.swarm_monitor = self.swarm_monitor
        self.copy_keeping = CopyKeeping(self.manifest.optimisation.batch)
        self.judge_loop.auditors = lambda: free_auditors(self.swarm_monitor.view)
        gallery = self.settings.gallery and (self.lender is None or self.lender.named)
        if self.manifest.team:
            self.judge_loop.at_work = lambda: self.swarm_monitor.view.at_work
            self.judge_loop.merge = self._merger().merge
        self.stitcher = Stitcher(
            self.folder, self.manifest, self.identity, self.blobs, self.judge_loop, self.mixture_worker, self.transport.now,
            self.settings.stitch, self.settings.refresh_seconds, gallery, self.archive,
            self.settings.gallery_bytes, self._measuring(holdouts),
        )  # fmt: skip
        self.audit_service = AuditService(
            self.transport, self.judge_loop, self.check_runner, self._nodes, lends_checks=self.lender is not None
        )
        self.operator_notes = OperatorNotes(self.folder, self.judge_loop, self.announcer.publish_quarantine)
        self.names = PeerNames(self.folder.names)
        self.bootstrap_watch = BootstrapWatch(self.transport, ticket_addresses(self.folder.ticket))
        self.http: HttpServer | None = None
        self.snapshot_keeper = SnapshotKeeper(self.folder, self.ledger, self.snapshot, self._drop_snapshot)
        self._status: tuple[float, SwarmStatus] | None = None
        self._status_changed = asyncio.Event()

    @property
    def manifest(self) -> Manifest:
        """The newest version."""
        return self.live()

    async def serve(self, listener: socket.socket | None) -> None:
        """Run all tasks until `stopping` is set or one of them fails. `listener`: the socket of the HTTP server, if any."""
        try:
            await self._refuse_split_brain()
            with one_error():
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(work, name=name) for name, work in self._tasks(listener).items()]
                    await self._answer_streams()
                    self._changed(self.ledger.state)
                    _log.info("serving run %s at %s", self.manifest.run_id[:12], ", ".join(self.transport.addresses()))
                    self.on_serving()
                    await self.stopping.wait()
                    for task in tasks:
                        task.cancel()
            now = self.transport.now()
            kept = self.copy_keeping.due(now, last=True)
            self.ledger.append([*([kept] if kept else []), CoordinatorStopped(time=now)])
            await asyncio.to_thread(write_atomic, self.folder.status, canonical(self.status()))
        finally:
            await asyncio.gather(*(worker.close() for worker in self.workers))

    def _tasks(self, listener: socket.socket | None) -> dict[str, Coroutine[Any, Any, None]]:
        """Everything that runs until the service stops, by name."""
        tasks: dict[str, Coroutine[Any, Any, None]] = {
            "judge loop": self.judge_loop.run(),
            "swarm monitor": self.swarm_monitor.run(),
            "owner dials": self.offer_service.dial_owners(),
            "stitcher": self.stitcher.run(),
            "manifest watch": self.manifest_watch.run(),
            "status file": self._write_status_file(),
            "network process": every(lambda: _POLL_SECONDS, self._check_network_process),
            "operator's notes": every(lambda: _POLL_SECONDS, self.operator_notes.follow),
            "announcer": every(lambda: self.manifest.timing.lease, self._renew_records),
            "peerstore": every(lambda: self.manifest.timing.lease, self._remember_peers),
            "manifest notifier": every(lambda: self.manifest.timing.heartbeat, self._notify_peers),
            "sample cost": measure_missing_cost(self.judge_loop, lambda: self._worker("counting")),
            "old blobs": self._remove_old_blobs(),
            "snapshot": self.snapshot_keeper.run(),
            "bootstrap": self.bootstrap_watch.run(),
            "missing blobs": every(lambda: self.manifest.timing.heartbeat, self._fetch_missing),
        }
        if channels_of(self.settings.alerts):
            alerts = OwnerAlerts(self.settings.alerts, self.status, lambda: self.manifest, self.folder.alerts)
            alerts.bootstrap = self.bootstrap_watch.faults
            tasks["alerts"] = alerts.run()
        if self.lender:
            tasks["lent checks"] = self.lender.watch()
        if listener:
            order = HttpOrder(
                root=str(self.folder.root), listener=listener.fileno(), coordinator=self.identity.public_key,
                about=self.settings.about, bytes_per_second=self.settings.blob_bytes_per_second,
            )  # fmt: skip
            self.http = HttpServer(order, listener, self.upload, self.bootstrap_watch.faults)
            tasks["http server"] = self.http.run()
        return tasks

    async def _answer_streams(self) -> None:
        self.transport.favour(self._has_accepted_work)
        await serve_introduction(self.transport, lambda: self.live.signed)
        await AcceptedService(self.transport, self.live).serve()
        await serve_document(self.transport, STATUS, Rendered(self.status, canonical).latest)
        await serve_document(self.transport, MIXTURE, self._mixture)
        await serve_named_document(self.transport, MIXTURE_BY_DIGEST, lambda name: self.archive.find(name) or b"")
        lent = self.lender.lent_store if self.lender else lambda peer_id, digest: None
        await self.transport.serve(BLOB, BlobServer(self.blobs, self.upload, lent, self._bans).answer)
        await self.offer_service.serve()
        await OwnerService(self.transport, self.live, self.manifest_watch, self._most_epochs).serve()
        await self.audit_service.serve()
        if self.lender:
            await self.lender.serve()

    # --- the run's state and the manifest ---------------------------------------------------------------------------------

    def _rules(self) -> JudgeRules:
        return JudgeRules(
            self.manifest, self.identity.public_key, self.identity.secret_for("audit lottery"),
            offers_per_minute=self.settings.offers_per_minute, checks_at_once=self.settings.checks_at_once,
        )  # fmt: skip

    def _lender(self) -> CheckLender:
        return CheckLender(
            self.transport, lambda: self.manifest, lambda: self.judge_loop.state.run, self._nodes,
            lambda: free_auditors(self.swarm_monitor.view), lambda event: self.judge_loop.append(event),
            frozenset(self.settings.checkers),
        )  # fmt: skip

    def _archive(self) -> MixtureArchive:
        archive = MixtureArchive(self.folder.mixtures, self.blobs, self.ledger.stitched(), self.settings.kept_mixtures)
        archive.open(self.folder.mixture, self.ledger.state.mixture and self.ledger.state.mixture.mixture)
        return archive

    def _merger(self) -> LaneMerger:
        """Merging needs a process also where checks are lent."""
        worker = self._worker("merging")
        self.workers = (*self.workers, worker)
        return LaneMerger(
            self.folder.merging, self.live, self.identity, self.blobs, self.incoming, worker, self.transport.now
        )  # fmt: skip

    def _measuring(self, holdouts: Holdouts) -> Measuring:
        return Measuring(holdouts.draw("mixtures"), self.settings.mixture_seconds, self.settings.routing == "measured")

    def _worker(self, name: str) -> WorkerClient:
        """Checks, mixtures, audits and proofs have a process each, started when needed, so that none waits for another."""
        settings = self.settings
        return WorkerClient(self.folder.manifest, name=name, threads=settings.threads, nice=settings.nice, device=settings.device)

    def _changed(self, state: RunState) -> None:
        """Called after each change of the run's state."""
        self._status = None
        self._status_changed.set()
        self.stitcher.wake()
        if state.finished and self.settings.exit_when_done:
            # two heartbeats, in which peers learn of the last acceptance
            asyncio.get_running_loop().call_later(2 * self.manifest.timing.heartbeat, self.stopping.set)

    async def _adopt_manifest(self) -> None:
        """The run's folder has a newer version of the manifest: apply it to every part and notify the peers."""
        manifest = self.manifest
        before, self._orders = self._orders, manifest.orders
        await self.judge_loop.append(published(manifest, self.identity.public_key, self.transport.now(), before))
        self.judge_loop.rules = self._rules()
        self.check_runner.manifest = self.swarm_monitor.manifest = self.stitcher.manifest = manifest
        if before.paused and not manifest.orders.paused:
            self.swarm_monitor.forget_claims()
        if self.lender:
            await prepare_lending(self.folder, manifest, self.settings)  # the parts of a mixture depend on it
        for worker in self.workers:
            worker.renew()
        self._changed(self.judge_loop.state.run)
        _log.info("serving version %d of the manifest: %d epochs", manifest.version, manifest.epochs)
        await self._notify_peers()

    def _has_accepted_work(self, peer_id: str) -> bool:
        """Whether a place among the inbound streams is kept for this peer."""
        owner = public_key_of(peer_id)
        return owner is not None and self.judge_loop.state.run.has_accepted_work(owner)

    def _most_epochs(self) -> int:
        return max(self.judge_loop.state.run.accepted_epochs, default=0)

    def _barred(self) -> set[str]:
        """Public keys of the peers whose claims count nowhere."""
        return self.judge_loop.state.run.quarantined.keys() | {ban.peer for ban in self.manifest.orders.banned}

    def _bans(self, peer_id: str) -> bool:
        return self.manifest.orders.bans(peer_id)

    def _accepted(self) -> list[AcceptanceRecord]:
        return [shard.acceptance for shard in self.judge_loop.state.run.shards.values() if shard.acceptance]

    # --- the swarm --------------------------------------------------------------------------------------------------------

    def _view(self, now: float) -> LiveView:
        """The swarm, with what lent checks wait for."""
        view, merging = self.swarm_monitor.view, self.judge_loop.state.merging
        if merging:
            view = replace(view, merging=frozenset(name for running in merging.values() for name in running.sources))
        return replace(view, lent=self.lender.held_up(now)) if self.lender else view

    def _nodes(self) -> list[NodeRecord]:
        """The node records that the DHT has now."""
        return [node.record for node in self.swarm_monitor.view.nodes]

    async def _credit_copies(self, holders: Mapping[int, Collection[str]]) -> None:
        """Count the copies that were just proved. Only peers with other credit have a part in them."""
        credit, now = self.judge_loop.state.run.credit, self.transport.now()
        self.copy_keeping.look({shard: [owner for owner in owners if owner in credit] for shard, owners in holders.items()}, now)
        if event := self.copy_keeping.due(now):
            await self.judge_loop.append(event)

    async def _renew_records(self) -> None:
        """Compare the DHT with the ledger before the own renewals replace what it has: it keeps one record of each owner."""
        if await self._recover_lost():
            await self._refuse_split_brain()
        await self.announcer.renew()

    async def _recover_lost(self) -> bool:
        """While recovering, append what peers that reconnect late still hold. False when the DHT cannot be read."""
        if self.recovering:
            try:
                lost = await self.lineage.lost(lambda: self.judge_loop.state.run)
            except ConnectionError as error:
                _log.info("cannot compare the ledger with the DHT now: %s", error)
                return False
            await self.judge_loop.append(*lost)
        return True

    async def _refuse_split_brain(self) -> None:
        await refuse_split_brain(self.transport, self.ledger, self.identity.public_key)

    async def _fetch_missing(self) -> None:
        """After a recovery only peers may have the blobs of an accepted checkpoint."""
        await fetch_missing(self.transport, self.judge_loop.state.run, self.blobs)

    async def _remove_old_blobs(self) -> None:
        """Remove the blobs of accepted results that nothing needs any more and an earlier process did not come to remove."""
        old = await asyncio.to_thread(self.ledger.accepted_blobs, self.settings.keep_all_weights)

        def remove(run: RunState) -> None:
            self.check_runner.accepted |= old
            self.check_runner.forget(run)

        await self.judge_loop.while_idle(remove)

    async def _drop_snapshot(self, events: int) -> None:
        """The snapshot that was loaded does not follow from the ledger: go on from the ledger alone."""
        _log.error("the snapshot of the first %d events does not follow from the ledger; adding all events up again", events)
        await self.judge_loop.restore()
        if self.http:
            await self.http.renew()
        await self.judge_loop.append(SnapshotDropped(time=self.transport.now(), events=events))

    async def _notify_peers(self) -> None:
        await self.manifest_notifier.notify(self._nodes())

    async def _remember_peers(self) -> None:
        if nodes := self._nodes():
            if self.names.note(nodes, self.judge_loop.state.run.credit):
                with contextlib.suppress(DiskError):  # names are no more than that
                    await asyncio.to_thread(self.names.write)
            peerstore = Peerstore(self.folder.peers)
            with contextlib.suppress(ConnectionError):
                connected = await self.transport.connections()
                await asyncio.to_thread(peerstore.remember_nodes, nodes, connected, except_peer=self.transport.peer_id)

    async def _check_network_process(self) -> None:
        """The coordinator is useless without its network process: end, so that the service manager starts it again."""
        if not self.transport.alive():
            raise UnreachableError("the libp2p process of the coordinator has ended or hangs; start the coordinator again")

    # --- documents --------------------------------------------------------------------------------------------------------

    def status(self) -> SwarmStatus:
        """The status document, built at most twice a second."""
        now = self.transport.now()
        if self._status is None or not 0 <= now - self._status[0] < _FRESH_SECONDS:
            document = status_of(self.judge_loop.state.run, self.manifest, self._view(now), now, software=self.software)
            self._status = (now, document.model_copy(update={"ledger": self.head.signed}))
        return self._status[1]

    async def _write_status_file(self) -> None:
        while True:
            self._status_changed.clear()
            document = canonical(self.status())
            if self.http:
                self.http.tell(document)
            try:
                await asyncio.to_thread(write_atomic, self.folder.status, document)
            except DiskError as error:
                _log.error("%s", error)  # the run does not depend on this file
            except OSError as error:
                log_if_out_of_files("status file", error)
            await asyncio.sleep(_FRESH_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS - _FRESH_SECONDS):
                    await self._status_changed.wait()

    def _mixture(self) -> bytes:
        """The signed description of the last mixture; empty before the first."""
        path = self.folder.mixture / MIXTURE_FILE
        return path.read_bytes() if path.exists() else b""
