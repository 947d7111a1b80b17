"""A ledger that lost its end must not fork its lineages: what this coordinator's key has signed, it stands by.

The newest acceptance of each shard is in the DHT, signed by this very coordinator. One that is ahead of the ledger proves that
the ledger is not the newest, and stops the coordinator (`rival`). After a restore, or told to recover, it takes the acceptance
back into its ledger instead, and fetches the checkpoint's blobs from the peers that hold them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..protocol.events import AcceptanceRecovered
from ..protocol.ledger_state import RunState, ShardLedger
from ..protocol.live_manifest import LiveManifest
from ..protocol.manifest import BlobRef
from ..protocol.records import AcceptanceRecord, ProviderRecord, acceptance_key, provider_key
from ..protocol.services import read_records
from ..protocol.store import BlobStore
from ..protocol.transfer import Provider, fetch_blob
from ..protocol.transport import Transport
from ..system.errors import LutetiaError
from .ledger import Ledger

_log = logging.getLogger("lutetia.coordinator.recovery")

_READS_AT_ONCE = 16


def ahead(state: RunState, seen: Iterable[AcceptanceRecord]) -> list[AcceptanceRecord]:
    """Those of our own acceptances that are newer than what the ledger has of their shard, by shard."""
    newest: dict[int, AcceptanceRecord] = {}
    for record in seen:
        shard = state.shards.get(record.shard)
        if shard is not None and _place(record) > _place(shard):
            best = newest.get(record.shard)
            if best is None or _place(record) > _place(best):
                newest[record.shard] = record
    return [newest[index] for index in sorted(newest)]


def _place(standing: AcceptanceRecord | ShardLedger) -> tuple[int, int]:
    """(term, epoch): grows with every acceptance and every roll-back."""
    return standing.term, standing.epoch


@dataclass
class Lineage:
    """The lineages of one run as this coordinator's key has signed them."""

    transport: Transport
    live: LiveManifest
    coordinator: str
    """This coordinator's public key: acceptances of others are no proof."""

    async def lost(self, state: Callable[[], RunState]) -> list[AcceptanceRecord]:
        """What the DHT shows and the ledger, asked after that, lacks. Raises ConnectionError when this peer is offline."""
        places = asyncio.Semaphore(_READS_AT_ONCE)
        run = self.live().run_id

        async def one(shard: int) -> list[AcceptanceRecord]:
            async with places:
                found = await read_records(self.transport, acceptance_key(run, shard))
            return [record for record, _ in found if isinstance(record, AcceptanceRecord) and record.owner == self.coordinator]

        found = await asyncio.gather(*map(one, range(len(self.live().shards))))
        return ahead(state(), (record for records in found for record in records))

    async def recover(self, ledger: Ledger, seconds: float) -> None:
        """Look for `seconds`, while peers find their way back, and take every lost acceptance into `ledger`."""
        until = self.transport.now() + seconds
        _log.info("looking for %.0f s what peers hold that the ledger lacks", seconds)
        while True:
            for event in self.taken_back(await self.lost(lambda: ledger.state)):
                ledger.append([event], durable=True)
            if self.transport.now() >= until:
                return
            await asyncio.sleep(min(1.0, seconds / 4))

    def taken_back(self, lost: Iterable[AcceptanceRecord]) -> list[AcceptanceRecovered]:
        """The ledger's entries for acceptances that it lacked."""
        events = []
        for record in lost:
            _log.warning("epoch %d of shard %d was accepted before the ledger was lost; taken back", record.epoch, record.shard)
            events.append(AcceptanceRecovered(time=self.transport.now(), acceptance=record))
        return events


async def fetch_missing(transport: Transport, state: RunState, blobs: BlobStore) -> int:
    """Bring the blobs of the newest accepted checkpoints that are not here from the peers that say they hold them.

    Returns how many are still missing; they are tried again later.
    """
    missing = 0
    for shard in list(state.shards.values()):
        for ref in (shard.acceptance.weights, shard.acceptance.state) if shard.acceptance else ():
            if not await asyncio.to_thread(blobs.has, ref.digest) and not await _fetch(transport, state.run, blobs, ref):
                missing += 1
    return missing


async def _fetch(transport: Transport, run: str, blobs: BlobStore, ref: BlobRef) -> bool:
    try:
        found = await read_records(transport, provider_key(run, ref.digest))
        providers = [Provider(record.peer_id, record.addresses) for record, _ in found if isinstance(record, ProviderRecord)]
        await fetch_blob(transport, blobs, ref, providers)
    except (LutetiaError, ConnectionError) as error:
        _log.warning("blob %s of an accepted checkpoint is not here: %s", ref.digest[:12], error)
        return False
    _log.info("fetched blob %s of an accepted checkpoint back from peers", ref.digest[:12])
    return True
