"""Two coordinators under one key, as when a run's folder was copied or an old copy was put back: two words about one epoch.

What is accepted is written to the ledger before the swarm hears of it. So an acceptance in the swarm under our own key that our
ledger does not know comes from another coordinator, or from a newer ledger than ours. Then this one stops before it adds to the
confusion (fail-stop); readers meanwhile agree by `latest_acceptance`.
"""

from __future__ import annotations

import asyncio

from ..protocol.records import AcceptanceRecord, acceptance_key
from ..protocol.run_state import RunState
from ..protocol.services import read_records
from ..protocol.transport import Transport
from ..system.errors import IdentityError
from .ledger import Ledger

_READS_AT_ONCE = 16


async def refuse_a_rival(transport: Transport, ledger: Ledger, coordinator: str) -> None:
    """Raises IdentityError when the swarm holds an acceptance by `coordinator` that `ledger` does not know."""
    places = asyncio.Semaphore(_READS_AT_ONCE)

    async def look(shard: int) -> None:
        async with places:
            found = await read_records(transport, acceptance_key(ledger.state.run, shard))
        for record, _ in found:
            if isinstance(record, AcceptanceRecord) and doubtful(record, ledger.state, coordinator):
                await _refuse_unknown(record, ledger)

    for outcome in await asyncio.gather(*(look(shard) for shard in ledger.state.shards), return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, ConnectionError):
            raise outcome


def doubtful(record: AcceptanceRecord, run: RunState, coordinator: str) -> bool:
    """Whether only the whole ledger can tell if this acceptance, where it is under `coordinator`'s key, is its own."""
    ours = run.shards[record.shard].acceptance
    return record.owner == coordinator and (ours is None or ours.checkpoint != record.checkpoint)


async def _refuse_unknown(record: AcceptanceRecord, ledger: Ledger) -> None:
    if not await asyncio.to_thread(ledger.has_accepted, record.checkpoint):
        raise IdentityError(
            f"the swarm holds an acceptance under this coordinator's key (shard {record.shard}, epoch {record.epoch}) that "
            f"{ledger.path} does not know: another coordinator is at work, or this folder is an old copy; serve the newest, and "
            "only one at a time, or take lost acceptances back with --recover"
        )
