"""`python -m benchmarks page`: the run's page at scale: restart from a snapshot, and API, processor and memory under viewers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.page.recorded_run import MadeUpRun
from benchmarks.page.viewers import Browser, Timings, Viewer, occasional
from benchmarks.report import Machine
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import rules_digest
from lutetia.coordinator.snapshot.process import SnapshotOrder, replay_and_write

ROUTE_BUDGET, CORES_BUDGET, MEMORY_BUDGET, RESTART_BUDGET = 0.1, 0.5, 400, 2.0
"""Seconds for the 95th percentile of each route, processors and MiB for all viewers, seconds to open the ledger."""
RESTARTS = 5
ROUNDS = 10
ARRIVAL = 20.0
"""Seconds within which the viewers come."""


@dataclass(frozen=True)
class Load:
    """What the server's process used: processors, and its memory in MiB at the end and at most."""

    cores: float
    memory: float
    most: float


class Server:
    """The server's process."""

    def __init__(self, process: asyncio.subprocess.Process, started: tuple[float, float, int], port: int) -> None:
        self.process, self.started, self.port = process, started, port
        self._watched = psutil.Process(process.pid)

    @classmethod
    async def start(cls, folder: Path, run: MadeUpRun) -> Server:
        arguments = [str(folder), *map(str, (run.shards, run.peers, run.events)), repr(run.now)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.page.server", *arguments, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout
        wall, busy, trusted = (await process.stdout.readline()).split()
        return cls(process, (float(wall), float(busy), int(trusted)), int(await process.stdout.readline()))

    async def accept(self, count: int = 1) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n".encode())
        await self.process.stdin.drain()

    async def accepted(self) -> None:
        """Wait until what was asked for is in the ledger."""
        assert self.process.stdout
        await self.process.stdout.readline()

    def busy(self) -> float:
        """Processor seconds of all its threads so far, to the microsecond (Linux)."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    async def observe(self, seconds: float, every: float) -> Load:
        """The load of so many seconds, in which a result is accepted every `every` seconds."""
        began, before, most = time.monotonic(), self._watched.cpu_times(), 0.0
        while (passed := time.monotonic() - began) < seconds:
            await self.accept()
            await self.accepted()
            await asyncio.sleep(min(every, seconds - passed))
            most = max(most, self._memory())
        after = self._watched.cpu_times()
        busy = after.user + after.system - before.user - before.system
        return Load(busy / (time.monotonic() - began), self._memory(), most)

    def _memory(self) -> float:
        return self._watched.memory_info().rss / 2**20

    async def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        await self.process.wait()


async def measure(arguments: argparse.Namespace, folder: Path) -> str:
    run = MadeUpRun(arguments.shards, arguments.peers, arguments.events, arguments.now)
    if not (folder / "ledger.sqlite").exists():
        _say(f"making a ledger of {run.events} events")
        await asyncio.to_thread(lambda: run.write(folder).close())
    root = RunFolder(folder)
    root.snapshot.unlink(missing_ok=True)
    replayed = await _start_and_end(folder, run)
    _say("making the snapshot")
    report = await asyncio.to_thread(replay_and_write, root, SnapshotOrder(rules=rules_digest()))
    restarts = [await _start_and_end(folder, run) for _ in range(RESTARTS)]
    server = await Server.start(folder, run)
    first = Timings()
    await Browser(server.port, "127.2.1.1", first).get("/api/v1/run", "run")
    _say("measuring one route after the other")
    costs = await costs_of(server, run)
    _say("measuring without viewers")
    alone = await server.observe(arguments.seconds / 2, arguments.every)
    _say(f"measuring with {arguments.viewers} viewers")
    timings = Timings()
    async with asyncio.TaskGroup() as group:
        people = [peer.peer_id for peer in run.people[:50]]
        pages = [Viewer(number, server.port, timings).watch(ARRIVAL) for number in range(arguments.viewers)]
        tasks = [group.create_task(work) for work in (*pages, occasional(server.port, timings, people, run.shards))]
        crowd = await server.observe(ARRIVAL + arguments.seconds, arguments.every)
        for task in tasks:
            task.cancel()
    await server.end()
    return _text(arguments, report.seconds, replayed, restarts, (alone, crowd), timings, first.seconds["run"][0], costs)


async def costs_of(server: Server, run: MadeUpRun) -> dict[str, tuple[list[float], list[float]]]:
    """By route: processor milliseconds of the server for the first answer after an event, and for one after that."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for turn in range(ROUNDS):
        for route, path in _routes(run, turn).items():
            browser = Browser(server.port, f"127.3.{turn + 1}.1", Timings())
            head = json.loads(await browser.get("/api/v1/run", "run"))["events"]
            await server.accept()
            await server.accepted()
            for kind in (0, 1):
                before = server.busy()
                await Browser(server.port, f"127.3.{turn + 1}.{kind + 2}", Timings()).get(path.format(head=head), route)
                found.setdefault(route, ([], []))[kind].append(1000 * (server.busy() - before))
    return found


def _routes(run: MadeUpRun, turn: int) -> dict[str, str]:
    """Path of each route; `{head}` is the number of events before the last."""
    paths = {
        "run": "run", "history": "history", "shards": "shards?after={head}", "shards, whole": "shards",
        "shards/{index}, last 200": f"shards/{turn}?last=200", "shards/{index}, whole": f"shards/{turn}",
        "peers": "peers?limit=200", "peers/{peer}": f"peers/{run.people[turn].peer_id}", "metrics": "metrics?losses=false",
        "metrics with losses": "metrics", "gallery": "gallery", "checkpoints": "checkpoints",
        "checkpoints of a shard": f"checkpoints?shard={turn}", "mixtures": "mixtures",
        "events": "events?after={head}&limit=500", "status": "status",
    }  # fmt: skip
    return {route: f"/api/v1/{path}" for route, path in paths.items()}


async def _start_and_end(folder: Path, run: MadeUpRun) -> tuple[float, float, int]:
    server = await Server.start(folder, run)
    await server.end()
    return server.started


def _text(
    arguments: argparse.Namespace, made: float, replayed: tuple[float, float, int], restarts: Sequence[tuple[float, float, int]],
    loads: tuple[Load, Load], timings: Timings, first: float,
    costs: Mapping[str, tuple[list[float], list[float]]],
) -> str:  # fmt: skip
    alone, crowd = loads
    walls, spent = [wall for wall, _, _ in restarts], [busy for _, busy, _ in restarts]
    load = os.getloadavg()
    lines = [
        f"{Machine.this()}; load averages {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}.", "",
        f"{arguments.peers:,} peers, {arguments.shards} shards, a made-up ledger of {arguments.events:,} events, one result each "
        f"{arguments.every:.0f} s, {arguments.viewers} viewers from as many addresses, who come within {ARRIVAL:.0f} s and stay "
        f"for {arguments.seconds:.0f} s, once.",
        "", "| what | value | range | N | budget |", "|---|---|---|---|---|",
        f"| open the ledger from a snapshot, wall | {statistics.median(walls):.2f} s | {min(walls):.2f} to {max(walls):.2f} "
        f"| {len(walls)} | ≤ {RESTART_BUDGET:.0f} s |",
        f"| the same, processor time | {statistics.median(spent):.2f} s | {min(spent):.2f} to {max(spent):.2f} "
        f"| {len(spent)} | |",
        f"| the page's first answer after that, wall | {first:.2f} s | | 1 | |",
        f"| open it without one, wall (processor) | {replayed[0]:.2f} s ({replayed[1]:.2f} s) | | 1 | |",
        f"| make and verify a snapshot, in a child, processor time | {made:.2f} s | | 1 | |",
        f"| processors, without viewers | {alone.cores:.3f} | | | |",
        f"| processors, with viewers | {crowd.cores:.3f} | | | |",
        f"| processors, for the viewers | {crowd.cores - alone.cores:.3f} | | | ≤ {CORES_BUDGET} |",
        f"| memory, without viewers | {alone.memory:.0f} MiB | at most {alone.most:.0f} | | |",
        f"| memory, with viewers | {crowd.memory:.0f} MiB | at most {crowd.most:.0f} | | |",
        f"| memory, for the viewers | {crowd.most - alone.memory:.0f} MiB | | | ≤ {MEMORY_BUDGET} MiB |",
        "", "| route | median | 95 % | slowest | N | kB each | budget (95 %) |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for route, seconds in sorted(timings.seconds.items()):
        ranked = sorted(1000 * each for each in seconds)
        high = ranked[min(len(ranked) - 1, round(0.95 * len(ranked)))]
        size = timings.size[route] / len(ranked) / 1000
        lines.append(
            f"| {route} | {statistics.median(ranked):.1f} ms | {high:.1f} ms | {ranked[-1]:.1f} ms | {len(ranked)} | {size:.1f} "
            f"| ≤ {1000 * ROUTE_BUDGET:.0f} ms |"
        )
    lines += ["", "| route | processor time after an event | at most | once more | at most | N |", "|---|---|---|---|---|---|"]
    for route, (made_ms, kept_ms) in sorted(costs.items()):
        figures = " | ".join(f"{statistics.median(each):.1f} ms | {max(each):.1f} ms" for each in (made_ms, kept_ms))
        lines.append(f"| {route} | {figures} | {len(made_ms)} |")
    counts = ", ".join(f"{count} with status {status}" for status, count in sorted(timings.statuses.items()))
    return "\n".join([*lines, "", f"Answers: {counts}.", ""])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=(__doc__ or "").partition("`: ")[2])
    parser.add_argument("--folder", type=Path, help="keep the made-up run there, and use it again; default: a temporary folder")
    parser.add_argument("--peers", type=int, default=1000, help="peers, all online (default: 1000)")
    parser.add_argument("--shards", type=int, default=64, help="shards (default: 64)")
    parser.add_argument("--events", type=int, default=100_000, help="events of the ledger (default: 100000)")
    parser.add_argument("--viewers", type=int, default=50, help="open pages (default: 50)")
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of watching (default: 120)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between accepted results (default: 10)")
    parser.add_argument(
        "--now", type=float, default=time.time(), help="Unix seconds at which the made-up ledger ends (default: now)"
    )
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as scratch:
        print(asyncio.run(measure(arguments, arguments.folder or Path(scratch) / "run")))
