"""The attackers of `benchmarks coordinator-attacks`, each in a process of its own, at a low priority.

`python -m benchmarks.attacks.coordinator.attackers NAME`. The first line of standard input is a JSON object: the run's ticket and
manifest, the port of its pages, and how low the attackers' priority is. Each later line is the next epoch of shard 0 and its
parent, `{"epoch": 2, "parent": "…"}`.
An attacker prints a line once it is in full swing, and until SIGTERM what it has done so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fuzz import examples
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB
from lutetia.protocol.rpc.checkpoint_offer import offer_checkpoint
from lutetia.protocol.rpc.introduction import STATUS, ask_document
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import CheckpointRecord, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from lutetia.system.process import give_way
from tests.attacks.hivemind_swarm import anything, claim

SLOW_SOCKETS, PAGE_READERS, STREAM_READERS, IDLE_CONNECTIONS, LYING_KEYS, HAMMERS = 1000, 16, 64, 700, 8, 4
PAGES = ("/", "/status.json", "/metrics", "/api/v1/openapi.json", "/api/v1/shards", "/api/v1/events?after=0&limit=1000")


class Target:
    """The run that is attacked, the next epoch of its shard, and counts of what was done to it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.ticket = Ticket.decode(given["ticket"])
        self.manifest = SignedManifest.model_validate_json(given["manifest"]).manifest
        self.http: int = given["http"]
        self.nice: int = given["nice"]
        self.epoch, self.parent = 1, None
        self.done: Counter[str] = Counter()
        self._shown = 0.0

    @property
    def coordinator(self) -> str:
        return self.ticket.addresses[0].rpartition("/p2p/")[2]

    def count(self, what: str, ready: bool = True) -> None:
        """Count one deed; `ready`: the attack is in full swing."""
        self.done[what] += 1
        if ready and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(json.dumps(self.done), flush=True)

    def follow(self) -> None:
        """Read the next epochs from standard input, in a thread. When it closes the benchmark is gone, and so is the attack."""
        for line in sys.stdin:
            told = json.loads(line)
            self.epoch, self.parent = told["epoch"], told["parent"]
        os.kill(os.getpid(), signal.SIGTERM)


async def again_and_again(*deeds: Callable[[], Awaitable[None]], pause: float = 0.05) -> None:
    """Do all deeds for ever, side by side; what the coordinator refuses is tried again after `pause` seconds."""

    async def repeat(deed: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await deed()
            await asyncio.sleep(pause)

    await asyncio.gather(*map(repeat, deeds))


# --- the pages --------------------------------------------------------------------------------------------------------------


async def drip(target: Target) -> None:
    """SLOW_SOCKETS connections, each of which sends a byte of its request every second, and comes back if closed."""

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.http)
        target.count("connections", target.done["connections"] >= SLOW_SOCKETS - 1)
        writer.write(b"GET /status.json HTTP/1.1\r\nHost: x\r\nX-a: ")
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(1)

    await again_and_again(*[one] * SLOW_SOCKETS, pause=1.0)


async def read_pages(target: Target) -> None:
    """PAGE_READERS connections ask for one document after another without pause, each time with another query."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.http)
        try:
            while True:
                path = PAGES[target.done["pages asked for"] % len(PAGES)]
                path += f"{'&' if '?' in path else '?'}x={target.done['pages asked for']}"
                writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n".encode())
                await writer.drain()
                target.count("pages asked for")
                target.done[f"answered {await _answer(reader)}"] += 1
        finally:
            writer.close()

    await again_and_again(*[one] * PAGE_READERS)


async def _answer(reader: asyncio.StreamReader) -> str:
    """Read one answer; its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:")), 0)
    await reader.readexactly(length)
    return head.split(" ")[1]


async def hold_streams(target: Target) -> None:
    """STREAM_READERS connections open the stream of all events and read nothing of it."""

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.http, limit=1024)
        writer.write(b"GET /api/v1/events/stream?after=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        target.count("event streams asked for", target.done["event streams asked for"] >= STREAM_READERS - 1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(45)  # who reads nothing does not see that the coordinator hung up
        writer.transport.abort()  # type: ignore[attr-defined]

    await again_and_again(*[one] * STREAM_READERS, pause=1.0)


# --- libp2p -----------------------------------------------------------------------------------------------------------------


def crowd(target: Target) -> None:
    """IDLE_CONNECTIONS finished libp2p connections, an identity each, that are made again when they are closed."""
    import trio

    from lutetia.protocol.light_client.dial import dial

    at_once = trio.Semaphore(8)

    async def hold() -> None:
        while True:
            with contextlib.suppress(ConnectionError, OSError):
                async with AsyncExitStack() as stack:
                    async with at_once:
                        connection = await stack.enter_async_context(dial(target.ticket.addresses[0]))
                    target.count("connections", target.done["connections"] >= IDLE_CONNECTIONS - 1)
                    while True:
                        await trio.sleep(10)
                        await (await connection.open_stream("/ipfs/ping/1.0.0")).close()
            await trio.sleep(1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(IDLE_CONNECTIONS):
                nursery.start_soon(hold)

    trio.run(main)


async def _peer(stack: AsyncExitStack, target: Target, name: str, host: str) -> HivemindTransport:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    peer = await connect_hivemind(
        Identity.derived(name), listen=f"/ip4/{host}/tcp/0", bootstrap=list(target.ticket.addresses), check=anything,
        state_folder=folder,
    )  # fmt: skip
    stack.push_async_callback(peer.close)
    _give_way_below(target.nice)
    return peer


def _give_way_below(niceness: int) -> None:
    """Lower the priority of p2pd, which leads a session of its own."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            Path(f"/proc/{child.pid}/autogroup").write_text(str(niceness))


async def silent_results(target: Target) -> None:
    """LYING_KEYS identities at one address offer results, take every question for their blobs, and answer none."""

    async def say_nothing(stream: Stream) -> None:
        await stream.read_exactly(1 << 20)

    async with AsyncExitStack() as stack:
        liars = [await _peer(stack, target, f"liar {n}", "127.0.0.2") for n in range(LYING_KEYS)]
        for liar in liars:
            await liar.serve(BLOB, say_nothing)

        def made_up(text: str) -> BlobRef:
            return examples.blob(text)

        await again_and_again(*(_offers(target, liar, f"liar {n}", made_up) for n, liar in enumerate(liars)), pause=1.0)


async def garbage_results(target: Target) -> None:
    """LYING_KEYS identities at one address offer results of random bytes, which arrive."""
    async with AsyncExitStack() as stack:
        liars = [await _peer(stack, target, f"thrower {n}", "127.0.0.4") for n in range(LYING_KEYS)]
        stores = [BlobStore(Path(stack.enter_context(tempfile.TemporaryDirectory()))) for _ in liars]
        for liar, store in zip(liars, stores, strict=True):
            await serve_blobs(liar, store)

        def random_bytes(store: BlobStore) -> Callable[[str], BlobRef]:
            return lambda text: store.add_bytes(random.Random(text).randbytes(200_000))

        throwers = enumerate(zip(liars, stores, strict=True))
        deeds = (_offers(target, liar, f"thrower {n}", random_bytes(store)) for n, (liar, store) in throwers)
        await again_and_again(*deeds, pause=1.0)


def _offers(target: Target, liar: HivemindTransport, name: str, blob: Callable[[str], BlobRef]) -> Callable[[], Awaitable[None]]:
    """What offers a new result for the next epoch."""
    who = Identity.derived(name)

    async def offer() -> None:
        text = f"{name} {time.monotonic_ns()}"
        record = CheckpointRecord(
            run=target.manifest.run_id, owner=who.public_key, issued=time.time(), shard=0, epoch=target.epoch,
            parent=target.parent, weights=blob("w" + text), state=blob("s" + text), trace=blob("t" + text),
            samples=target.epoch * target.manifest.checkpoint_samples, loss=0.5, peer_id=liar.peer_id,
            addresses=tuple(liar.addresses()),
        )  # fmt: skip
        expires = time.time() + 600
        reply = await offer_checkpoint(liar, target.coordinator, seal(record, who, expires), expires, target.ticket.addresses)
        target.count(f"results {reply.verdict}")

    return offer


async def hammer(target: Target) -> None:
    """HAMMERS identities at one address ask for the status without pause, and store claims of made-up owners."""
    async with AsyncExitStack() as stack:
        liars = [await _peer(stack, target, f"hammer {n}", "127.0.0.3") for n in range(HAMMERS)]

        def ask(liar: HivemindTransport) -> Callable[[], Awaitable[None]]:
            async def documents() -> None:
                for _ in range(20):
                    await ask_document(liar, target.coordinator, STATUS)
                    target.count("status documents")

            return documents

        def flood(liar: HivemindTransport) -> Callable[[], Awaitable[None]]:
            async def claims() -> None:
                await claim(liar, target.manifest.run_id, f"made up {time.monotonic_ns()}")
                target.count("claims of made-up owners")

            return claims

        await again_and_again(*map(ask, liars), *map(flood, liars))


ATTACKERS: dict[str, Callable[[Target], Awaitable[None]]] = {
    "drip": drip, "pages": read_pages, "streams": hold_streams, "silent": silent_results, "garbage": garbage_results,
    "hammer": hammer,
}  # fmt: skip


def main() -> None:
    target = Target(json.loads(sys.stdin.readline()))
    give_way(target.nice)
    threading.Thread(target=target.follow, daemon=True).start()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    if sys.argv[1] == "crowd":
        crowd(target)
    else:
        asyncio.run(ATTACKERS[sys.argv[1]](target))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
