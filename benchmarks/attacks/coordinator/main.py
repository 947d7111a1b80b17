"""`python -m benchmarks coordinator-attacks [--epochs N] [--only WORDS] [--attackers-nice N]`: what whole rounds of attack cost.

A coordinator in a process of its own, on loopback. In each round an honest node at 127.0.0.1 hands in epochs of one shard while
one attack goes on, after half as many epochs without it, to which the round is compared: other work on the machine then counts
on both sides. Measured are the coordinator's memory, open files and processor time, p2pd and its workers included, and the time
from an honest offer to its acceptance, as the node sees it and by the coordinator's own ledger. Real attackers have processors
of their own; these have the coordinator's. At niceness 10 they take a good part of them, so that the wait shows what they make
the coordinator do and what they take from it; at 19 they get little but what is left over, and the wait shows the first alone.
Bounds that a round must not exceed are in `BOUNDS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.attacks.coordinator.attackers import (
    HAMMERS,
    IDLE_CONNECTIONS,
    LYING_KEYS,
    PAGE_READERS,
    SLOW_SOCKETS,
    STREAM_READERS,
)
from benchmarks.report import Machine
from lutetia.coordinator.ledger.describe import read_events
from lutetia.coordinator.ledger.events import CheckpointAccepted, ResultSeen
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.ticket import Ticket
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, free_port, joined
from tests.coordinator.test_serve import make_run, up

BOUNDS = {"memory, times usual": 1.5, "files": 1024.0, "processors": 1.0, "acceptance, times usual": 3.0}
"""Memory of all processes of the coordinator; files of the fullest of them; processors that it and p2pd keep busy on average,
without its workers."""
LOOK_SECONDS = 0.12
"""Between two questions for a verdict."""


_UNDECIDED = ("queued", "busy", "unreachable", "inconclusive")


@dataclass
class Cost:
    """What a round cost the coordinator at most, and how long honest results waited, in seconds.

    `own` are the ledger's times from the arrival of an honest record to its acceptance, `checks` those of each of its checks.
    `busy`, `working` and `serving`: processor time over the round, of the coordinator with its p2pd, of its workers, and of its
    HTTP process.
    """

    memory: float = 0.0
    files: int = 0
    p2pd_files: int = 0
    processors: float = 0.0
    waits: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    checks: list[dict[str, float]] = field(default_factory=list)
    busy: float = 0.0
    working: float = 0.0
    serving: float = 0.0


@dataclass
class Scene:
    """What attacks know: the run's ticket, where its pages are, and the honest node, whose epochs they try to delay."""

    ticket: Ticket
    http: int
    honest: ScriptedNode
    nice: int
    """Niceness of the attackers."""
    accepted: int = 0
    """Epochs of the shard that are accepted."""

    def next_epoch(self) -> dict[str, object]:
        """What an attacker must know to offer a result of the next epoch."""
        return {"epoch": self.accepted + 1, "parent": self.honest.parents.get(0)}


@dataclass
class Attacker:
    """A process of attackers, and what it said last."""

    process: asyncio.subprocess.Process
    said: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def start(cls, name: str, scene: Scene) -> Attacker:
        """Returns once the attack is in full swing."""
        command = (sys.executable, "-m", "benchmarks.attacks.coordinator.attackers", name)
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
        attacker = cls(process)
        manifest = scene.honest.signed.to_bytes().decode()
        attacker.tell({"ticket": scene.ticket.encode(), "manifest": manifest, "http": scene.http, "nice": scene.nice})
        attacker.tell(scene.next_epoch())
        assert process.stdout
        attacker.said = json.loads(await process.stdout.readline())
        return attacker

    def tell(self, line: dict[str, object]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(line).encode() + b"\n")

    async def listen(self) -> None:
        """Follow what it says until it ends."""
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            self.said = json.loads(line)

    async def end(self) -> None:
        """End it and its network processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        await self.process.wait()


ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    f"{SLOW_SOCKETS} dripping HTTP connections": ("drip",),
    f"{PAGE_READERS} HTTP connections that ask without pause": ("pages",),
    f"{STREAM_READERS} event streams that read nothing": ("streams",),
    f"{IDLE_CONNECTIONS} idle libp2p connections": ("crowd",),
    f"{LYING_KEYS} keys with results that never arrive": ("silent",),
    f"{LYING_KEYS} keys with garbage that arrives": ("garbage",),
    f"{HAMMERS} peers that ask and store without pause": ("hammer",),
    "all of these at once": ("drip", "pages", "streams", "crowd", "silent", "garbage", "hammer"),
}
"""The attackers of each round, by their names in `attackers.py`."""


async def sample(coordinator: Coordinator, cost: Cost) -> None:
    """Follow the coordinator's processes until cancelled."""
    began, before = time.monotonic(), _processor_seconds(coordinator)
    while True:
        memory, files = 0, [0]
        for member in coordinator.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory += member.memory_info().rss
                files.append(member.num_fds())
                if member.name() == "p2pd":
                    cost.p2pd_files = max(cost.p2pd_files, files[-1])
        cost.memory, cost.files = max(cost.memory, memory / (1 << 20)), max(cost.files, *files)
        spent = (max(0.0, after - first) for first, after in zip(before, _processor_seconds(coordinator), strict=True))
        cost.busy, cost.working, cost.serving = spent
        cost.processors = cost.busy / max(1e-3, time.monotonic() - began)
        await asyncio.sleep(0.5)


def _processor_seconds(coordinator: Coordinator) -> tuple[float, float, float]:
    """Seconds of processor time of the coordinator itself with its p2pd, of its workers, and of its HTTP process."""
    own = workers = pages = 0.0
    for member in coordinator.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            times, line = member.cpu_times(), " ".join(member.cmdline())
            spent = times.user + times.system
            if "lutetia.coordinator.web" in line:
                pages += spent
            elif member.name() == "p2pd" or ("worker" not in line and "template" not in line):
                own += spent
            else:
                workers += spent
    return own, workers, pages


def own_times(folder: Path, records: Collection[str]) -> tuple[list[float], list[dict[str, float]]]:
    """By the ledger in `folder`: seconds from the arrival of each of `records` to its acceptance, and those of each check."""
    seen, waits, checks = dict[str, float](), list[float](), list[dict[str, float]]()
    for event in read_events(folder):
        if isinstance(event, ResultSeen):
            seen.setdefault(event.record.digest, event.time)
        elif isinstance(event, CheckpointAccepted) and (digest := event.acceptance.checkpoint) in records:
            waits.append(event.time - seen[digest])
            taken: dict[str, float] = defaultdict(float)
            for cost in event.costs:
                taken[cost.check] += cost.seconds
            checks.append(dict(taken))
    return waits, checks


async def one_round(coordinator: Coordinator, scene: Scene, attackers: Sequence[str], epochs: int) -> tuple[Cost, dict[str, int]]:
    """What it cost, and what the attackers did."""
    cost = Cost()
    async with AsyncExitStack() as stack:
        attacking = []
        for name in attackers:
            attacking.append(await Attacker.start(name, scene))
            stack.push_async_callback(attacking[-1].end)
        following = [asyncio.create_task(attacker.listen()) for attacker in attacking]
        sampling, records = asyncio.create_task(sample(coordinator, cost)), set[str]()
        for _ in range(epochs):
            record = await asyncio.to_thread(scene.honest.train, 0)
            began = time.monotonic()
            while (reply := await _offered(scene.honest, record)) in _UNDECIDED:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)
            cost.waits.append(time.monotonic() - began)
            assert reply == "accepted", reply
            scene.honest.parents[0], scene.accepted = record.digest, record.epoch
            records.add(record.digest)
            for attacker in attacking:
                attacker.tell(scene.next_epoch())
        for task in (sampling, *following):
            task.cancel()
        await asyncio.gather(sampling, *following, return_exceptions=True)
    cost.own, cost.checks = await asyncio.to_thread(own_times, coordinator.folder, records)
    return cost, {f"{what} ({name})": n for name, one in zip(attackers, attacking, strict=True) for what, n in one.said.items()}


async def _offered(honest: ScriptedNode, record: CheckpointRecord) -> str:
    try:
        return (await honest.offer(record)).verdict
    except OSError:
        return "unreachable"


async def study(epochs: int, only: str, nice: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        wanted = {title: names for title, names in ATTACKS.items() if only in title}
        run = make_run(root, shards=1, samples_per_shard=8 * 2 * epochs * (len(wanted) + 1))
        http = free_port()
        settings = {"http": f"127.0.0.1:{http}", "offers_per_minute": 600, "stitch": "end"}
        coordinator = await Coordinator.start(run.folder, json.dumps(settings))
        try:
            await up(coordinator)
            async with joined("honest", Ticket.decode(run.ticket), root) as honest:
                scene = Scene(Ticket.decode(run.ticket), http, honest, nice)
                await one_round(coordinator, scene, (), epochs)  # workers start and imports are read
                for title, attackers in wanted.items():
                    usual, _ = await one_round(coordinator, scene, (), -(-epochs // 2))
                    cost, seen = await one_round(coordinator, scene, attackers, epochs)
                    _show(title, cost, usual, seen)
        finally:
            coordinator.process.kill()
            await coordinator.process.wait()


def _show(title: str, cost: Cost, usual: Cost, seen: dict[str, int]) -> None:
    wait, longest, base = statistics.median(cost.waits), max(cost.waits), statistics.median(usual.waits)
    own = f"{statistics.median(cost.own):.2f}, {statistics.median(usual.own):.2f}"
    checks = "; ".join(
        f"{name} {statistics.median(one.get(name, 0.0) for one in cost.checks):.2f}, "
        f"{statistics.median(one.get(name, 0.0) for one in usual.checks):.2f}"
        for name in usual.checks[0]
    )
    per_epoch = (
        f"{taken / len(cost.waits):.2f}, {before / len(usual.waits):.2f}"
        for taken, before in ((cost.busy, usual.busy), (cost.working, usual.working), (cost.serving, usual.serving))
    )
    within = {
        "memory, times usual": cost.memory / usual.memory, "files": float(max(cost.files, cost.p2pd_files)),
        "processors": cost.processors, "acceptance, times usual": wait / base,
    }  # fmt: skip
    over = [name for name, value in within.items() if value > BOUNDS[name]]
    cells = (
        title, f"{cost.memory:.0f}", cost.files, cost.p2pd_files, f"{cost.processors:.2f}", f"{wait:.2f}, {longest:.2f}",
        f"{base:.2f}", f"{wait / base:.1f}", own, checks, *per_epoch, ", ".join(over) or "none",
        "; ".join(f"{count:,} {what}" for what, count in sorted(seen.items())),
    )  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks coordinator-attacks", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="honest epochs in each round (default 20)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the attacks whose names hold these words")
    parser.add_argument("--attackers-nice", type=int, default=10, metavar="N", help="their niceness, 0 to 19 (default 10)")
    arguments = parser.parse_args(argv)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    print(f"{Machine.this()}, attackers at niceness {arguments.attackers_nice}\n")
    print(f"Bounds: {', '.join(f'{name} {value:g}' for name, value in BOUNDS.items())}.\n")
    columns = (
        "attack", "memory, MiB", "files", "of p2pd", "processors", "acceptance, s: median, longest", "before the attack", "÷",
        "by the ledger: now, before", "of it each check: now, before", "processor s an epoch, coordinator and p2pd: now, before",
        "workers: now, before", "HTTP process: now, before", "over its bounds", "what came",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    asyncio.run(study(arguments.epochs, arguments.only, arguments.attackers_nice))
