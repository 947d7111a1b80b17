"""The coordinator: the real judge, checks, announcer, ledger state and status, and a model of the shell around them.

The ledger is a list that survives a crash; everything else is rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, cast

from lutetia.coordinator.acceptance import messages as j
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import SizeLimits, Verdict, run_transfer
from lutetia.coordinator.acceptance.intake.rate_limits import may_become_candidate
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import CoordinatorStarted, Event, RunCreated, read_event
from lutetia.coordinator.ledger.status_builder import LiveView
from lutetia.coordinator.runtime.announcer import Announcer
from lutetia.coordinator.runtime.audit_service import free_auditors, relatives
from lutetia.coordinator.runtime.judge_loop import TICK_SECONDS
from lutetia.coordinator.runtime.swarm_monitor import (
    SwarmMonitor,
    claims_pause,
    lanes_at_work,
    look_pause,
    nodes_pause,
    observed,
    sighted,
)
from lutetia.protocol.claims import ShardView
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import (
    NODE_BUCKETS,
    AcceptanceRecord,
    CheckpointRecord,
    NodeRecord,
    RecordLimits,
    RecordRefused,
    ResetRecord,
    checkpoint_key,
    open_record,
)
from lutetia.protocol.stalled_claims import LONGEST_GAP
from lutetia.simulation.config import COORDINATOR, MIB, blob
from lutetia.simulation.interfaces import Node, World
from lutetia.simulation.network.blobs import SimulatedDelay, drive, merged_content
from lutetia.simulation.peers.announcer import OwnRecords, SimulatedRecordStore
from lutetia.simulation.peers.auditor import replay_finding
from lutetia.simulation.peers.check_runner import SimulatedCheckRunner
from lutetia.simulation.peers.lent_checks import LentSimulatedCheckRunner, SimulatedLender
from lutetia.simulation.peers.manifest_updates import ServedManifest
from lutetia.simulation.peers.streams import shard_parcel


class SimulatedCoordinator:
    """One coordinator process on one disk (`ledger`). `boot` counts its starts."""

    def __init__(self, world: World, index: int, identity: Identity = COORDINATOR, ledger: list[Event] | None = None) -> None:
        self.world, self.index, self.identity = world, index, identity
        self.access_latency, self.up = 0.0, world.config.origin_up
        self.running = self.serving = self.recovering = self.denies = False
        self.boot = self.stopped_itself = 0
        self.parts: dict[str, dict[str, Any]] = {}
        self.view = LiveView()
        self.refuse_publishing = False
        """Crash at the next acceptance, after it is in the ledger and before it is published."""
        manifest = world.manifest
        self.ledger: list[Event] = ledger if ledger is not None else [
            RunCreated(
                time=world.queue.now, run=manifest.run_id, name=manifest.name, owner=manifest.owner,
                coordinator=identity.public_key, shards=len(manifest.shards), epochs=manifest.epochs,
            )
        ]  # fmt: skip
        self.rules = JudgeRules(manifest, identity.public_key, b"simulated", checks_at_once=world.config.checks_at_once)
        self.state = JudgeState(world.decide.replayed(self.ledger))
        self._limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        self._since: dict[tuple[str, int], float] = {}
        self._nodes: list[tuple[NodeRecord, float]] = []
        self._nodes_due = self._claims_due = self._sighted_until = float("-inf")
        self._views: tuple[ShardView, ...] = ()
        self._auditors: frozenset[str] | None = None
        self.own_records = OwnRecords(self)
        self._announcer = self._make_announcer()
        self.served_manifest = ServedManifest(self)
        self.lender = SimulatedLender(self)

    def __repr__(self) -> str:
        return "the coordinator" if self.index == -1 else f"coordinator {-self.index}"

    @property
    def answering(self) -> bool:
        return self.running

    def clock(self) -> float:
        return self.world.queue.now

    # --- life -----------------------------------------------------------------------------------------------------------

    def start(self, *, recover: bool = False) -> None:
        """Start from the ledger alone; in signed settings from its canonical bytes, as from a real file.

        `recover`: for one lease, read own records from the DHT that the ledger lacks, and add them to it.
        """
        if self.running:
            return
        self.boot += 1
        self.running, self.recovering = True, recover
        self._announcer = self._make_announcer()
        self.ledger.append(CoordinatorStarted(time=self.clock(), software="simulated"))
        events = [read_event(canonical(event)) for event in self.ledger] if self.world.config.signed else self.ledger
        self.state = JudgeState.restored(self.world.decide.replayed(events))
        self.world.dht.enter(self, self.identity.peer_id + str(self.index))
        self.follow_folder()
        if recover:
            self._recover(self.boot, self.clock() + self.world.config.lease)
        else:
            self._serve()

    def _recover(self, boot: int, until: float) -> None:
        if boot != self.boot:
            return
        self._recover_missing()
        if self.clock() < until:
            self.world.queue.after(TICK_SECONDS, self._recover, boot, until)
        else:
            self._serve()

    def _serve(self) -> None:
        if self._stop_if_behind():
            return
        self.serving = True
        self.world.invariants.after_restart(self)
        for shard in range(len(self.world.manifest.shards)):
            self.world.blobs.put(shard_parcel(shard), self)
        config = self.world.config
        size = SizeLimits(2 * config.weights_bytes + MIB, 2 * config.state_bytes + MIB, MIB)
        self.feed(j.LimitsKnown(dict.fromkeys(range(config.shards), size), self.clock()))
        poll = config.poll_every or look_pause(config.heartbeat)
        for seconds, call in (
            (TICK_SECONDS, self._tick), (poll, self._poll), (config.lease, self._renew_records),
            (config.heartbeat, self.served_manifest.notify), (config.status_every, self._check_status),
        ):  # fmt: skip
            self._every(self.boot, seconds, call)

    def follow_folder(self) -> None:
        """Adopt the newest manifest in the folder."""
        if self.running and (entry := self.served_manifest.adopt()):
            self.rules = replace(self.rules, manifest=self.served_manifest.live())
            self.feed(j.LedgerFacts((entry,), self.clock()))
            self.served_manifest.notify()

    def _recover_missing(self) -> None:
        if missing := self.own_records.missing():
            self.feed(j.LedgerFacts(tuple(missing), self.clock()))

    def _stop_if_behind(self) -> bool:
        """As `coordinator.runtime.split_brain`: stop if the ledger is not the newest. Returns whether it stopped."""
        if not self.own_records.ledger_is_behind():
            return False
        self.stopped_itself += 1
        self.crash()
        return True

    def _renew_records(self) -> None:
        """As `coordinator.service`: read own records from the DHT before they are replaced by renewed ones."""
        if self.recovering:
            self._recover_missing()
        if not self._stop_if_behind():
            drive(self.world.queue, self._announcer.renew(), _ignore)

    def _every(self, boot: int, seconds: float, call: Any) -> None:
        if boot == self.boot and self.running:
            call()
            self.world.queue.after(seconds, self._every, boot, seconds, call)

    def crash(self) -> None:
        """Everything but the ledger is lost: running checks, replies, acceptances that are not published yet."""
        if self.running:
            self.running = self.serving = False
            self.boot += 1
            self.world.dht.depart(self)
            self.view, self._since, self._nodes, self._views, self._auditors = LiveView(), {}, [], (), None
            self.lender = SimulatedLender(self)
            self._nodes_due = self._claims_due = self._sighted_until = float("-inf")

    # --- judging --------------------------------------------------------------------------------------------------------

    def offered(self, record: CheckpointRecord, sealed: bytes = b"", life: float = 0.0) -> OfferReply:
        """Judge an offer. `sealed`: its bytes, opened as by the real stream; empty in settings without signatures."""
        if sealed:
            try:
                open_record(
                    sealed, key=None, subkey=record.owner, expires=record.issued + life, now=self.clock(), limits=self._limits
                )
            except RecordRefused as error:
                return OfferReply(verdict="invalid", check="signature", text=str(error)[:1000])
        reply = self.feed(j.Offered(record, self.clock(), origin=record.peer_id))
        assert isinstance(reply, OfferReply)
        return reply

    def feed(self, stimulus: j.Stimulus) -> OfferReply | j.LendAudit | None:
        """Judge, write the ledger, then carry out."""
        world = self.world
        world.costs.judged += 1
        self.state, actions = world.decide.judge(self.rules, self.state, stimulus)
        if world.trace is not None:
            world.trace.judged(self, stimulus, actions)
        reply = None
        for action in actions:
            if isinstance(action, j.Write):
                self.ledger.append(action.event)
        world.invariants.after_judge(self, actions)
        for action in actions:
            match action:
                case j.Answer():
                    reply = action.reply
                case j.LendAudit():
                    reply = action
                case j.Publish():
                    world.blobs.put(action.record.digest, self)
                    if self.refuse_publishing:
                        self.refuse_publishing = False
                        world.queue.after(0.0, self.crash)
                    else:
                        self._announce(action.acceptance)
                case j.KeepResult(record=record):
                    world.blobs.put(record.digest, self)
                case j.StartMerge():
                    drive(world.queue, self._merge(action), partial(self._merged, self.boot, action))
                case j.StartFetch(record=record):
                    work = run_transfer(record, world.manifest, SimulatedCheckRunner(self), self.clock, action.patience)
                    self._work(work, partial(j.FetchDone, record))
                case j.StartCheck(record=record):
                    work = world.decide.run_checks(record, action.parent, world.manifest, self._runner(), self.clock)
                    self._work(work, partial(j.CheckDone, record))
                case j.StartAudit():
                    drive(world.queue, self._replay(action), partial(self._audited, self.boot, action))
                case j.StartProof():
                    drive(world.queue, self._replay(action.replay), partial(self._proved, self.boot, action))
                case j.PublishReset():
                    self._announce(action.record)
                case _:
                    pass
        return reply

    def _make_announcer(self) -> Announcer:
        """The real one; like a new process it knows nothing about earlier expiries."""
        monitor = cast(SwarmMonitor, self)  # of which it reads `view` alone
        return Announcer(SimulatedRecordStore(self), self.identity, lambda: self.rules, lambda: self.state.run, monitor)

    def _announce(self, record: AcceptanceRecord | ResetRecord) -> None:
        drive(self.world.queue, self._announcer.announce(record), _ignore)

    def _work(self, work: Coroutine[Any, Any, Verdict], done: Callable[[Verdict, float], j.Stimulus]) -> None:
        boot = self.boot

        def finished(verdict: Verdict) -> None:
            if boot == self.boot:
                self.feed(done(verdict, self.clock()))

        drive(self.world.queue, work, finished)

    def lend(self, asking: Node) -> j.LendAudit:
        """As `coordinator.runtime.audit_service`: lend an audit of a peer that is unrelated to the asking one."""
        known = [sighting.record for sighting in self.view.nodes] if self.world.config.operators else []
        lend = self.feed(j.AuditWanted(asking.machine.owner, self.clock(), relatives(asking.machine.owner, known)))
        assert isinstance(lend, j.LendAudit)
        return lend

    def receive_report(self, auditor: Node, checkpoint: str, finding: AuditFinding) -> None:
        """Take an audit report from the peer that it was lent to; ignore all others."""
        lent = self.state.lent.get(checkpoint)
        if lent is not None and lent.owner == auditor.machine.owner:
            self.feed(j.AuditDelivered(auditor.machine.owner, checkpoint, finding, 1.0, self.clock()))

    async def _merge(self, action: j.StartMerge) -> tuple[CheckpointRecord, Verdict]:
        """Merging reads as much as checking every source once; then the merged epoch is checked like a result."""
        world, config, shard = self.world, self.world.config, action.shard
        await SimulatedDelay(config.check_seconds / 3 * len(action.sources))
        contents = [world.blobs.contents[source.acceptance.checkpoint] for source in action.sources]
        content = merged_content(shard, action.epoch, contents)
        record = CheckpointRecord(
            run=world.manifest.run_id, owner=self.identity.public_key, issued=self.clock(), shard=shard, epoch=action.epoch,
            parent=action.parent and action.parent.checkpoint, weights=blob("weights" + content.weights, config.weights_bytes),
            state=blob("state" + content.weights, config.state_bytes), trace=blob("trace" + content.weights, 4096),
            samples=action.epoch * world.manifest.checkpoint_samples, loss=content.loss, peer_id=self.identity.peer_id,
        )  # fmt: skip
        world.blobs.contents[record.digest] = content
        world.blobs.put(record.digest, self)  # nodes that check it fetch it
        return record, await world.decide.run_checks(record, action.parent, world.manifest, self._runner(), self.clock)

    def _runner(self) -> SimulatedCheckRunner:
        return LentSimulatedCheckRunner(self, self.lender) if self.world.config.lent else SimulatedCheckRunner(self)

    def note(self, entry: Event) -> None:
        """Write an entry that the judge did not decide on."""
        self.feed(j.LedgerFacts((entry,), self.clock()))

    def _merged(self, boot: int, action: j.StartMerge, merged: tuple[CheckpointRecord, Verdict]) -> None:
        if boot == self.boot:
            sources = tuple(source.acceptance.checkpoint for source in action.sources)
            self.feed(j.Merged(action.shard, sources, *merged, self.clock()))

    async def _replay(self, action: j.StartAudit) -> AuditFinding:
        """A replay by the coordinator, at the speed of a node of speed 1."""
        world, steps = self.world, action.steps
        await SimulatedDelay(world.config.epoch_seconds * steps / world.manifest.steps_per_epoch)
        return replay_finding(world, action.audit)

    def _audited(self, boot: int, action: j.StartAudit, finding: AuditFinding) -> None:
        if boot == self.boot:
            self.feed(j.Audited(action.audit.checkpoint, finding, self.clock(), whole=action.audit.whole))

    def _proved(self, boot: int, action: j.StartProof, finding: AuditFinding) -> None:
        if boot == self.boot:
            self.feed(j.Proved(action.record, finding, self.clock()))

    # --- periodic work ---------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.feed(j.JudgeTick(self.clock(), self._auditors, self.view.at_work))

    def _poll(self) -> None:
        """As `coordinator.runtime.swarm_monitor`: read results that were not offered by stream, nodes and claims."""
        world, run = self.world, self.world.manifest.run_id
        for shard in range(world.config.shards):
            for stored in world.dht.read(self, checkpoint_key(run, shard)).values():
                if may_become_candidate(self.state.run, stored.record):
                    if world.trace is not None:
                        world.trace.record_read(self, stored)
                    self.feed(j.Offered(stored.record, self.clock(), "poll"))
        if fresh := self.clock() >= self._claims_due:
            self._views = world.dht.look(self, world.config.slots)
            self._claims_due = self.clock() + claims_pause(len(self._views), world.config.heartbeat)
            world.costs.looked(
                len(self._views), sum(len(view.claims) for view in self._views), world.config.replicas, world.dht.size, "watch"
            )
        now, config = self.clock(), world.config
        if listed := now >= self._nodes_due:
            self._nodes = [
                (sighting.record, sighting.expires) for peer, sighting in world.directory.values()
                if sighting.expires > now and (not peer.running or world.links.together(peer.index, self.index))
            ]  # fmt: skip
            self._nodes_due = now + nodes_pause(len(self._nodes), config.heartbeat)
            world.costs.listed(NODE_BUCKETS, len(self._nodes), config.replicas, world.dht.size, "watch")
        if not (fresh or listed or now >= self._sighted_until):
            return  # nothing was read, and nothing that was has expired
        nodes = [(record, expires) for record, expires in self._nodes if expires > now]
        claims = [(claim.record, claim.expires) for view in self._views for claim in view.claims]
        self._sighted_until = min([expires for _, expires in (*nodes, *claims) if expires > now], default=float("inf"))
        histories, at_work = self.view.histories, self.view.at_work
        self.view, self._since = sighted(nodes, claims, self._since, now)
        if fresh:
            known, longest_gap = self.state.run, LONGEST_GAP * world.manifest.timing.lease
            shards = map(known.slot_view, config.slots)
            histories = observed(histories, self.view.claims, shards, now, longest_gap)
            at_work = lanes_at_work(
                world.manifest, self.view.claims, histories, known.slot_view, known.quarantined, now
            )  # fmt: skip
        self.view = replace(self.view, histories=histories, at_work=at_work)
        self._auditors = free_auditors(self.view)

    def _check_status(self) -> None:
        """Build the status document and check it."""
        document = self.world.decide.status(self.state.run, self.world.manifest, self.view, self.clock())
        self.world.invariants.after_status(self, document)


def _ignore(_: None) -> None:
    """The result of a coroutine that returns nothing."""
