"""`python herd.py FOLDER TICKET COUNT`: COUNT peers join the swarm all at once, and stay until the end of stdin.

Each has a p2pd, an identity and a state folder of its own. When all are in (or refused) it prints one JSON object: seconds of the
slowest join, the public keys of who joined, and the reasons of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

from lutetia.protocol.dht_records import publish
from lutetia.protocol.joining import join_swarm
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import Hardware, NodeRecord, RecordLimits
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import LutetiaError


async def join(folder: Path, ticket: Ticket, identity: Identity) -> Transport:
    transport, signed = await join_swarm(identity, ticket, listen="/ip4/127.0.0.1/tcp/0", state_folder=folder)
    record = NodeRecord(
        run=ticket.run, owner=identity.public_key, issued=time.time(), peer_id=identity.peer_id,
        addresses=tuple(transport.addresses()), hardware=Hardware(device="cpu", memory_bytes=1, cores=1),
        samples_per_second=1.0, software="0", state="idle",
    )  # fmt: skip
    limits = RecordLimits(signed.manifest.timing.heartbeat)

    async def beat() -> None:
        with contextlib.suppress(ConnectionError):
            await publish(transport, identity, record.model_copy(update={"issued": time.time()}), limits.longest("node"))

    await beat()
    transport.every(signed.manifest.timing.heartbeat, beat)
    return transport


async def main(folder: Path, ticket: Ticket, count: int) -> None:
    start = time.monotonic()
    identities = [Identity.generate() for _ in range(count)]
    joins = [join(folder / identity.public_key[:8], ticket, identity) for identity in identities]
    found = await asyncio.gather(*joins, return_exceptions=True)
    inside = [one for one in found if not isinstance(one, BaseException)]
    problems = [str(one) for one in found if isinstance(one, LutetiaError | ConnectionError)]
    assert len(inside) + len(problems) == count, found
    owners = [who.public_key for who, one in zip(identities, found, strict=True) if not isinstance(one, BaseException)]
    print(json.dumps({"seconds": time.monotonic() - start, "owners": owners, "problems": problems}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(transport.close() for transport in inside))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Ticket.decode(sys.argv[2]), int(sys.argv[3])))
