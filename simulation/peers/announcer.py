"""What a coordinator tells the DHT and finds there under its own key, as `coordinator.runtime.announcer`, `recovery` and
`rival`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lutetia.coordinator.acceptance.audit_policy import standing
from lutetia.coordinator.ledger.events import AcceptanceRecovered, CheckpointAccepted
from lutetia.coordinator.runtime.recovery import Recovered, Standing, ahead, forgotten, recovered
from lutetia.coordinator.runtime.split_brain import doubtful, unknown_term
from lutetia.protocol.schema.records import (
    MAX_QUARANTINED,
    AcceptanceRecord,
    QuarantineRecord,
    Record,
    RecordLimits,
    ResetRecord,
    quarantine_key,
)

if TYPE_CHECKING:
    from lutetia.simulation.peers.coordinator import SimulatedCoordinator


class SimulatedAnnouncer:
    def __init__(self, office: SimulatedCoordinator, limits: RecordLimits) -> None:
        self._office, self._world, self._limits = office, office.world, limits
        self._key = office.identity.public_key
        self._expiries: dict[str, float] = {}

    def publish(self, record: AcceptanceRecord | ResetRecord | QuarantineRecord) -> None:
        """What a roll-back leaves standing has somebody in quarantine, which is published with it."""
        office = self._office
        if not isinstance(record, QuarantineRecord) and record.term and office.state.run.quarantined:
            self.publish(self._quarantine())
        record, key = record.model_copy(update={"issued": office.clock()}), record.key()
        expires = max(office.clock() + self._limits.longest(record.kind), self._expiries.get(key, 0.0) + 0.001)
        self._expiries[key] = expires
        self._world.dht.store(office, record, expires, office.identity if self._world.setting.signed else None)

    def _quarantine(self) -> QuarantineRecord:
        """Who claims something first, then the newest."""
        office, run = self._office, self._office.state.run
        claiming = {claim.record.owner for claim in office.view.claims}
        known = sorted(run.quarantined.values(), key=lambda why: (why.owner not in claiming, -why.time))
        peers = tuple(why.owner for why in known[:MAX_QUARANTINED])
        return QuarantineRecord(run=run.run, owner=self._key, issued=office.clock(), peers=peers)

    def renew(self) -> None:
        office, run = self._office, self._office.state.run
        for index, shard in run.shards.items():
            if shard.acceptance or shard.term:
                self.publish(standing(office.rules, run, index, office.clock()))

    # --- its own word -----------------------------------------------------------------------------------------------------

    def lost(self) -> list[Recovered]:
        """What the DHT shows under its key and the ledger lacks."""
        run = self._office.state.run
        return recovered(ahead(run, self._own_word()), forgotten(run, self._own_quarantines()), self._office.clock())

    def behind(self) -> bool:
        """Whether the DHT shows an acceptance, roll-back or quarantine under its key that the ledger has never known."""
        run, words = self._office.state.run, self._own_word()
        if any(unknown_term(record, run) for record in words) or forgotten(run, self._own_quarantines()):
            return True
        doubts = [record for record in words if isinstance(record, AcceptanceRecord) and doubtful(record, run, self._key)]
        if not doubts:
            return False
        ledger = self._office.ledger
        known = {event.acceptance.checkpoint for event in ledger if isinstance(event, CheckpointAccepted | AcceptanceRecovered)}
        return any(record.checkpoint not in known for record in doubts)

    def _own_word(self) -> list[Standing]:
        found = [record for key in self._world.dht.acceptance_keys for record in self._own(key)]
        return [record for record in found if isinstance(record, AcceptanceRecord | ResetRecord)]

    def _own_quarantines(self) -> list[QuarantineRecord]:
        key = quarantine_key(self._office.state.run.run)
        return [record for record in self._own(key) if isinstance(record, QuarantineRecord)]

    def _own(self, key: str) -> list[Record]:
        return [stored.record for stored in self._world.dht.read(self._office, key).values() if stored.record.owner == self._key]
