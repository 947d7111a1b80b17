"""What the coordinator keeps telling the DHT: where each shard stands, and who is quarantined."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.audit_policy import standing
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
    """`rules` and `run` give the newest. `lookout` knows who claims something now, once there is one."""

    transport: RecordStore
    identity: Identity
    rules: Callable[[], JudgeRules]
    run: Callable[[], RunState]
    lookout: SwarmMonitor | None = field(default=None)

    async def announce(self, record: AcceptanceRecord | ResetRecord) -> None:
        """An acceptance, or what a roll-back left standing; the latter has brought a peer into quarantine."""
        await self._publish(record)
        if record.term:
            await self.tell_quarantine()

    async def renew(self) -> None:
        """Every lease, so that peers who just joined hold it too."""
        for index in tuple(self.run().shards):
            run = self.run()  # what is announced meanwhile must not be replaced by an older word that expires later
            shard = run.shards[index]
            if shard.acceptance or shard.term:
                await self._publish(standing(self.rules(), run, index, self.transport.now()))
        if self.run().quarantined:
            await self.tell_quarantine()

    async def tell_quarantine(self) -> None:
        """Those who claim something now first, then the newest; nobody, after the last pardon."""
        run = self.run()
        claims = self.lookout.view.claims if self.lookout else ()
        claiming = {claim.record.owner for claim in claims}
        known = sorted(run.quarantined.values(), key=lambda why: (why.owner not in claiming, -why.time))
        peers = tuple(why.owner for why in known[:MAX_QUARANTINED])
        now = self.transport.now()
        await self._publish(QuarantineRecord(run=run.run, owner=self.identity.public_key, issued=now, peers=peers))

    async def _publish(self, record: AcceptanceRecord | ResetRecord | QuarantineRecord) -> None:
        timing = self.rules().manifest.timing
        limits = RecordLimits(timing.heartbeat, timing.maximum_clock_skew)
        renewed = record.model_copy(update={"issued": self.transport.now(), "owner": self.identity.public_key})
        try:
            taken = await publish(self.transport, self.identity, renewed, limits.longest(record.kind), limits.maximum_clock_skew)
        except ConnectionError as error:
            _log.warning("cannot publish into the DHT: %s", error)
            taken = False
        if not taken:
            _log.warning("nobody took the %s under %s; it is published again", record.kind, record.key()[65:])
