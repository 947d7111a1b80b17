"""A small swarm of blob providers on the memory network."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual

DATA = random.Random(5).randbytes(20 * CHUNK + 777)
TABLE = ChunkTable.of_bytes(DATA)
REF = TABLE.ref


def any_record(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


class Swarm:
    """A receiver with an empty store, and providers of DATA, each behind a link of 8 MiB/s."""

    def __init__(self, folder: Path) -> None:
        self.network = MemoryNetwork(seed=1, latency=0.02)
        self.receiver = self.network.peer(Identity.derived("receiver"), any_record)
        self.store = BlobStore(folder / "receiver")
        self.source = BlobStore(folder / "source")
        self.source.add_bytes(DATA)
        self.holders: list[MemoryTransport] = []

    async def holder(self, rate: float = 8 << 20, store: BlobStore | None = None) -> MemoryTransport:
        peer = self.network.peer(Identity.derived(f"holder {len(self.holders)}"), any_record)
        self.network.throttle(peer.peer_id, rate)
        await serve_blobs(peer, store or self.source)
        self.holders.append(peer)
        return peer

    @property
    def providers(self) -> list[Provider]:
        return [Provider(peer.peer_id) for peer in self.holders]

    async def fetch(self, **more: Callable[[int, int], None]) -> Path:
        return await fetch_blob(self.receiver, self.store, REF, self.providers, **more)

    def arrived(self) -> int:
        """Chunks that an interrupted transfer has left on disk."""
        partial = self.store.partial(REF)
        missing = len(partial.missing()) if partial.has_table else TABLE.count
        partial.close()
        return TABLE.count - missing


Scenario = Callable[[Swarm], Awaitable[None]]


def simulated(scenario: Scenario) -> Callable[[Path], None]:
    @wraps(scenario)
    def test(tmp_path: Path) -> None:
        run_virtual(lambda: scenario(Swarm(tmp_path)))

    del test.__wrapped__  # type: ignore[attr-defined]  # pytest would read the scenario's parameters
    return test
