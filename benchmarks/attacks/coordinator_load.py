"""`python -m benchmarks coordinator-attacks [--epochs N] [--only WORDS]`: what whole rounds of attack cost a real coordinator.

A coordinator in a process of its own, on loopback. In each round an honest node at 127.0.0.1 hands in epochs of one shard while
one attack goes on. Measured are the coordinator's memory, open files and processor time, p2pd and its workers included, and the
time from an honest offer to its acceptance. Bounds that a round must not exceed are in `BOUNDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.fuzz import examples
from benchmarks.report import Machine
from lutetia.protocol.rpc.checkpoint_offer import offer_checkpoint
from lutetia.protocol.rpc.introduction import STATUS, ask_document
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from tests.attacks.hivemind_swarm import anything, claim
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, free_port, joined
from tests.coordinator.test_serve import make_run, up

SLOW_SOCKETS, IDLE_CONNECTIONS, LYING_KEYS, HAMMERS = 1000, 700, 8, 4
BOUNDS = {"memory, times usual": 1.5, "files": 1024.0, "processors": 1.0, "acceptance, times usual": 3.0}
"""Memory of all processes of the coordinator; files of the fullest of them; processors that it and p2pd keep busy on average,
without its workers."""


_UNDECIDED = ("queued", "busy", "unreachable", "inconclusive")


@dataclass
class Cost:
    """What a round cost the coordinator at most, and how long honest results waited."""

    memory: float = 0.0
    files: int = 0
    p2pd_files: int = 0
    processors: float = 0.0
    waits: list[float] = field(default_factory=list)


@dataclass
class Scene:
    """What attacks know: the run's ticket, where its pages are, and the honest node, whose epochs they try to delay."""

    ticket: Ticket
    http: int
    honest: ScriptedNode
    folder: Path
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1


Attack = Callable[[Scene], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def together(*work: Callable[[], object]) -> AsyncIterator[None]:
    """Run coroutines again and again until the block ends; an error of one is the coordinator's refusal, and tried again."""

    async def again(one: Callable[[], object]) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await one()  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(again(one)) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def nothing(scene: Scene) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def elsewhere(scene: Scene, function: str, argument: object, what: str) -> AsyncIterator[None]:
    """Run an attack of this module in a process of its own, which prints how often it connected, first when all are there."""
    code = f"from benchmarks.attacks import coordinator_load; coordinator_load.{function}({argument!r})"
    process = await asyncio.create_subprocess_exec("nice", sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert process.stdout
    try:
        await process.stdout.readline()
        yield
    finally:
        process.terminate()
        said = (await process.communicate())[0].decode().split()
        scene.seen[what] = int(said[-1]) if said else 0


def slow_loris(scene: Scene) -> AbstractAsyncContextManager[None]:
    """SLOW_SOCKETS connections to the pages, each of which sends a byte of its request every second, and comes back if closed."""
    return elsewhere(scene, "drip", scene.http, "slow-loris connections made in all")


def drip(port: int) -> None:
    """Hold SLOW_SOCKETS connections until SIGTERM."""
    made = 0

    async def one() -> None:
        nonlocal made
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                made += 1
                if made % 100 == 0 and made >= SLOW_SOCKETS:
                    print(made, flush=True)
                writer.write(b"GET /status.json HTTP/1.1\r\nHost: x\r\nX-a: ")
                while not writer.is_closing():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(1)
            await asyncio.sleep(1)

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(SLOW_SOCKETS)))

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    asyncio.run(main())


def idle_connections(scene: Scene) -> AbstractAsyncContextManager[None]:
    """IDLE_CONNECTIONS finished libp2p connections, an identity each, that are made again when they are closed."""
    return elsewhere(scene, "crowd", scene.ticket.addresses[0], "idle connections made in all")


def crowd(address: str) -> None:
    """Hold IDLE_CONNECTIONS connections until SIGTERM; print a line once they have been made, and each hundred made again."""
    import trio

    from lutetia.protocol.light_client.dial import dial

    made, at_once = 0, trio.Semaphore(8)

    async def hold() -> None:
        nonlocal made
        while True:
            with contextlib.suppress(ConnectionError, OSError):
                async with AsyncExitStack() as stack:
                    async with at_once:
                        connection = await stack.enter_async_context(dial(address))
                    made += 1
                    if made % 100 == 0 and made >= IDLE_CONNECTIONS:
                        print(made, flush=True)
                    while True:
                        await trio.sleep(10)
                        await (await connection.open_stream("/ipfs/ping/1.0.0")).close()
            await trio.sleep(1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(IDLE_CONNECTIONS):
                nursery.start_soon(hold)

    trio.run(main)


async def _liar(stack: AsyncExitStack, scene: Scene, name: str, host: str) -> HivemindTransport:
    folder = scene.folder / f"{name} {time.monotonic_ns()}"
    folder.mkdir()
    peer = await connect_hivemind(
        Identity.derived(name), listen=f"/ip4/{host}/tcp/0", bootstrap=list(scene.ticket.addresses), check=anything,
        state_folder=folder,
    )  # fmt: skip
    stack.push_async_callback(peer.close)
    return peer


@asynccontextmanager
async def silent_results(scene: Scene) -> AsyncIterator[None]:
    """LYING_KEYS identities at one address offer results for the next epoch whose blobs never arrive."""
    async with AsyncExitStack() as stack:
        liars = [await _liar(stack, scene, f"liar {n}", "127.0.0.2") for n in range(LYING_KEYS)]

        def lie(number: int, liar: HivemindTransport) -> Callable[[], object]:
            who, manifest = Identity.derived(f"liar {number}"), scene.honest.signed.manifest

            async def offer() -> None:
                trainer = scene.honest.trainers.get(0)
                epoch = (trainer.epoch if trainer else 0) + 1
                text = f"{number} {time.monotonic_ns()}"
                record = CheckpointRecord(
                    run=manifest.run_id, owner=who.public_key, issued=time.time(), shard=0, epoch=epoch,
                    parent=scene.honest.parents.get(0), weights=examples.blob("w" + text), state=examples.blob("s" + text),
                    trace=examples.blob("t" + text), samples=epoch * manifest.checkpoint_samples, loss=0.5,
                    peer_id=liar.peer_id, addresses=tuple(liar.addresses()),
                )  # fmt: skip
                expires = time.time() + 600
                coordinator = scene.ticket.addresses[0].rpartition("/p2p/")[2]
                reply = await offer_checkpoint(liar, coordinator, seal(record, who, expires), expires, scene.ticket.addresses)
                scene.count(f"lying results {reply.verdict}")
                await asyncio.sleep(1)

            return offer

        async with together(*(lie(number, liar) for number, liar in enumerate(liars))):
            yield


@asynccontextmanager
async def hammering(scene: Scene) -> AsyncIterator[None]:
    """HAMMERS identities at one address ask for the status without pause, and store claims of made-up owners."""
    async with AsyncExitStack() as stack:
        liars = [await _liar(stack, scene, f"hammer {n}", "127.0.0.3") for n in range(HAMMERS)]
        coordinator, run = scene.ticket.addresses[0].rpartition("/p2p/")[2], scene.honest.signed.manifest.run_id

        def ask(liar: HivemindTransport) -> Callable[[], object]:
            async def documents() -> None:
                for _ in range(20):
                    await ask_document(liar, coordinator, STATUS)
                    scene.count("status documents given")

            return documents

        def flood(liar: HivemindTransport) -> Callable[[], object]:
            async def claims() -> None:
                await claim(liar, run, f"made up {time.monotonic_ns()}")
                scene.count("claims of made-up owners sent")

            return claims

        async with together(*map(ask, liars), *map(flood, liars)):
            yield


@asynccontextmanager
async def everything(scene: Scene) -> AsyncIterator[None]:
    async with slow_loris(scene), idle_connections(scene), silent_results(scene), hammering(scene):
        yield


ATTACKS: dict[str, Attack] = {
    "none": nothing,
    f"{SLOW_SOCKETS} dripping HTTP connections": slow_loris,
    f"{IDLE_CONNECTIONS} idle libp2p connections": idle_connections,
    f"{LYING_KEYS} keys with results that never arrive": silent_results,
    f"{HAMMERS} peers that ask and store without pause": hammering,
    "all of these at once": everything,
}


async def sample(coordinator: Coordinator, cost: Cost) -> None:
    """Follow the coordinator's processes until cancelled."""
    began, busy_before = time.monotonic(), _busy(coordinator)
    while True:
        memory, files = 0, [0]
        for member in coordinator.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory += member.memory_info().rss
                files.append(member.num_fds())
                if member.name() == "p2pd":
                    cost.p2pd_files = max(cost.p2pd_files, files[-1])
        cost.memory, cost.files = max(cost.memory, memory / (1 << 20)), max(cost.files, *files)
        cost.processors = (_busy(coordinator) - busy_before) / max(1e-3, time.monotonic() - began)
        await asyncio.sleep(0.5)


def _busy(coordinator: Coordinator) -> float:
    """Seconds of processor time of the coordinator itself and its p2pd."""
    total = 0.0
    for member in coordinator.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.name() == "p2pd" or "worker" not in (line := " ".join(member.cmdline())) and "template" not in line:
                times = member.cpu_times()
                total += times.user + times.system
    return total


async def one_round(coordinator: Coordinator, scene: Scene, attack: Attack, epochs: int) -> Cost:
    cost = Cost()
    async with attack(scene):
        sampling = asyncio.create_task(sample(coordinator, cost))
        for _ in range(epochs):
            record = await asyncio.to_thread(scene.honest.train, 0)
            began = time.monotonic()
            while (reply := await _offered(scene.honest, record)) in _UNDECIDED:  # noqa: ASYNC110
                await asyncio.sleep(0.25)
            cost.waits.append(time.monotonic() - began)
            assert reply == "accepted", reply
            scene.honest.parents[0] = record.digest
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    return cost


async def _offered(honest: ScriptedNode, record: CheckpointRecord) -> str:
    try:
        return (await honest.offer(record)).verdict
    except OSError:
        return "unreachable"


async def study(epochs: int, only: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        wanted = {title: attack for title, attack in ATTACKS.items() if only in title or title == "none"}
        run = make_run(root, shards=1, samples_per_shard=8 * (epochs * (len(wanted) + 1)))
        http = free_port()
        settings = {"http": f"127.0.0.1:{http}", "offers_per_minute": 600, "stitch": "end"}
        coordinator = await Coordinator.start(run.folder, json.dumps(settings))
        try:
            await up(coordinator)
            async with joined("honest", Ticket.decode(run.ticket), root) as honest:
                scene = Scene(Ticket.decode(run.ticket), http, honest, root)
                await one_round(coordinator, scene, nothing, epochs)  # workers start and imports are read
                usual: Cost | None = None
                for title, attack in wanted.items():
                    scene.seen.clear()
                    cost = await one_round(coordinator, scene, attack, epochs)
                    usual = usual or cost
                    _show(title, cost, usual, scene.seen)
        finally:
            coordinator.process.kill()
            await coordinator.process.wait()


def _show(title: str, cost: Cost, usual: Cost, seen: dict[str, int]) -> None:
    wait, longest, base = statistics.median(cost.waits), max(cost.waits), statistics.median(usual.waits)
    within = {
        "memory, times usual": cost.memory / usual.memory, "files": float(max(cost.files, cost.p2pd_files)),
        "processors": cost.processors, "acceptance, times usual": wait / base,
    }  # fmt: skip
    over = [name for name, value in within.items() if value > BOUNDS[name]]
    cells = (
        title, f"{cost.memory:.0f}", cost.files, cost.p2pd_files, f"{cost.processors:.2f}", f"{wait:.1f}, {longest:.1f}",
        f"{wait / base:.1f}", ", ".join(over) or "none", "; ".join(f"{count:,} {what}" for what, count in sorted(seen.items())),
    )  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks coordinator-attacks", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="honest epochs in each round (default 20)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the attacks whose names hold these words")
    arguments = parser.parse_args(argv)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    print(f"{Machine.this()}\n\nBounds: {', '.join(f'{name} {value:g}' for name, value in BOUNDS.items())}.\n")
    print("| attack | memory, MiB | files | of p2pd | processors | acceptance, s: median, longest | ÷ usual | over | what came |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    asyncio.run(study(arguments.epochs, arguments.only))
