"""Who stands by replays the work of others: `node.services.auditor` and the coordinator's desk, in virtual time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import LendAudit, StartAudit
from lutetia.coordinator.ledger.run_state import PendingAudit
from lutetia.simulation.network.blobs import SimulatedDelay, drive
from lutetia.simulation.peers.streams import DIAL_TIMEOUT, shard_parcel
from lutetia.system.errors import UnreachableError

if TYPE_CHECKING:
    from lutetia.simulation.peers.coordinator import SimulatedCoordinator
    from lutetia.simulation.peers.node import SimulatedNode
    from lutetia.simulation.world import SimulatedWorld

_WATCH_SECONDS = 5.0

Word = Literal["honest", "valid", "invalid"]
"""What an auditor reports: what it found, or always the same, without a replay."""


def replay_steps(world: SimulatedWorld, audit: PendingAudit) -> int:
    """How many steps a replay takes."""
    return world.manifest.steps_per_epoch if audit.whole else world.manifest.audit.replay_steps


def found(world: SimulatedWorld, audit: PendingAudit) -> AuditFinding:
    """What a replay finds: the first steps tell who took none, all of them who faked the end."""
    faked = world.goods.contents[audit.checkpoint].faked
    caught = faked == "all" or (faked == "end" and audit.whole)
    return AuditFinding(outcome="invalid", text="the replay gave other losses") if caught else AuditFinding(outcome="valid")


class SimulatedAuditor:
    """A companion of one volunteer. `word`: see Word."""

    def __init__(self, box: SimulatedNode) -> None:
        self._box, self._world = box, box.world
        self.word: Word = "honest"

    def begin(self, boot: int, wait: float = 0.0) -> None:
        """Ask about once per heartbeat, or when the coordinator says, for as long as the process lives."""
        box = self._box
        pause = max(wait, self._world.setting.heartbeat) * (1 + box.rules.jitter("audit", int(box.clock())) / 4)
        self._world.agenda.after(pause, self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot != self._box.boot or not self._box.running:
            return
        if self._free(boot):
            drive(self._world.agenda, self._once(boot), lambda wait: self.begin(boot, wait))
        else:
            self.begin(boot)

    def _free(self, boot: int) -> bool:
        box = self._box
        fit = box.answering and box.device_ok and boot == box.boot
        return fit and box.state.phase == "idle" and box.state.disk_full_since is None

    async def _once(self, boot: int) -> float:
        """One audit, if there is one. Returns after how many seconds to ask again."""
        for office in self._world.offices:
            lend = await self._asked(office)
            if lend is None:
                continue
            if lend.audit is None:
                return lend.retry_after
            try:
                finding = await self._replayed(lend.audit, boot, lend.until)
            except UnreachableError:
                return 0.0
            if finding:
                await self._hand_in(office, lend.audit, finding, boot, lend.until)
        return 0.0

    async def _asked(self, office: SimulatedCoordinator) -> LendAudit | None:
        box, lines = self._box, self._world.lines
        if not lines.dials(box, office):
            await SimulatedDelay(DIAL_TIMEOUT)
            return None
        await SimulatedDelay(lines.stream(box, office) + lines.stream(office, box))
        self._world.costs.asked()
        return office.lend(box) if lines.dials(box, office) and office.serving else None

    async def _replayed(self, job: StartAudit, boot: int, until: float) -> AuditFinding | None:
        """None when its time was up, or the node got work of its own. Raises UnreachableError when a blob cannot be fetched."""
        box, world, audit = self._box, self._world, job.audit
        if self.word != "honest":
            return AuditFinding(outcome=self.word, text="as always")
        setting, own = world.setting, set(itertools.chain(*(shelf.digests for shelf in box.hands.shelves.values())))
        parcels = {shard_parcel(audit.shard): setting.shard_bytes}
        if job.parent:
            parcels[job.parent.checkpoint] = setting.weights_bytes + setting.state_bytes
        if audit.whole:
            parcels[audit.checkpoint] = setting.weights_bytes + setting.state_bytes
        fetched = [parcel for parcel in parcels if not world.goods.has(parcel, box)]
        try:
            for parcel in fetched:
                await world.goods.fetch(box, parcel, parcels[parcel], world.offices)
            left = setting.epoch_seconds * replay_steps(world, audit) / world.manifest.steps_per_epoch / box.box.speed
            while left > 0:
                if not self._free(boot) or box.clock() >= until:
                    return None
                part = min(left, _WATCH_SECONDS)
                await SimulatedDelay(part)
                left -= part
            return found(world, audit)
        finally:
            for parcel in fetched:
                if parcel not in own and not (box.state.work and parcel == box.state.work.checkpoint):
                    world.goods.drop(parcel, box)

    async def _hand_in(
        self, office: SimulatedCoordinator, job: StartAudit, finding: AuditFinding, boot: int, until: float
    ) -> None:
        """Again and again while it is wanted."""
        box, lines = self._box, self._world.lines
        for attempt in itertools.count(1):
            if boot != box.boot or not box.running:
                return
            if lines.dials(box, office):
                await SimulatedDelay(lines.stream(box, office, 4000))
                self._world.costs.asked()
                if lines.dials(box, office) and office.serving and boot == box.boot:
                    office.told(box, job.audit.checkpoint, finding)
                    return
            wait = box.rules.backoff(attempt, "audit")
            if box.clock() + wait > until:
                return
            await SimulatedDelay(wait)
