"""Small documents that peers ask each other for, and records put into and read from the DHT. All bounded in size and time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pydantic import Field

from .canonical import Frozen
from .framing import read_message, write_message
from .identity import Identity
from .manifest import Digest, Manifest
from .records import Record, RecordLimits, RecordRefused, Word, open_record, read_envelope, seal
from .transport import RecordCheck, Stream, Transport

log = logging.getLogger("lutetia.protocol.services")

HELLO, MANIFEST, STATUS = "/lutetia/hello/1", "/lutetia/manifest/1", "/lutetia/status/1"
PROTOCOL_VERSION = 1
MAX_HELLO_BYTES = 4096
DOCUMENT_SECONDS = 10.0


class Hello(Frozen):
    """Who is there: same run, same protocol, how late is it there (Unix seconds)?"""

    run: Digest
    protocol: int = Field(ge=0)
    software: Word
    clock: float
    manifest_version: int = Field(ge=1)


async def serve_document(transport: Transport, protocol: str, produce: Callable[[], bytes]) -> None:
    """Send `produce()` to whoever opens a stream of `protocol`; a peer that does not take it in time is cut off."""

    async def handle(stream: Stream) -> None:
        try:
            async with asyncio.timeout(DOCUMENT_SECONDS):
                await write_message(stream, produce())
                await stream.read_exactly(1)  # the receiver's close: ours would cut off what is still under way
        except (TimeoutError, ConnectionError):
            return

    await transport.serve(protocol, handle)


async def ask_document(
    transport: Transport,
    peer_id: str,
    protocol: str,
    addresses: Sequence[str] = (),
    limit_bytes: int = 1 << 20,
    seconds: float = DOCUMENT_SECONDS,
) -> bytes:
    """What `peer_id` sends on `protocol`. Raises ConnectionError when it is away, too slow, or sends more than `limit_bytes`."""
    try:
        async with asyncio.timeout(seconds):
            stream = await transport.open_stream(peer_id, protocol, addresses)
            try:
                return await read_message(stream, limit_bytes)
            finally:
                await stream.close()
    except TimeoutError as error:
        raise ConnectionError(f"{peer_id} did not answer {protocol} within {seconds:.0f} s") from error


def record_check(manifest: Manifest, now: Callable[[], float]) -> RecordCheck:
    """The check that every peer of the run applies to records, on store and on read."""
    limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
    allowed = None if manifest.allowlist is None else {*manifest.allowlist, *manifest.coordinators}

    def check(key: str | None, subkey: str, value: bytes, expires: float) -> str:
        record = open_record(
            value, key=key, subkey=subkey, expires=expires, now=now(), limits=limits, coordinators=manifest.coordinators
        )
        if record.run != manifest.run_id:
            raise RecordRefused(f"record is of run {record.run[:12]}, not of {manifest.run_id[:12]}")
        if allowed is not None and record.owner not in allowed:
            raise RecordRefused(f"peer {record.owner[:16]}… is not on the run's allowlist")
        return record.key()

    return check


async def publish(transport: Transport, identity: Identity, record: Record, ttl: float) -> bool:
    """Sign `record` and file it for `ttl` seconds. False when nobody took it."""
    expires = transport.now() + ttl
    return await transport.store(record.key(), record.owner, seal(record, identity, expires), expires)


async def read_records(transport: Transport, key: str) -> list[tuple[Record, float]]:
    """The live records under `key` with their expiry; the transport has checked them."""
    return [(read_envelope(stored.value), stored.expires) for stored in (await transport.get(key)).values()]
