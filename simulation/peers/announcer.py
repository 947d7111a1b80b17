"""What a coordinator reads under its own key in the DHT, and the record store through which the real `Announcer` publishes.

The reading follows `coordinator.runtime.recovery` and `split_brain`, whose own loops need an asyncio event loop.
"""

from __future__ import annotations

from lutetia.coordinator.ledger.events import AcceptanceRecovered, CheckpointAccepted, LanesMerged
from lutetia.coordinator.runtime.recovery import Recovered, Standing, ahead, forgotten, recovered
from lutetia.coordinator.runtime.split_brain import doubtful, unknown_term
from lutetia.protocol.schema.records import AcceptanceRecord, QuarantineRecord, Record, ResetRecord, quarantine_key, read_envelope
from lutetia.protocol.transport.base import StoredValue
from lutetia.simulation.interfaces import Coordinator


class SimulatedRecordStore:
    """The DHT as the coordinator's `Announcer` sees it. It never waits, so the announcer needs no event loop."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._world = coordinator, coordinator.world

    def now(self) -> float:
        return self._coordinator.clock()

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        sealed = value if self._world.config.signed else b""
        self._world.dht.store(self._coordinator, read_envelope(value), expires, None, sealed)
        return True

    async def get(self, key: str) -> dict[str, StoredValue]:
        """The sealed records under `key`; unsigned runs hold records as objects and have no bytes to give."""
        held = self._world.dht.read(self._coordinator, key)
        return {owner: StoredValue(stored.sealed, stored.expires) for owner, stored in held.items() if stored.sealed}


class OwnRecords:
    """The coordinator's own records in the DHT, compared with its ledger."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._world = coordinator, coordinator.world
        self._key = coordinator.identity.public_key

    def missing(self) -> list[Recovered]:
        """Ledger entries for what the DHT shows under its key and the ledger lacks."""
        run = self._coordinator.state.run
        return recovered(ahead(run, self._standing()), forgotten(run, self._quarantines()), self._coordinator.clock())

    def ledger_is_behind(self) -> bool:
        """Whether the DHT shows an acceptance, rollback or quarantine under its key that the ledger has never contained."""
        run, records = self._coordinator.state.run, self._standing()
        if any(unknown_term(record, run) for record in records) or forgotten(run, self._quarantines()):
            return True
        doubts = [record for record in records if isinstance(record, AcceptanceRecord) and doubtful(record, run, self._key)]
        if not doubts:
            return False
        ledger = self._coordinator.ledger
        known = {
            event.acceptance.checkpoint
            for event in ledger
            if isinstance(event, CheckpointAccepted | LanesMerged | AcceptanceRecovered)
        }
        return any(record.checkpoint not in known for record in doubts)

    def _standing(self) -> list[Standing]:
        records = [record for key in self._world.dht.acceptance_keys for record in self._read(key)]
        return [record for record in records if isinstance(record, AcceptanceRecord | ResetRecord)]

    def _quarantines(self) -> list[QuarantineRecord]:
        key = quarantine_key(self._coordinator.state.run.run)
        return [record for record in self._read(key) if isinstance(record, QuarantineRecord)]

    def _read(self, key: str) -> list[Record]:
        stored = self._world.dht.read(self._coordinator, key).values()
        return [item.record for item in stored if item.record.owner == self._key]
