"""One volunteer: the real node machine, and a model of the shell around it (clock, timers, network side, hands)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..node import messages as m
from ..node.duty import pace
from ..node.state import Rules, State, next_wake
from ..protocol.canonical import canonical
from ..protocol.records import ClaimRecord, Hardware, NodeRecord, claim_key, quarantine_key, seal
from ..protocol.status_view import Sighting
from .audits import Auditor
from .goods import drive
from .hands import Hands
from .setting import Box
from .visits import offer_round, sync_round

if TYPE_CHECKING:
    from .world import World

_PROBE_SECONDS = 0.5
_LAST_WORDS = 1.0
_TICK = 1e-6  # a timer must not come a rounding error too early
_ANNOUNCE_EVERY = 10  # heartbeats: a third of a provider record's life


class Volunteer:
    """`boot` counts its starts: what an earlier process asked for does not reach a later one."""

    def __init__(self, world: World, index: int, box: Box) -> None:
        self.world, self.index, self.box = world, index, box
        self.line, self.up, self.skew = box.line, box.up, box.skew
        self.rules = Rules.of(world.manifest, box.owner)
        self.state = State()
        self.running = self.online = self.frozen = self.denies = self.disk_full = False
        self.device_ok = True
        self.met = self.newer = False
        self.boot = self.joins = self.sync_number = self.beats = 0
        self.parts: dict[str, dict[str, Any]] = {}
        self.written: set[str] = set()
        self.quarantined: frozenset[str] = frozenset()
        self._quarantine_seen = float("-inf")
        self.acceptances: dict[int, Any] = {}
        self.hands = Hands(self)
        self.auditor = Auditor(self)
        self.holds: int | None = None
        self.eligible_since: float | None = None
        self._expiries: dict[str, float] = {}
        self._filed: dict[str, float] = {}
        self._backlog: list[tuple[Callable[..., m.Event], tuple[Any, ...]]] = []
        self._timer = float("inf")
        self._node: NodeRecord | None = None

    def __repr__(self) -> str:
        return f"peer {self.index}"

    @property
    def answering(self) -> bool:
        return self.running and self.online and not self.frozen

    def clock(self) -> float:
        return self.world.agenda.now + self.skew

    # --- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The process begins, with whatever its disk holds."""
        if self.running:
            return
        self.boot += 1
        self.running, self.frozen, self.online = True, False, False
        remembered = frozenset(shard for shard, shelf in self.hands.shelves.items() if shelf.kept or shelf.local)
        self.state = State(since=self.clock(), remembered=remembered)
        self._timer = float("inf")
        self._join(self.boot, 1)

    def _join(self, boot: int, attempt: int) -> None:
        """Dial the bootstrap peers and, if this box has been here before, whomever it met."""
        if boot != self.boot or not self.running or self.online:
            return
        if not self.world.greets(self):
            self.world.agenda.after(self.rules.backoff(attempt, "rejoin"), self._join, boot, attempt + 1)
            return
        self.world.agenda.after(6 * self.world.lines.packet(self, self), self._joined, boot)

    def _joined(self, boot: int) -> None:
        if boot != self.boot or not self.running or self.online:
            return
        self.online = self.met = True
        self.joins += 1
        self._expiries.clear()
        self._filed.clear()
        self.world.dht.enter(self, self.box.peer_id)
        if self.state.phase == "joining":
            self.hear(boot, m.Joined)
            self.auditor.begin(boot)
        else:
            self.hear(boot, m.NetworkBack)
        self.world.agenda.after(self.rules.lease / 2, self._list, boot, self.joins)

    def lose_network(self) -> None:
        """p2pd died: it is started anew at once."""
        if self.online:
            self.online = False
            self.world.dht.depart(self)
            self.hear(self.boot, m.NetworkLost)
            self._join(self.boot, 1)

    def kill(self) -> None:
        """SIGKILL, or the power cut."""
        if not self.running:
            return
        self.hands.stop(save=False)
        self._gone()

    def _gone(self) -> None:
        self.running = self.frozen = False
        self.boot += 1
        if self.online:
            self.online = False
            self.world.dht.depart(self)
        self._backlog.clear()
        self.world.invariants.after_peer(self)

    def freeze(self) -> None:
        """SIGSTOP, or a closed lid: the clock goes on, nothing else does."""
        if self.running and not self.frozen:
            self.hands.freeze()
            self.frozen = True
            self.world.dht.changed()

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.frozen = False
        self.world.dht.changed()
        self.hands.thaw()
        backlog, self._backlog = self._backlog, []
        for kind, arguments in backlog:
            self.hear(self.boot, kind, *arguments)
        if self.running:
            self.hear(self.boot, m.Tick)

    # --- the machine ----------------------------------------------------------------------------------------------------

    def soon(self, kind: Callable[..., m.Event], *arguments: Any) -> None:
        """An event that follows at once, but not within the same call of the machine."""
        self.world.agenda.after(0.0, self.hear, self.boot, kind, *arguments)

    def hear(self, boot: int, kind: Callable[..., m.Event], *arguments: Any) -> None:
        """Feed the machine an event of this moment; a stopped process hears it when it wakes."""
        if boot != self.boot or not self.running:
            return
        if self.frozen:
            self._backlog.append((kind, arguments))
            return
        world = self.world
        event = kind(self.clock(), *arguments)
        if kind is m.TrainerExited:
            self.hands.exiting = False
        before = self.state.phase
        self.state, actions = world.decide.advance(self.rules, self.state, event)
        if world.story is not None:
            world.story.machine(self, event, before, actions)
        for action in actions:
            if type(action) is not m.Report:
                _DO[type(action)](self, action)
        world.invariants.after_peer(self)
        if self.running:
            self._arm()

    def _arm(self) -> None:
        due = next_wake(self.rules, self.state)
        if due is None:
            return
        now = self.world.agenda.now
        wait = min(max(0.0, due - self.skew - now), self.rules.heartbeat) + _TICK
        if self._timer > now + wait or self._timer < now:
            self._timer = now + wait
            self.world.agenda.after(wait, self._wake, self.boot, self._timer)

    def _wake(self, boot: int, timer: float) -> None:
        if boot != self.boot or timer != self._timer:
            return
        self._timer = float("inf")
        if self.frozen:
            self._backlog.append((m.Tick, ()))
            return
        due = next_wake(self.rules, self.state)
        if due is not None and due <= self.clock():
            self.hear(boot, m.Tick)
        elif self.running:
            self._arm()

    # --- what the machine asks for ----------------------------------------------------------------------------------------

    def _probe(self, action: m.Probe) -> None:
        self.world.agenda.after(_PROBE_SECONDS, self._probed, self.boot)

    def _probed(self, boot: int) -> None:
        if self.device_ok:
            self.hear(boot, m.Probed, self.box.fitness)
        else:
            self.hear(boot, m.ProbeFailed, "no driver")

    def _look(self, action: m.Look) -> None:
        if self.online:
            seconds = self.world.lines.look(self, len(action.shards))
            self.world.agenda.after(seconds / 2, self._read, self.boot, action.shards, seconds / 2)

    def _read(self, boot: int, shards: tuple[int, ...], rest: float) -> None:
        """The replicas answer with what they hold now."""
        if boot != self.boot or not self.answering:
            return
        world = self.world
        views = world.dht.look(self, shards)
        if world.quarantining:
            views = self._unclaimed_by_the_quarantined(views)
        world.costs.looked(len(shards), sum([len(view.claims) for view in views]), world.setting.replicas, world.dht.size)
        if world.story is not None:
            world.story.read(self, shards)
        world.agenda.after(rest, self._seen, boot, views)

    def _unclaimed_by_the_quarantined(self, views: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `node.network`: who is quarantined is asked once per heartbeat, and its claims do not count."""
        if self.clock() - self._quarantine_seen >= self.rules.heartbeat:
            self._quarantine_seen = self.clock()
            found = self.world.dht.read(self, quarantine_key(self.rules.run)).values()
            self.quarantined = frozenset(owner for stored in found for owner in stored.record.peers)
        lost = self.quarantined
        return tuple(
            view if lost.isdisjoint(view.claimants) else view.with_claims(c for c in view.claims if c.record.owner not in lost)
            for view in views
        )

    def _seen(self, boot: int, views: tuple[Any, ...]) -> None:
        if boot == self.boot:
            for view in views:
                if view.acceptance is not None:
                    self.acceptances[view.shard] = view.acceptance
            self.hear(boot, m.SwarmSeen, views)

    def _list(self, boot: int, joins: int) -> None:
        """As `node.roster`: who is online, and what of it is ours to look after."""
        if boot != self.boot or joins != self.joins or not self.running:
            return
        world, wait = self.world, self.rules.lease / 2
        if self.answering:
            roster = world.roster(self)
            buckets, records = roster.read_by(self.box.owner)
            world.costs.listed(buckets, records, world.setting.replicas, world.dht.size)
            wait *= pace(records)
            if self.state.duty is not None or self.state.phase in ("idle", "claiming"):
                self.hear(boot, m.DutyGiven, roster.duties.get(self.box.owner), self.clock() + 2 * wait)
        world.agenda.after(wait, self._list, boot, joins)

    def _publish_claim(self, action: m.PublishClaim) -> None:
        self._file_claim(action.claim)

    def _file_claim(self, claim: m.Claim) -> None:
        if not self.online:
            return
        record = ClaimRecord.model_construct(
            run=self.rules.run, owner=self.box.owner, issued=self.clock(), shard=claim.shard, epoch=claim.epoch,
            samples=claim.samples, state=claim.state,
        )  # fmt: skip
        expires = self.file(record, claim_key(self.rules.run, claim.shard), self.rules.lease)
        self.world.invariants.claimed(claim.shard, expires - self.skew, released=claim.state == "released")

    def file(self, record: Any, key: str, ttl: float) -> float:
        """As `services.publish`: a record never expires before the one that it replaces. Returns the expiry."""
        expires = max(self.clock() + ttl, self._expiries.get(key, 0.0) + 0.001)
        self._expiries[key] = expires
        self.world.dht.store(self, record, expires, self.box.identity, self.sealed(record, expires) if self.newer else b"")
        return expires

    def sealed(self, record: Any, expires: float) -> bytes:
        """As this box's version writes it: a newer one adds a field that others do not know."""
        assert self.box.identity
        document = json.loads(seal(record, self.box.identity, expires))
        return canonical({**document, "record": {**document["record"], "novelty": 1}} if self.newer else document)

    def _renew(self, action: m.RenewRecords) -> None:
        if not self.online:
            return
        if action.claim is not None:
            self._file_claim(action.claim)
        world, work = self.world, self.state.work
        now = self.clock()
        shard = work.shard if work else None
        if self._node is None or (self._node.state, self._node.shard) != (self.state.phase, shard):
            self._node = NodeRecord.model_construct(
                run=self.rules.run, owner=self.box.owner, issued=now, peer_id=self.box.peer_id, addresses=(), hardware=_HARDWARE,
                samples_per_second=self.hands.speed * 16, software="simulated", state=self.state.phase, shard=shard,
                operator=self.box.operator,
            )  # fmt: skip
        world.directory[self.box.owner] = (self, Sighting(self._node, now + self.rules.lease, now))
        world.costs.stored("node", world.setting.replicas, world.dht.size)
        self.beats += 1
        if self.beats % _ANNOUNCE_EVERY == 0 and self.hands.shelves:
            parcels = sum(1 + len(shelf.kept) for shelf in self.hands.shelves.values())
            world.costs.stored("provider", world.setting.replicas, world.dht.size, 2 * parcels)

    def _sync(self, action: m.Sync) -> None:
        self.sync_number += 1
        boot, number = self.boot, self.sync_number

        def done(event: tuple[Any, ...]) -> None:
            if number == self.sync_number and self.state.phase == "syncing":
                self.hear(boot, *event)

        drive(self.world.agenda, sync_round(self, action, boot), done)

    def _publish_checkpoint(self, action: m.PublishCheckpoint) -> None:
        boot, candidate = self.boot, action.candidate
        drive(
            self.world.agenda, offer_round(self, candidate, boot),
            lambda answer: self.hear(boot, m.OfferAnswered, candidate.digest, *answer),
        )  # fmt: skip

    def first_filing(self, digest: str, again_after: float) -> bool:
        """Whether a checkpoint's record is to be filed (again)."""
        now = self.world.agenda.now
        if now - self._filed.get(digest, -1e9) < again_after:
            return False
        self._filed = {digest: now}
        return True

    def _superseded(self, action: m.Superseded) -> None:
        self.hands.forget(action.shard, below=action.epoch)

    def _discard(self, action: m.DiscardWork) -> None:
        self.hands.forget(action.shard, above=-1 if action.epoch is None else action.epoch)

    def _leave(self, action: m.Leave) -> None:
        self.world.agenda.after(_LAST_WORDS, self._left, self.boot)

    def _left(self, boot: int) -> None:
        if boot == self.boot and self.running:
            self._gone()


_HARDWARE = Hardware(device="cuda", memory_bytes=1 << 34, cores=8)
_DO: dict[type, Callable[[Volunteer, Any], None]] = {
    m.Probe: Volunteer._probe,
    m.Look: Volunteer._look,
    m.PublishClaim: Volunteer._publish_claim,
    m.RenewRecords: Volunteer._renew,
    m.Sync: Volunteer._sync,
    m.StartTrainer: lambda peer, action: peer.hands.start(action),
    m.AllowEpochs: lambda peer, action: peer.hands.allow(action.until),
    m.StopTrainer: lambda peer, action: peer.hands.stop(save=action.save),
    m.PublishCheckpoint: Volunteer._publish_checkpoint,
    m.DiscardWork: Volunteer._discard,
    m.Superseded: Volunteer._superseded,
    m.Leave: Volunteer._leave,
}
