"""How fast a swarm recovers, and the bytes on the wire: takeovers, partitions, a coordinator's restart, bytes per acceptance.

Real processes, as in tests/faults. Partitions and bytes need network namespaces (root, iproute2, /dev/net/tun); without them
their rows are missing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.report import Row
from lutetia.coordinator.ledger.events import CheckpointAccepted
from lutetia.coordinator.ledger.log import Ledger
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from tests.faults.world.network_namespaces import Network, network, why_not
from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import until
from tests.faults.world.world import LEASE, STEPS, Box, World, acceptances, accepted, world

ROUNDS = 3
INTERVAL = STEPS * 2
EVENTS = 100_000
PEERS = (1, 2, 4)
WINDOW = 20.0
STAGES = {
    "claiming": "another node claims its shard",
    "syncing": "the claim is settled",
    "training": "its checkpoint is there",
    "step": "first step elsewhere",
}


async def _takeovers(pair: Pair) -> list[Row]:
    """A node is killed; the other node takes over its shard."""
    judged, lost = [], []
    begun: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(ROUNDS):
        holder, heir = await pair.ready()
        status = await holder.until(samples=lambda count: count)
        killed = time.monotonic()
        await holder.end(signal.SIGKILL)
        for stage, seconds in (await _stages(heir, killed)).items():
            begun[stage].append(seconds)
        base = (await heir.until(epoch=lambda epoch: epoch is not None))["epoch"]
        lost.append(max(0.0, status["samples"] - base * INTERVAL) / INTERVAL)
        await pair.coordinator.accepts(1, author=await owner(heir))
        judged.append(time.monotonic() - killed)
    *before, first = (Row.of(f"SIGKILL of a node → {what}", begun[stage], "s") for stage, what in STAGES.items())
    return [
        *before,
        Row.of(first.what, begun["step"], "s", f"≤ {LEASE + 5:.0f} s", f"lease {LEASE:.0f} s"),
        Row.of("SIGKILL of a node → next acceptance from elsewhere", judged, "s"),
        Row.of("work lost", lost, "intervals", "≤ 1", "samples trained beyond the last accepted checkpoint"),
    ]


async def _stages(heir: Box, killed: float) -> dict[str, float]:
    """Seconds from `killed` to the start of each of STAGES; a stage that was too short to be seen starts with the next one."""
    seen: dict[str, float] = {}

    async def stepping() -> bool:
        status = await heir.status()
        state, now = status.get("state"), time.monotonic() - killed
        reached = "step" if state == "training" and status.get("step") else state
        if reached in STAGES:
            for stage in list(STAGES)[: list(STAGES).index(reached) + 1]:
                seen.setdefault(stage, now)
        return reached == "step"

    await until(stepping, f"{heir.name} to train")
    return seen


async def _partitions(pair: Pair, net: Network) -> list[Row]:
    """The node that trains is cut off from all peers, and reconnects."""
    elsewhere, healed = [], []
    for _ in range(ROUNDS):
        holder, heir = await pair.ready()
        cut = time.monotonic()
        await net.around(holder.name, cut=True)
        await heir.until(state="training", step=lambda step: step)
        elsewhere.append(time.monotonic() - cut)
        await pair.coordinator.accepts(1, author=await owner(heir))
        heal = time.monotonic()
        await net.heal()
        await holder.until(state="idle")
        healed.append(time.monotonic() - heal)
    return [
        Row.of("partition → first step on the other side", elsewhere, "s", detail=f"lease {LEASE:.0f} s"),
        Row.of("partition healed → one owner again", healed, "s", detail="the node that was cut off releases its shard"),
    ]


def _long_history(folder: Path, manifest: Manifest) -> None:
    """Append EVENTS acceptances to the ledger of a run."""
    ledger = Ledger.open(folder / "ledger.sqlite", manifest.run_id)
    shards, now = len(manifest.shards), time.time()
    parents: dict[int, str | None] = dict.fromkeys(range(shards))
    blob = BlobRef(digest="ab" * 32, size=1)
    events = []
    for index in range(EVENTS):
        shard, checkpoint = index % shards, f"{index:064x}"
        given = AcceptanceRecord(
            run=manifest.run_id, owner=manifest.coordinators[0], issued=now, shard=shard, epoch=index // shards + 1,
            checkpoint=checkpoint, parent=parents[shard], weights=blob, state=blob, samples=INTERVAL,
            author=f"{index % 1000:064x}", tenure_until=now, holdout_loss=0.5,
        )  # fmt: skip
        events.append(CheckpointAccepted(time=now, acceptance=given, parent_loss=0.6))
        parents[shard] = checkpoint
    ledger.append(events)
    ledger.close()


async def _restarts(folder: Path) -> list[Row]:
    """From the start of the process to its first status, with and without a long history."""
    fresh, long, busy = [], [], []
    async with world(folder, shards=8, samples_per_shard=(EVENTS // 8 + 1) * INTERVAL) as place:
        for times in (fresh, long):
            for _ in range(ROUNDS):
                began = time.monotonic()
                coordinator = await place.coordinator()
                times.append(time.monotonic() - began)
                if times is long:
                    spent = psutil.Process(coordinator.process.pid).cpu_times()
                    busy.append(spent.user + spent.system)
                await coordinator.end(signal.SIGKILL)
            if times is fresh:
                await asyncio.to_thread(_long_history, place.run.folder, place.run.manifest)
    return [
        Row.of("coordinator: start to first status, empty ledger", fresh, "s"),
        Row.of(f"coordinator: start to first status, {EVENTS} events", long, "s", detail="after SIGKILL"),
        Row.of(f"coordinator: processor time until then, {EVENTS} events", busy, "s"),
    ]


async def _bytes(place: World, net: Network) -> list[Row]:
    """All bytes on the wire per acceptance, over at least WINDOW seconds."""
    rows = []
    coordinator = await place.coordinator(prefix=net.prefix("hub"))
    for count in PEERS:
        for number in range(count):
            name = f"node{number}"
            if name not in place.members:
                listen = f"/ip4/{net.address(name)}/tcp/0"
                node = await place.box(name, listen=listen, prefix=net.prefix(name))
                await node.until(state="training", accepted=lambda count: count)
        before, began, at = await net.sent(), time.monotonic(), _accepted(place)
        await until(lambda at=at, began=began: _enough(place, at, began), "acceptances", 300)
        sent, more = await net.sent(), _accepted(place) - at
        payload = sum(ref.size for ref in _payload(place)) + 4 * STEPS
        total = sum(sent.values()) - sum(before.values())
        detail = f"× {total / more / payload:.2f} of the checkpoint's own {payload / 1000:.0f} kB; {more} acceptances"
        rows.append(Row.of(f"bytes on the wire per acceptance, {count} nodes", [total / more / 1000], "kB", detail=detail))
    assert coordinator.alive()
    return rows


def _accepted(place: World) -> int:
    return sum(accepted(place.run.folder, shard) for shard in range(len(place.run.manifest.shards)))


def _enough(place: World, at: int, began: float) -> bool:
    return time.monotonic() - began > WINDOW and _accepted(place) - at >= 5


def _payload(place: World) -> list[BlobRef]:
    """Weights and state of any accepted checkpoint: all shards have the same expert."""
    shards = range(len(place.run.manifest.shards))
    last = next(given[-1] for shard in shards if (given := acceptances(place.run.folder, shard)))
    return [last.weights, last.state]


def _printed(rows: list[Row]) -> list[Row]:
    """Print each part as soon as it is measured, because the whole takes minutes."""
    for row in rows:
        print(f"  {row.what}: {row.value:.3g} {row.unit}", file=sys.stderr, flush=True)
    return rows


async def _measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _printed(await _restarts(folder / "restarts"))
        if reason := why_not():
            print(f"no figures of partitions and bytes: {reason}", file=sys.stderr)
            async with world(folder / "swarm") as place:
                await place.coordinator()
                return [*_printed(await _takeovers(Pair(place))), *rows]
        async with network("hub", "ann", "bob") as net, world(folder / "swarm", f"{net.address('hub')}:41000") as place:
            pair = Pair(place, net)
            await pair.serve()
            rows = [*_printed(await _takeovers(pair)), *_printed(await _partitions(pair, net)), *rows]
        nodes = [f"node{number}" for number in range(max(PEERS))]
        async with (
            network("hub", *nodes) as net,
            world(folder / "bytes", f"{net.address('hub')}:41000", shards=len(nodes)) as place,
        ):
            return [*rows, *_printed(await _bytes(place, net))]


def run() -> list[Row]:
    return asyncio.run(_measure())
