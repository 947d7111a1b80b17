"""Peers that announce blobs and hold none are asked ever more rarely, and hide no true holder."""

from __future__ import annotations

import os
from pathlib import Path

from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.holder_proofs import ASKED_PER_LOOK, PROVED_SECONDS, HolderProofs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB
from lutetia.protocol.blobs.worker import Provider
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual


def anything(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


LIARS, LOOKS, EVERY = 128, 720, 20.0


def test_liars_are_asked_ever_more_rarely_and_hide_no_holder(tmp_path: Path):
    """128 liars beside one holder, a look each 20 seconds for four hours. Before, every look asked four liars, without end."""

    async def main() -> None:
        network, asked, store = MemoryNetwork(), 0, BlobStore(tmp_path)
        reader, holder = (network.peer(Identity.derived(name), anything) for name in ("reader", "holder"))
        await serve_blobs(holder, store)
        ref = store.add_bytes(os.urandom(1000))

        async def hang_up(stream: Stream) -> None:
            nonlocal asked
            asked += 1

        liars = [network.peer(Identity.derived(f"liar {number}"), anything) for number in range(LIARS)]
        for liar in liars:
            await liar.serve(BLOB, hang_up)
        providers = [Provider(peer.peer_id, tuple(peer.addresses())) for peer in (*liars, holder)]
        proofs, found, lost = HolderProofs(), None, 0
        for look in range(LOOKS):
            proved = await proofs.proved(reader, providers, [ref])
            assert proved <= {holder.peer_id}
            found = look if found is None and proved else found
            lost += found is not None and not proved
            reader.skew += EVERY
        assert found is not None
        assert found <= LIARS / ASKED_PER_LOOK
        assert lost <= LOOKS * EVERY / PROVED_SECONDS * 2, "a proved holder is asked again before liars"
        assert asked <= LIARS * 8, "after 2, 4, 8, … up to 120 minutes"

    run_virtual(main)
