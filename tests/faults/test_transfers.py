"""What providers of blobs may do to a transfer over real libp2p: lie, vanish at the very end, or send drop by drop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BUSY, MAX_STREAMS_PER_PEER, OK
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.system import tether
from lutetia.system.errors import LutetiaError
from tests.faults.world.processes import litter, relatives, until

pytestmark = pytest.mark.timeout(900)
PROVIDER = Path(__file__).parent / "world" / "provider.py"
CHUNKS = 100


@dataclass
class Market:
    """A receiver in this process, providers in processes of their own."""

    folder: Path
    receiver: HivemindTransport
    good: BlobStore
    ref: BlobRef
    target: BlobStore
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def provider(self, how: str = "well", store: BlobStore | None = None) -> Provider:
        number = len(self.processes)
        process = await asyncio.create_subprocess_exec(
            *tether.command(sys.executable), str(PROVIDER),
            str(self.folder / f"provider {number}"), str((store or self.good).root),
            how,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(self.folder / "tmp")},
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout
        address = (await process.stdout.readline()).decode().strip()
        return Provider(address.rpartition("/p2p/")[2], (address,))

    def damaged(self, *chunks: int) -> BlobStore:
        """A store whose bytes rotted after they were checked."""
        store = BlobStore(self.folder / "damaged")
        store.add_file(self.good.path(self.ref.digest))
        with store.path(self.ref.digest).open("r+b") as file:
            for index in chunks:
                file.seek(index * CHUNK + 5)
                file.write(b"rot")
        return store

    async def fetch(self, providers: list[Provider], **more) -> None:
        """The blob, and I2: it is what its name says."""
        await fetch_blob(self.receiver, self.target, self.ref, providers, **more)
        self.target.verify(self.ref.digest)


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[Market]:
    folder = tmp_path / "market"
    (folder / "tmp").mkdir(parents=True)
    good = BlobStore(folder / "good")
    ref = good.add_bytes(os.urandom(CHUNK) * CHUNKS)
    receiver = await HivemindTransport.start(Identity.generate(), listen="/ip4/127.0.0.1/tcp/0", state_folder=folder / "receiver")
    place = Market(folder, receiver, good, ref, BlobStore(folder / "target"))
    try:
        yield place
    finally:
        for process in place.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await receiver.close()
    await until(lambda: not relatives(folder), "every process to be gone")
    assert not litter(folder / "target")
    assert not list((folder / "tmp").iterdir())


async def test_one_provider_sends_a_corrupt_chunk(market: Market, caplog: pytest.LogCaptureFixture) -> None:
    """F10. The liar loses its place, the others go on, the blob is right."""
    liar = await market.provider(store=market.damaged(*range(CHUNKS)))
    honest = [await market.provider() for _ in range(2)]
    await market.fetch([liar, *honest])
    assert f"dropped provider {liar.peer_id}" in caplog.text


async def test_a_provider_vanishes_at_99_percent(market: Market) -> None:
    """F10. Killed with the last chunk on the way: what is here is kept, another sends the rest."""
    first = await market.provider()
    killed = asyncio.Event()

    def vanish(done: int, total: int) -> None:
        if done >= 0.98 * total and not killed.is_set():
            market.processes[0].send_signal(signal.SIGKILL)
            killed.set()

    with contextlib.suppress(LutetiaError):  # on a fast machine the last chunk may be here before the signal
        await market.fetch([first], on_progress=vanish)
    assert killed.is_set()
    seen: list[int] = []
    await market.fetch([first, await market.provider()], on_progress=lambda done, total: seen.append(done))
    assert not seen or min(seen) >= 0.98 * market.ref.size, "nothing was fetched twice"


async def test_a_provider_sends_one_kibibyte_a_second(market: Market) -> None:
    """F7. A slow loris alone would take a day; beside two honest providers nobody waits for it."""
    loris = await market.provider("trickle")
    honest = [await market.provider() for _ in range(2)]
    async with asyncio.timeout(300):
        await market.fetch([loris, *honest])


async def test_a_client_takes_one_kibibyte_a_second(market: Market) -> None:
    """F7. It gets its own few places on the server and no more; others are served meanwhile."""
    provider = await market.provider()
    loris = await HivemindTransport.start(
        Identity.generate(), listen="/ip4/127.0.0.1/tcp/0", state_folder=market.folder / "loris"
    )
    streams: list[Stream] = []
    try:
        request = bytes.fromhex(market.ref.digest) + (0).to_bytes(4, "big") + CHUNKS.to_bytes(4, "big")
        for _ in range(MAX_STREAMS_PER_PEER):
            streams.append(await loris.open_stream(provider.peer_id, BLOB, provider.addresses))
            await streams[-1].write(request)
            assert await streams[-1].read_exactly(1) == bytes([OK])
        extra = await loris.open_stream(provider.peer_id, BLOB, provider.addresses)
        streams.append(extra)
        await extra.write(request)
        assert await extra.read_exactly(1) == bytes([BUSY])
        await market.fetch([provider])
        assert await streams[0].read_exactly(1024), "the slow client was still holding its place"
    finally:
        for stream in streams:
            await stream.close()
        await loris.close()
