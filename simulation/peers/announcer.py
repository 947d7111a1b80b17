"""What a coordinator tells the DHT and finds there under its own key, as `coordinator.runtime.announcer`, `recovery` and
`rival`.
"""

from __future__ import annotations

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
from lutetia.simulation.interfaces import Coordinator


class SimulatedAnnouncer:
    def __init__(self, coordinator: Coordinator, limits: RecordLimits) -> None:
        self._coordinator, self._world, self._limits = coordinator, coordinator.world, limits
        self._key = coordinator.identity.public_key
        self._expiries: dict[str, float] = {}

    def publish(self, record: AcceptanceRecord | ResetRecord | QuarantineRecord) -> None:
        """What a roll-back leaves standing has somebody in quarantine, which is published with it."""
        coordinator = self._coordinator
        if not isinstance(record, QuarantineRecord) and record.term and coordinator.state.run.quarantined:
            self.publish(self._quarantine())
        record, key = record.model_copy(update={"issued": coordinator.clock()}), record.key()
        expires = max(coordinator.clock() + self._limits.longest(record.kind), self._expiries.get(key, 0.0) + 0.001)
        self._expiries[key] = expires
        self._world.dht.store(coordinator, record, expires, coordinator.identity if self._world.config.signed else None)

    def _quarantine(self) -> QuarantineRecord:
        """Who claims something first, then the newest."""
        coordinator, run = self._coordinator, self._coordinator.state.run
        claiming = {claim.record.owner for claim in coordinator.view.claims}
        known = sorted(run.quarantined.values(), key=lambda why: (why.owner not in claiming, -why.time))
        peers = tuple(why.owner for why in known[:MAX_QUARANTINED])
        return QuarantineRecord(run=run.run, owner=self._key, issued=coordinator.clock(), peers=peers)

    def renew(self) -> None:
        coordinator, run = self._coordinator, self._coordinator.state.run
        for index, shard in run.shards.items():
            if shard.acceptance or shard.term:
                self.publish(standing(coordinator.rules, run, index, coordinator.clock()))

    # --- its own word -----------------------------------------------------------------------------------------------------

    def lost(self) -> list[Recovered]:
        """What the DHT shows under its key and the ledger lacks."""
        run = self._coordinator.state.run
        return recovered(ahead(run, self._own_word()), forgotten(run, self._own_quarantines()), self._coordinator.clock())

    def behind(self) -> bool:
        """Whether the DHT shows an acceptance, roll-back or quarantine under its key that the ledger has never known."""
        run, words = self._coordinator.state.run, self._own_word()
        if any(unknown_term(record, run) for record in words) or forgotten(run, self._own_quarantines()):
            return True
        doubts = [record for record in words if isinstance(record, AcceptanceRecord) and doubtful(record, run, self._key)]
        if not doubts:
            return False
        ledger = self._coordinator.ledger
        known = {event.acceptance.checkpoint for event in ledger if isinstance(event, CheckpointAccepted | AcceptanceRecovered)}
        return any(record.checkpoint not in known for record in doubts)

    def _own_word(self) -> list[Standing]:
        found = [record for key in self._world.dht.acceptance_keys for record in self._own(key)]
        return [record for record in found if isinstance(record, AcceptanceRecord | ResetRecord)]

    def _own_quarantines(self) -> list[QuarantineRecord]:
        key = quarantine_key(self._coordinator.state.run.run)
        return [record for record in self._own(key) if isinstance(record, QuarantineRecord)]

    def _own(self, key: str) -> list[Record]:
        return [
            stored.record for stored in self._world.dht.read(self._coordinator, key).values() if stored.record.owner == self._key
        ]
