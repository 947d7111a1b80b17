"""Keeps the coordinator's records in the DHT: the newest acceptance or reset of each shard, and the quarantined peers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.rollback import standing
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.runtime.swarm_monitor import SwarmMonitor
from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import MAX_QUARANTINED, AcceptanceRecord, QuarantineRecord, RecordLimits, ResetRecord
from lutetia.protocol.transport.base import RecordStore

_log = logging.getLogger(__name__)


@dataclass
class Announcer:
    """`rules` and `run` return the newest state. `swarm_monitor`, set once it exists, knows which peers hold claims now."""

    transport: RecordStore
    identity: Identity
    rules: Callable[[], JudgeRules]
    run: Callable[[], RunState]
    swarm_monitor: SwarmMonitor | None = field(default=None)

    async def announce(self, record: AcceptanceRecord | ResetRecord) -> None:
        """Publish an acceptance, or what is accepted after a rollback; a rollback has quarantined a peer, too."""
        await self._publish(record)
        if record.term:
            await self.publish_quarantine()

    async def renew(self) -> None:
        """Publish everything again, once per lease, so that peers that joined since then store it too."""
        for index in tuple(self.run().shards):
            run = (
                self.run()
            )  # read again for each shard: an older record that expires later would hide what was published meanwhile
            shard = run.shards[index]
            if shard.acceptance or shard.term:
                await self._publish(standing(self.rules(), run, index, self.transport.now()))
        if self.run().quarantined:
            await self.publish_quarantine()

    async def publish_quarantine(self) -> None:
        """Publish the quarantined peers: first those that hold a claim now, then the newest; none after the last pardon."""
        run = self.run()
        claims = self.swarm_monitor.view.claims if self.swarm_monitor else ()
        claiming = {claim.record.owner for claim in claims}
        entries = sorted(run.quarantined.values(), key=lambda entry: (entry.owner not in claiming, -entry.time))
        peers = tuple(entry.owner for entry in entries[:MAX_QUARANTINED])
        now = self.transport.now()
        await self._publish(QuarantineRecord(run=run.run, owner=self.identity.public_key, issued=now, peers=peers))

    async def _publish(self, record: AcceptanceRecord | ResetRecord | QuarantineRecord) -> None:
        timing = self.rules().manifest.timing
        limits = RecordLimits(timing.heartbeat, timing.maximum_clock_skew)
        renewed = record.model_copy(update={"issued": self.transport.now(), "owner": self.identity.public_key})
        try:
            stored = await publish(self.transport, self.identity, renewed, limits.longest(record.kind), limits.maximum_clock_skew)
        except ConnectionError as error:
            _log.warning("cannot publish into the DHT: %s", error)
            stored = False
        if not stored:
            _log.warning(
                "%s record not stored under %s: no DHT peer took it; it is published again later", record.kind, record.key()[65:]
            )
