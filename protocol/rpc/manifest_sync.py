"""The newest manifest that this peer knows, in one place, and how peers tell each other of newer ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from lutetia.protocol.rpc.introduction import ACK, MANIFEST, ask_document, ask_hello
from lutetia.protocol.schema.capabilities import CAPABILITIES
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import check_upgrade
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.files import write_atomic

_UPDATE_SECONDS = 10.0

MANIFEST_UPDATE = "/lutetia/news/1"
"""A peer with a newer manifest sends its version, eight bytes, big-endian. The receiver then asks for the manifest itself."""


class LiveManifest:
    """The manifest in force. Call it for the manifest of this moment: what the peer serves, checks and does follows it.

    With `cached`, each adopted version is written to that file before it takes effect: a restart cannot fall back behind it.
    """

    def __init__(self, signed: SignedManifest, cached: Path | None = None) -> None:
        self.signed, self.cached = signed, cached

    def __call__(self) -> Manifest:
        return self.signed.manifest

    @property
    def version(self) -> int:
        return self.signed.manifest.version

    def adopt(self, data: bytes, now: float) -> bool:
        """Take over `data` if it is a newer version of the same run by the same owner. Returns whether it was newer.

        Raises ConfigError (malformed, expired, older; UpgradeRefused when it breaks the lineage) or AuthorisationError.
        """
        old = self.signed.manifest
        known = {*CAPABILITIES, *old.needs}  # what is in force this peer carries out
        new = open_manifest(data, now=now, run=old.run_id, owner=old.owner, at_least_version=old.version, known=known)
        if new.manifest.version == old.version:
            return False
        check_upgrade(old, new.manifest)
        if self.cached:
            write_atomic(self.cached, new.to_bytes())
        self.signed = new
        return True


async def version_at(transport: Transport, peer_id: str, addresses: Sequence[str] = ()) -> tuple[str, int]:
    """The run id and manifest version in a peer's introduction. Raises ConnectionError."""
    hello = (await ask_hello(transport, peer_id, addresses)).hello
    if not hello.understood:
        raise ConnectionError(f"peer {peer_id} speaks protocol {hello.protocol}")
    return hello.run, hello.manifest_version


async def fetch_newer(transport: Transport, live: LiveManifest, peer_id: str, addresses: Sequence[str] = ()) -> bool:
    """Ask one peer for its manifest and adopt it if it is newer. Returns whether it was.

    Raises ConnectionError, or what `LiveManifest.adopt` raises.
    """
    data = await ask_document(transport, peer_id, MANIFEST, addresses, limit_bytes=MAX_MANIFEST_BYTES)
    return live.adopt(data, transport.now())


async def announce_version(transport: Transport, version: int, peer_id: str, addresses: Sequence[str] = ()) -> None:
    """Tell one peer that this one serves `version`. Raises ConnectionError."""
    stream = await transport.open_stream(peer_id, MANIFEST_UPDATE, addresses)
    try:
        await stream.write(version.to_bytes(8, "big"))
        await stream.read_exactly(len(ACK))
    finally:
        await stream.close()


async def read_version(stream: Stream) -> int:
    """The version that the peer at the other end serves. Raises ConnectionError, or TimeoutError when it is too slow."""
    async with asyncio.timeout(_UPDATE_SECONDS):
        version = int.from_bytes(await stream.read_exactly(8), "big")
        await stream.write(ACK)
    return version
