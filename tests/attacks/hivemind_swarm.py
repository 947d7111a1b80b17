"""Real p2pd peers on loopback for the attack tests: honest ones, and ones that check nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.fuzz import examples
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import ClaimRecord, seal
from lutetia.protocol.transport.base import RecordCheck
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def manifest_of_now(**changes: Any) -> Manifest:
    now = time.time()
    return examples.manifest().model_copy(update={"created": now - 60, "expires": now + 3600, **changes})


def anything(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    """The record check of a liar."""
    return key or ""


Start = Callable[..., Coroutine[Any, Any, HivemindTransport]]


@asynccontextmanager
async def network(folder: Path, run: Manifest) -> AsyncIterator[Start]:
    """`await start(name, check=…, bootstrap=…, host=…)` starts a peer. All are closed at the end.

    All of 127.0.0.0/8 is this machine, and a peer dials from the address at which it listens, so `host` gives it its own origin.
    """
    async with AsyncExitStack() as stack:

        async def start(
            name: str, check: RecordCheck | None = None, bootstrap: list[str] | None = None, host: str = "127.0.0.1"
        ) -> HivemindTransport:
            peer = await connect_hivemind(
                Identity.derived(name), listen=f"/ip4/{host}/tcp/0", bootstrap=bootstrap or [],
                check=check or record_check(run, time.time), state_folder=folder / name,
            )  # fmt: skip
            stack.push_async_callback(peer.close)
            return peer

        yield start


async def claim(peer: HivemindTransport, run: str, name: str) -> bool:
    """Store a correctly signed claim on shard 0 by the owner of that name, which may be made up for it."""
    owner, expires = Identity.derived(name), time.time() + 170
    record = ClaimRecord(run=run, owner=owner.public_key, issued=time.time(), shard=0, epoch=0, samples=0, state="training")
    return await peer.store(record.key(), owner.public_key, seal(record, owner, expires), expires)


async def until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    """Wait for an effect of other processes. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.02)
