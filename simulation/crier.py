"""What a coordinator tells the DHT and finds there under its own key, as `coordinator.crier`, `recovery` and `rival`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..coordinator.auditing import standing
from ..coordinator.recovery import ahead
from ..coordinator.rival import doubtful
from ..protocol.events import AcceptanceRecovered, CheckpointAccepted
from ..protocol.records import (
    MAX_QUARANTINED,
    AcceptanceRecord,
    QuarantineRecord,
    RecordLimits,
    ResetRecord,
)  # fmt: skip

if TYPE_CHECKING:
    from .office import Office


class Crier:
    def __init__(self, office: Office, limits: RecordLimits) -> None:
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

    def lost(self) -> list[AcceptanceRecovered]:
        """What the DHT shows under its key and the ledger lacks."""
        now = self._office.clock()
        return [AcceptanceRecovered(time=now, acceptance=record) for record in ahead(self._office.state.run, self._own_word())]

    def behind(self) -> bool:
        """Whether the DHT shows an acceptance under its key that the ledger has never known."""
        doubts = [record for record in self._own_word() if doubtful(record, self._office.state.run, self._key)]
        if not doubts:
            return False
        ledger = self._office.ledger
        known = {event.acceptance.checkpoint for event in ledger if isinstance(event, CheckpointAccepted | AcceptanceRecovered)}
        return any(record.checkpoint not in known for record in doubts)

    def _own_word(self) -> list[AcceptanceRecord]:
        dht = self._world.dht
        found = [stored.record for key in dht.acceptance_keys for stored in dht.read(self._office, key).values()]
        return [record for record in found if isinstance(record, AcceptanceRecord) and record.owner == self._key]
