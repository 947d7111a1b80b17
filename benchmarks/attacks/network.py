"""`python -m benchmarks network-attacks [--tries N]`: what attacks on a peer's network cost it and others, over real p2pd.

Every try is a swarm of its own on loopback. Liars sit at 127.0.0.2 and up, the third party at 127.0.0.99.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.fuzz import examples
from benchmarks.report import Machine
from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.joining import remember_nodes
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.introduction import HELLO, ask_document, serve_document
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import Hardware, NodeRecord, seal
from lutetia.protocol.transport.dial_policy import DialPolicy
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.system.errors import UnreachableError
from tests.attacks.hivemind_swarm import Start, manifest_of_now, network

NODES, PROVIDERS, HELLOS = 64, 128, 28


@contextlib.asynccontextmanager
async def third_party(count: int, greeting: bytes = b"") -> AsyncIterator[tuple[list[int], list[int]]]:
    """Yields the ports of a listener at 127.0.0.99 that says `greeting` and hangs up, and the ports that were dialled so far."""
    dialled: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(writer.get_extra_info("sockname")[1])
        writer.write(greeting)
        writer.close()

    servers = [await asyncio.start_server(answer, "127.0.0.99", 0) for _ in range(count)]
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers], dialled
    finally:
        for server in servers:
            server.close()


async def reflection(start: Start, seed: int) -> str:
    """A peer calls every author of 64 made-up node records, three times over. Connections that the third party gets."""
    async with third_party(8) as (ports, dialled):
        victim = await start("victim")
        for _ in range(3):
            for number in range(NODES):
                peer_id = Identity.derived(f"{seed} {number}").peer_id
                with contextlib.suppress(ConnectionError):
                    addresses = [f"/ip4/127.0.0.99/tcp/{port}/p2p/{peer_id}" for port in ports]
                    await victim.open_stream(peer_id, HELLO, addresses)
        return f"{len(dialled)} connections"


async def memory_of_peers(start: Start, seed: int) -> str:
    """Node records of 64 made-up peers; what a peer that reads them remembers for its next start."""
    run = manifest_of_now()
    victim = await start("victim")
    liar = await start("liar", bootstrap=victim.addresses(), host="127.0.0.2")
    for number in range(NODES):
        who, now = Identity.derived(f"{seed} {number}"), time.time()
        record = NodeRecord(
            run=run.run_id, owner=who.public_key, issued=now, peer_id=who.peer_id,
            addresses=tuple(f"/ip4/127.0.0.99/tcp/{42000 + k}/p2p/{who.peer_id}" for k in range(8)),
            hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="0", state="idle",
        )  # fmt: skip
        await liar.store(record.key(), who.public_key, seal(record, who, now + 30), now + 30)
    with tempfile.TemporaryDirectory() as folder:
        store = Peerstore(Path(folder) / "peers.json")
        await remember_nodes(victim, run.run_id, store)
        return f"{sum('127.0.0.99' in address for address in store.load())} of {8 * NODES} addresses"


async def scanning(start: Start, seed: int) -> str:
    """A result names an open, a closed and another port of a private network as its author's, in a public run."""
    async with third_party(1) as ((ssh,), dialled):
        victim, said = await start("victim"), set[str]()
        victim.limit_dials(DialPolicy.of(["/ip4/8.8.4.4/tcp/4001"]))
        who = Identity.derived(f"scanner {seed}")
        with tempfile.TemporaryDirectory() as folder:
            for host, port in (("127.0.0.99", ssh), ("127.0.0.99", 9), ("192.168.0.1", 80)):
                provider = Provider(who.peer_id, (f"/ip4/{host}/tcp/{port}/p2p/{who.peer_id}",))
                try:
                    await fetch_blob(victim, BlobStore(Path(folder)), examples.blob("x"), [provider])
                except UnreachableError as error:
                    said.add(str(error))
        return f"{len(dialled)} dials, {len(said)} kinds of answer"


async def places(start: Start, seed: int) -> str:
    """Two addresses hold streams of the introduction open; 28 peers of a third address ask for it."""
    victim = await start("victim")

    await serve_document(victim, HELLO, lambda: b"hello")
    liars = [
        await _visitor(start, victim, f"liar {seed} {host} {n}", f"127.0.0.{host}") for host in (2, 3) for n in range(3)
    ]  # fmt: skip
    held = [await liar.open_stream(victim.peer_id, HELLO) for liar in liars for _ in range(60)]
    honest = await _visitor(start, victim, f"honest {seed}", "127.0.0.4")
    answered = 0
    for _ in range(HELLOS):
        with contextlib.suppress(ConnectionError):
            answered += await ask_document(honest, victim.peer_id, HELLO) == b"hello"
    for stream in held:
        await stream.close()
    return f"{HELLOS - answered} of {HELLOS} refused"


async def made_up_providers(start: Start, seed: int) -> str:
    """A blob of 8 MiB with 128 made-up providers and one coordinator."""
    coordinator, reader = await start("coordinator"), await start("reader")
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder) / "coordinator")
        ref = store.add_bytes(random.Random(seed).randbytes(8 * CHUNK))
        await serve_blobs(coordinator, store)
        liars = [Identity.derived(f"provider {seed} {n}").peer_id for n in range(PROVIDERS)]
        providers = [Provider(peer, (f"/ip4/127.0.0.{10 + n}/tcp/9/p2p/{peer}",)) for n, peer in enumerate(liars)]
        providers.append(Provider(coordinator.peer_id, tuple(coordinator.addresses()), trusted=True))
        began = time.monotonic()
        await fetch_blob(reader, BlobStore(Path(folder) / "reader"), ref, providers)
        return f"{time.monotonic() - began:.1f} s"


async def _visitor(start: Start, victim: HivemindTransport, name: str, host: str) -> HivemindTransport:
    return await start(name, bootstrap=victim.addresses(), host=host)


ATTACKS: dict[str, Callable[[Start, int], Awaitable[str]]] = {
    "reflection": reflection,
    "memory of peers": memory_of_peers,
    "port scanner": scanning,
    "stream places": places,
    "made-up providers": made_up_providers,
}


async def _tries(attack: Callable[[Start, int], Awaitable[str]], tries: int) -> list[tuple[str, float]]:
    results = []
    for seed in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            async with network(Path(folder), manifest_of_now()) as start:
                results.append((await attack(start, seed), time.monotonic() - began))
    return results


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks network-attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=20, help="swarms per attack; default 20")
    parser.add_argument("--only", choices=list(ATTACKS), help="one attack")
    given = parser.parse_args(arguments)
    print(Machine.this())
    print("\n| attack | results (how often) | seconds a try, median |\n|---|---|---|")
    for name, attack in ATTACKS.items():
        if given.only in (None, name):
            results = asyncio.run(_tries(attack, given.tries))
            texts = [text for text, _ in results]
            counted = ", ".join(f"{text} ({texts.count(text)})" for text in sorted(set(texts)))
            print(f"| {name} | {counted} | {median(seconds for _, seconds in results):.1f} |", flush=True)
