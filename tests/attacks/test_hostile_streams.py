"""Streams that never end, never begin or have a wrong length, over real p2pd.

Blob providers that trickle, stall, vanish or send wrong bytes: tests/protocol/blobs/test_download.py and tests/faults.
Documents too large or too slow in virtual time: tests/protocol/test_services.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.fuzz import examples
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.checkpoint_offer import OFFER, OfferReply, offer_checkpoint, serve_offers
from lutetia.protocol.rpc.framing import framed
from lutetia.protocol.rpc.introduction import HELLO, MANIFEST, MAX_HELLO_BYTES, ask_document, serve_document
from lutetia.protocol.schema.records import seal
from lutetia.protocol.transport.base import Stream
from lutetia.system.errors import UnreachableError
from tests.attacks.hivemind_swarm import manifest_of_now, network


@pytest.mark.timeout(900)
async def test_hostile_documents_are_connection_errors(tmp_path: Path) -> None:
    async def endless(stream: Stream) -> None:
        await stream.write(b"\xff\xff\xff\xff")
        while True:
            await stream.write(bytes(1 << 16))

    async def trickle(stream: Stream) -> None:
        await stream.write((4000).to_bytes(4, "big"))
        for _ in range(4000):
            await stream.write(b"x")
            await asyncio.sleep(0.2)

    async with network(tmp_path, manifest_of_now()) as start:
        liar = await start("liar")
        await liar.serve(MANIFEST, endless)
        await liar.serve(HELLO, trickle)
        asker = await start("asker", bootstrap=liar.addresses())
        with pytest.raises(ConnectionError, match="larger than"):
            await ask_document(asker, liar.peer_id, MANIFEST)
        with pytest.raises(ConnectionError, match="did not answer"):
            await ask_document(asker, liar.peer_id, HELLO, limit_bytes=MAX_HELLO_BYTES, timeout=1.0)


@pytest.mark.timeout(900)
async def test_silent_streams_of_one_peer_leave_room_for_others(tmp_path: Path) -> None:
    """One peer holds as many silent streams as it gets. An honest offer is answered at once nevertheless."""

    async def answer(peer_id: str, offer: object) -> OfferReply:
        return OfferReply(verdict="queued")

    async with network(tmp_path, manifest_of_now()) as start:
        coordinator = await start("coordinator")
        await serve_offers(coordinator, answer)
        await serve_document(coordinator, HELLO, lambda: b"hello")
        loris = await start("loris", bootstrap=coordinator.addresses())
        held = [await loris.open_stream(coordinator.peer_id, OFFER) for _ in range(60)]
        assert len(held) == 60
        honest = await start("honest", bootstrap=coordinator.addresses())
        sealed = seal(examples.checkpoint(), examples.PEER, examples.NOW)
        reply = await offer_checkpoint(honest, coordinator.peer_id, sealed, examples.NOW)
        assert reply.verdict == "queued"
        assert await ask_document(honest, coordinator.peer_id, HELLO) == b"hello"
        oversized = await honest.open_stream(coordinator.peer_id, OFFER)
        await oversized.write(framed(bytes(20_000)))
        with pytest.raises(ConnectionError):
            await oversized.read_exactly(1)  # closed without being read


@pytest.mark.timeout(900)
async def test_a_provider_with_impossible_addresses_is_skipped(tmp_path: Path) -> None:
    """Its record is valid in form. Dialling it once raised an error that was not caught."""
    async with network(tmp_path, manifest_of_now()) as start:
        peer = await start("fetcher")
        liar = Provider(examples.PEER.peer_id, (f"/ip4/999.1.1.1/tcp/4001/p2p/{examples.PEER.peer_id}",))
        with pytest.raises(UnreachableError, match="no provider is left"):
            await fetch_blob(peer, BlobStore(tmp_path / "blobs"), examples.blob("x"), [liar])
