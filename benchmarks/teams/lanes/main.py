"""`python -m benchmarks team-lanes`: what a coordinator pays for each lane, with 1 to 32 of them, over real p2pd on loopback.

A coordinator in processes of its own serves one shard. As many identities as there are lanes, each with a p2pd of its own, claim
the lanes and offer results that were trained before, so that no trainer runs meanwhile; then each fetches the merged epoch from
the coordinator. Every check, replay, merge and transfer is real. The next epoch begins when all replays are done.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from benchmarks.fuzz.examples import WAN
from benchmarks.report import Machine
from benchmarks.teams.lanes.costs import EpochCosts, RunCosts, part_of, table
from benchmarks.teams.lanes.peers import LanePeer, StreamBytes, renew
from benchmarks.teams.lanes.prepared import Preparation
from benchmarks.toy_data import write_toy_data
from lutetia.cli.local.poller import read_status
from lutetia.cli.local.processes import free_port
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.describe import read_events
from lutetia.coordinator.ledger.events import CheckpointAccepted, LaneAccepted, LanesMerged
from lutetia.coordinator.settings import RunSettings
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import Timing
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket

LANES = (1, 4, 8, 16, 32)
STEPS, BATCH, HELD_OUT = 8, 4, 16
HEARTBEAT = 8.0
"""Seconds. One process renews the records of all peers; with the tiny run's 2 s those of 32 lapse on two cores."""
LINES = "lanes.jsonl"
LOOK_SECONDS, LONGEST = 0.3, 1800.0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks team-lanes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("team-lanes"), help="folder of lines and table (default: team-lanes)")
    parser.add_argument("--lanes", type=int, action="append", help=f"lanes, may be given again (default: {LANES})")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run; the first is not counted (default: 4)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "machine.json").write_text(json.dumps(asdict(Machine.this())))
    for lanes in arguments.lanes or LANES:
        with tempfile.TemporaryDirectory() as name:
            costs = asyncio.run(measure(lanes, arguments.epochs, Path(name)))
        with (arguments.out / LINES).open("a") as file:
            file.write(json.dumps(asdict(costs)) + "\n")
    text = table([read_line(line) for line in (arguments.out / LINES).read_text().splitlines()])
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


def read_line(line: str) -> RunCosts:
    read = json.loads(line)
    return RunCosts(tuple(EpochCosts(**epoch) for epoch in read["epochs"]), read["peak"])


def make_run(root: Path, lanes: int, epochs: int) -> CreatedRun:
    """A run that is not done within the measured epochs, whose merges wait for all lanes."""
    write_toy_data(root / "data", 1, HELD_OUT)
    team = TeamSpec(lanes=lanes, quorum=1.0, deadline=LONGEST) if lanes > 1 else None
    settings = RunSettings(
        preset="tiny", name=f"{lanes} lanes", addresses=(f"127.0.0.1:{free_port()}",), expert=ExpertSpec(config=WAN),
        optimisation=Optimisation(batch=BATCH, learning_rate=2e-3, ema_decay=0.9), team=team,
        samples_per_shard=(epochs + 1) * STEPS * BATCH, checkpoint_samples=STEPS * BATCH, holdout_tolerance=1.0,
        raw_tolerance=1.0, timing=Timing(heartbeat=HEARTBEAT, tenure=30 * HEARTBEAT),
    )  # fmt: skip
    return create_run(root / "data", root / "run", settings)


class Watch:
    """Follows the processor time and memory of the coordinator's processes, by part."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._spent: dict[int, tuple[str, float]] = {}
        self.peak: dict[str, float] = defaultdict(float)

    def look(self) -> dict[str, float]:
        """Processor seconds of each part since its start. A process that has ended keeps what it had at the last look."""
        for member in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError, StopIteration):
                part, times = part_of(member.cmdline()), member.cpu_times()
                self._spent[member.pid] = part, times.user + times.system
                lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
                most = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
                self.peak[part] = max(self.peak[part], most)
        sums: dict[str, float] = defaultdict(float)
        for part, spent in self._spent.values():
            sums[part] += spent
        return sums


@asynccontextmanager
async def serving(run: CreatedRun) -> AsyncIterator[Watch]:
    """The coordinator of the run, once it serves."""
    command = (sys.executable, "-m", "lutetia.cli", "coordinator", "serve", str(run.folder), "--stitch", "end", "--no-gallery")
    with (run.folder.parent / "coordinator.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    watch = Watch(process.pid)
    try:
        await until(run, lambda status: True, "the coordinator to serve")
        yield watch
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def until(run: CreatedRun, holds: Callable[[SwarmStatus], bool], what: str, watch: Watch | None = None) -> None:
    """Look at the status file until it says so. Other processes write it, and nothing else tells of it."""
    end = time.monotonic() + LONGEST
    while (status := read_status(run.folder)) is None or not holds(status):
        if time.monotonic() > end:
            raise SystemExit(f"waited {LONGEST:.0f} s for {what}; see {run.folder.parent / 'coordinator.log'}")
        if watch:
            watch.look()
        await asyncio.sleep(LOOK_SECONDS)


async def measure(lanes: int, epochs: int, root: Path) -> RunCosts:
    run = make_run(root, lanes, epochs)
    results = BlobStore(root / "results")
    began = time.monotonic()

    def tell(what: object) -> None:
        print(f"{lanes} lanes, {time.monotonic() - began:.0f} s: {what}", file=sys.stderr, flush=True)

    prepared = list(Preparation(run.manifest, results, root / "training").epochs(epochs))
    tell("results are trained")
    counted, ticket, accepted, measured = StreamBytes(), Ticket.decode(run.ticket), [0], []
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(serving(run))
        peers = []
        for lane in range(lanes):
            peers.append(await LanePeer.join(lane, ticket, results, root / f"node {lane}", counted))
            stack.push_async_callback(peers[-1].transport.close)
        tell("nodes have joined")
        renewing = asyncio.create_task(renew(peers, accepted))
        stack.callback(renewing.cancel)
        await until(run, lambda status: _claimed(status) == lanes, "claims on all lanes")
        for offers in prepared:
            measured.append(await measure_epoch(run, peers, offers, counted, watch))
            accepted[0] = offers[0].epoch
            tell(measured[-1])
        peak = dict(watch.peak)
    return RunCosts(tuple(measured), peak)


def _claimed(status: SwarmStatus) -> int:
    shard = status.shards[0]
    return len(shard.lanes) or (shard.owner is not None)


async def measure_epoch(
    run: CreatedRun, peers: Sequence[LanePeer], offers: Sequence[CheckpointRecord], counted: StreamBytes, watch: Watch
) -> EpochCosts:  # fmt: skip
    before, received, sent = watch.look(), counted.to_coordinator, counted.from_coordinator
    epoch = offers[0].epoch
    offering = [asyncio.create_task(peer.offer(offer)) for peer, offer in zip(peers, offers, strict=True)]
    await until(run, lambda status: status.shards[0].epoch == epoch, f"epoch {epoch}", watch)
    replies = await asyncio.gather(*offering)
    ended = [event for event in read_events(run.folder) if isinstance(event, LaneAccepted | LanesMerged | CheckpointAccepted)]
    ended = [event for event in ended if event.acceptance.epoch == epoch]
    last = next(event for event in reversed(ended) if not isinstance(event, LaneAccepted))
    if len(peers) > 1 and len(last.acceptance.lanes) < len(peers):
        raise SystemExit(f"epoch {epoch} was merged of lanes {last.acceptance.lanes} alone; the offers ended {replies}")
    await asyncio.gather(*(peer.fetch(last.acceptance) for peer in peers))
    await until(run, lambda status: status.audits_due == 0, f"the audits of epoch {epoch}", watch)
    after = watch.look()
    lanes_done = max((event.time for event in ended if isinstance(event, LaneAccepted)), default=last.time)
    return EpochCosts(
        len(peers), epoch, {part: after[part] - before.get(part, 0.0) for part in after}, counted.to_coordinator - received,
        counted.from_coordinator - sent, lanes_done - max(taken for taken, _ in replies), last.time - lanes_done,
    )  # fmt: skip
