"""The eight invariants of the design, checked after every event against what really happened, not against what peers report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lutetia.coordinator.acceptance.messages import Publish, Write
from lutetia.coordinator.ledger.events import LaneAccepted, LineageRolledBack
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.node.pacing import LATEST_MANIFEST_QUESTION
from lutetia.protocol.claims import shard_and_lane, slot_name
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.simulation.interfaces import Coordinator, Node, World
from lutetia.simulation.utilisation import Utilisation

NAMES = {
    "I1": "at most one accepted lineage per (shard, epoch)",
    "I2": "accepted bytes match their digest and load with the manifest's shapes",
    "I3": "no accepted work is lost once two peers hold it",
    "I4": "every free shard is claimed within two lease times while a fit peer lives",
    "I5": "a trainer runs exactly while the state machine wants it, and none runs after its node has left",
    "I6": "the status never calls a peer working whose last accepted work is too long ago",
    "I7": "same seed and data, same weights",
    "I8": "no fit peer is idle for two lease times while a lane has been free as long",
    "end": "a condition at the end of the scenario",
}


class Violation(AssertionError):
    """An invariant was violated at `time`. `causes`: numbers of trace entries that led to it, beside the last one."""

    def __init__(self, name: str, text: str, time: float, causes: Sequence[int] = ()) -> None:
        super().__init__(f"{name} ({NAMES[name]}): {text}")
        self.name, self.text, self.time, self.causes = name, text, time, causes


class Invariants:
    def __init__(self, world: World) -> None:
        self._world = world
        self.checks: Counter[str] = Counter()
        config = world.config
        self.accepted: dict[tuple[int, int], str] = {}
        self._accepting: dict[tuple[int, int], int] = {}
        """The trace entry in which each epoch was accepted."""
        self._ever: dict[tuple[int, int], set[str]] = {}
        """All checkpoints that were ever accepted there, rolled back or not."""
        self.rolled_back = 0
        self.heads = [0] * config.shards
        self._holders = dict.fromkeys(config.slots, 0)
        self._free_number = dict.fromkeys(config.slots, 0)
        self._free_from = dict.fromkeys(config.slots, 0.0)
        self._claim_expires = dict.fromkeys(config.slots, 0.0)
        self._works: dict[tuple[str, int], list[float]] = {}
        self.utilisation = Utilisation()
        for slot in config.slots:
            self._became_free(slot)
        world.queue.after(config.lease, self._look_at_all)

    def _fail(self, name: str, text: str, *causes: int) -> None:
        raise Violation(name, text, self._world.queue.now, causes)

    # --- nodes ----------------------------------------------------------------------------------------------------------

    def after_peer(self, peer: Node) -> None:
        """After every event of a node's state machine, and after its process ended."""
        state, trainer, checks = peer.state, peer.trainer.training, self.checks
        work = state.work if peer.running else None
        checks["I5"] += 1
        runs, wanted = trainer is not None or peer.trainer.exiting, work is not None and work.trainer == "on"
        if runs != wanted or (trainer is not None and not peer.running):
            self._fail("I5", f"{peer} in phase {state.phase}: its state machine wants a trainer: {wanted}, but it has {trainer}")
        if trainer is not None and trainer.shard != work.shard:  # pyright: ignore[reportOptionalMemberAccess]
            self._fail("I5", f"{peer} trains shard {trainer.shard}, but its state machine works on shard {work and work.shard}")
        if work is not None and work.checkpoint is not None:
            checks["I1"] += 1
            shard = shard_and_lane(work.shard)[0]
            if work.checkpoint not in self._ever.get((shard, work.epoch), ()):
                place = f"epoch {work.epoch} of shard {shard}"
                text = f"{peer} trains on {work.checkpoint[:12]} as {place}, which was never accepted"
                self._fail("I1", text)
        self._follow_holder(peer, work)
        standby = peer.running and not peer.frozen and state.online and state.phase in ("idle", "claiming")
        if not standby or state.disk_full_since is not None:
            peer.eligible_since = None
        elif peer.eligible_since is None:
            peer.eligible_since = self._world.queue.now

    def _follow_holder(self, peer: Node, work: Any) -> None:
        """Note which shard this node holds or is about to hold."""
        state = peer.state
        holds = None
        if work is not None and work.owned and not work.checking:
            holds = work.shard
        elif peer.running and state.phase == "claiming" and state.stage in ("settle", "decide"):
            holds = state.target
        if holds == peer.holds:
            return
        before, peer.holds = peer.holds, holds
        if holds is not None:
            self._holders[holds] += 1
            self._free_number[holds] += 1
        if before is not None:
            self._holders[before] -= 1
            if self._holders[before] == 0:
                self._became_free(before)

    # --- I4 ---------------------------------------------------------------------------------------------------------------

    def claimed(self, shard: int, expires: float, *, released: bool) -> None:
        """A claim was published. A released one keeps no other node away."""
        if not released:
            self._claim_expires[shard] = max(self._claim_expires[shard], expires)

    def _became_free(self, shard: int, again: bool = False) -> None:
        """No node holds the shard. It is free once the last claim has expired; then the two leases of I4 begin.

        `again`: it has been free before, and nobody could claim it.
        """
        self._free_number[shard] += 1
        world = self._world
        free_from = max(world.queue.now, min(self._claim_expires[shard], world.queue.now + world.config.lease))
        if not again:
            self._free_from[shard] = free_from
        world.queue.after(
            free_from - world.queue.now + 2 * world.config.lease, self._still_free, shard, self._free_number[shard], free_from
        )

    def budget_changed(self) -> None:
        """A newer manifest raises the budget: complete shards are free again once all nodes have asked for it."""
        world = self._world
        for shard, holders in self._holders.items():
            if not holders:
                self._free_number[shard] += 1
                free_from = self._free_from[shard] = world.queue.now + LATEST_MANIFEST_QUESTION * world.config.lease
                wait = free_from - world.queue.now + 2 * world.config.lease
                world.queue.after(wait, self._still_free, shard, self._free_number[shard], free_from)

    def _still_free(self, shard: int, number: int, free_from: float) -> None:
        world = self._world
        self.checks["I4"] += 1
        if number != self._free_number[shard] or self.heads[shard_and_lane(shard)[0]] >= world.manifest.epochs:
            return
        if (peer := self._fit_for(shard, self._idle(free_from), free_from)) is not None:
            self._fail("I4", f"{slot_name(shard)} has been free for two leases, and {peer} was idle all the time")
        self._became_free(shard, again=True)

    def _idle(self, since: float) -> list[Node]:
        """The nodes that were idle since then. Nobody takes work of a quarantined node, so it waits for none."""
        world, skew = self._world, self._world.manifest.timing.maximum_clock_skew
        quarantined = world.coordinators[0].state.run.quarantined
        return [
            peer for peer in world.nodes
            if (eligible := peer.eligible_since) is not None and eligible <= since and peer.answering
            and abs(peer.skew) <= skew and peer.machine.owner not in quarantined
        ]  # fmt: skip

    def _fit_for(self, slot: int, idle: Sequence[Node], since: float, *, able: bool = False) -> Node | None:
        """One of the `idle` nodes that thinks that the slot fits it, or with `able` one that it really fits, since then."""
        world, shard = self._world, shard_and_lane(slot)[0]
        for peer in idle:
            if (
                slot in peer.state.taken
                or peer.host.manifest_updates.live.version < world.manifest.version
                or not peer.machine.fitness.get(shard, 0) > 0
            ):
                continue
            if peer.state.avoided_until.get(slot, 0.0) - peer.skew > since:
                continue
            if able:
                fits = peer.device_ok and peer.rules.fitness_of(slot, peer.machine.fitness[shard], peer.trainer.rate) > 0
            else:
                fits = peer.state.fitness.get(slot, 0) > 0
            if fits:
                return peer
        return None

    # --- I8 ---------------------------------------------------------------------------------------------------------------

    def _look_at_all(self) -> None:
        """Once per lease: who works, and whether a node and a lane wait for each other."""
        world, now, lease = self._world, self._world.queue.now, self._world.config.lease
        self.checks["I8"] += 1
        self.utilisation.add(world.nodes)
        epochs, idle = world.manifest.epochs, self._idle(now - 2 * lease)
        for slot, held in self._holders.items() if idle else ():
            free = not held and self._free_from[slot] <= now - 2 * lease and self.heads[shard_and_lane(slot)[0]] < epochs
            if free and (peer := self._fit_for(slot, idle, now - 2 * lease, able=True)) is not None:
                self._fail("I8", f"{peer} has had no work for two leases, and {slot_name(slot)} was free all the time")
        world.queue.after(lease, self._look_at_all)

    # --- the coordinator --------------------------------------------------------------------------------------------------

    def after_judge(self, coordinator: Coordinator, actions: Sequence[Any]) -> None:
        """After every decision of a coordinator."""
        self.checks["I3"] += 1
        run = coordinator.state.run
        for action in actions:
            if isinstance(action, Publish):
                self._check_acceptance(action)
                self._check_kept(coordinator, action.acceptance.shard, run)
            elif isinstance(action, Write) and isinstance(action.event, LineageRolledBack):
                self._check_roll_back(action.event)
            elif isinstance(action, Write) and isinstance(action.event, LaneAccepted):
                given = action.event.acceptance
                self._works.setdefault((given.author, given.shard), []).append(self._world.queue.now)

    def _check_acceptance(self, action: Publish) -> None:
        given, world = action.acceptance, self._world
        place = given.shard, given.epoch
        self.checks["I1"] += 1
        known, cause = self.accepted.setdefault(place, given.checkpoint), self._accepting.setdefault(place, world.queue.cause)
        if known != given.checkpoint:
            text = f"epoch {given.epoch} of shard {given.shard} was accepted as {known[:12]} and as {given.checkpoint[:12]}"
            self._fail("I1", text, cause)
        self._ever.setdefault(place, set()).add(given.checkpoint)
        parent = self.accepted.get((given.shard, given.epoch - 1))
        if given.parent != parent:
            self._fail("I1", f"epoch {given.epoch} of shard {given.shard} has parent {given.parent}, but {parent} was accepted")
        self.heads[given.shard] = max(self.heads[given.shard], given.epoch)
        self.checks["I2"] += 1
        content = world.blobs.contents.get(given.checkpoint)
        if content is None or not (content.intact and content.sound):
            self._fail("I2", f"accepted epoch {given.epoch} of shard {given.shard} is {content}")
        self._works.setdefault((given.author, given.shard), []).append(world.queue.now)

    def _check_roll_back(self, event: LineageRolledBack) -> None:
        """Only a faked epoch may be rolled back, with those after it."""
        self.checks["I3"] += 1
        if self._world.blobs.contents[event.checkpoint].faked == "none":
            self._fail("I3", f"honest epoch {event.epoch + 1} of shard {event.shard} was rolled back ({event.checkpoint[:12]})")
        for epoch in range(event.epoch + 1, self.heads[event.shard] + 1):
            self.accepted.pop((event.shard, epoch), None)
            self._accepting.pop((event.shard, epoch), None)
            self.rolled_back += 1
        self.heads[event.shard] = event.epoch

    def _check_kept(self, coordinator: Coordinator, shard: int, run: RunState) -> None:
        if run.shards[shard].epoch < self.heads[shard]:
            text = f"{coordinator} is at epoch {run.shards[shard].epoch} of shard {shard}; {self.heads[shard]} was accepted"
            self._fail("I3", text, self._accepting.get((shard, self.heads[shard]), -1))

    def after_restart(self, coordinator: Coordinator) -> None:
        """A coordinator restarted from its ledger."""
        for shard in range(len(self.heads)):
            self.checks["I3"] += 1
            self._check_kept(coordinator, shard, coordinator.state.run)

    def after_loss(self, parcels: Sequence[str]) -> None:
        """A disk with these parcels failed: a copy of every accepted head must be left."""
        for shard, epoch in enumerate(self.heads):
            head = self.accepted.get((shard, epoch))
            if head in parcels:
                self.checks["I3"] += 1
                if head is not None and not self._world.blobs.holders.get(head):
                    self._fail("I3", f"no copy of accepted epoch {epoch} of shard {shard} is left")

    def after_status(self, coordinator: Coordinator, document: SwarmStatus) -> None:
        """I6, from the real acceptances: the last is at most twice the longest interval between them ago, plus a lease."""
        now, timing = self._world.queue.now, self._world.manifest.timing
        for node in document.nodes:
            if node.health != "working":
                continue
            self.checks["I6"] += 1
            times = self._works.get((node.owner, node.shard if node.shard is not None else -1), [])
            gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
            allowed = max([timing.tenure, timing.lease, *(2 * gap + timing.lease for gap in gaps)])
            if not times or now - times[-1] > allowed + 1:
                last = f"{now - times[-1]:.0f} s ago" if times else "never"
                self._fail("I6", f"status calls {node.owner[:8]} working on shard {node.shard}; its last accepted work: {last}")

    # --- I7 ---------------------------------------------------------------------------------------------------------------

    def trained(self, peer: Node, record: CheckpointRecord, weights: str, uninterrupted: str) -> None:
        """An honest node finished an epoch, perhaps after interruptions: its weights must be those of an uninterrupted run."""
        self.checks["I7"] += 1
        if weights != uninterrupted:
            place = f"epoch {record.epoch} of shard {record.shard}"
            self._fail("I7", f"{peer} finished {place} with weights {weights[:12]}; uninterrupted: {uninterrupted[:12]}")
