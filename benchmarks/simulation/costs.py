"""The cost of a swarm by its size: simulated up to some ten thousand peers, by a stated model up to 10^5, drawn log-log.

Every size runs the calm swarm (epochs of 300 s, heartbeat 20 s) for 180 virtual seconds; figures are of the last 120, when every
shard has its holder. The model beyond has four terms per peer and second: a node record per heartbeat; the list of node records
around it, twice per lease or less often (`node.services.standby_policy`); its part of the looks at each shard, whose number
per shard was measured; for a holder a claim per heartbeat. Each lookup asks log2(peers / 20) peers on its way and then each
replica.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import Machine
from lutetia.coordinator.runtime.swarm_monitor import look_pause, nodes_pause
from lutetia.node.services.standby_policy import CHANGING, FULL_PACE, STEADY, WAVES, read_pause
from lutetia.protocol.schema.records import NODE_BUCKETS
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.costs import QUESTION_BYTES, lookup_hops, record_bytes
from lutetia.simulation.event_queue import START
from lutetia.simulation.world import SimulatedWorld

_SETTLED, _END = 60.0, 180.0
_SETTING = SimulationConfig(epochs=100_000, epoch_seconds=300.0)
_LOOK_PERIOD = 43.0
"""Seconds between two looks of a standby at a shard that it watches: claims live 60 s, and are renewed every 20 s."""
_FIXED, _SHARE = 16, 10
_MOST_SHARDS = 4096  # as many as a manifest may name
_MODELLED = (10_000, 30_000, 100_000)
_ANSWERS = 500.0
"""Requests per second that one peer is assumed to bear beside its training (p2pd and Python, a tenth of a core)."""
_LONGEST_ANSWER = 4 * 2**20
"""Bytes of one answer of the DHT: hivemind's longest message."""


@dataclass(frozen=True)
class Size:
    """Figures of one size; rates per second, memory in bytes. `settled`: seconds until every shard has exactly one holder.

    `messages` and `bytes` are those of one peer, `looks` those at one shard, `watch` the bytes that the coordinator reads.
    """

    peers: int
    shards: int
    settled: float
    messages: float
    bytes: float
    looks: float
    watch: float
    stimuli: float
    memory: float
    wall: float
    simulated: bool = True


def study(most: int, out: Path) -> None:
    """Measure what `simulation-costs.json` in `out` lacks, then write table and picture. An interrupted study continues."""
    notes = Notes(out / "simulation-costs.json")
    sizes = [size for size in (10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if size <= most]
    series: dict[str, list[Size]] = {f"{_FIXED} shards": [], f"one shard per {_SHARE} peers": []}
    for peers in sizes:
        series[f"{_FIXED} shards"].append(notes.size(peers, _FIXED))
        if peers <= 3000:
            series[f"one shard per {_SHARE} peers"].append(notes.size(peers, max(1, peers // _SHARE)))
    accepted = {peers: notes.checkpoint(peers) for peers in sizes if peers <= 300}
    modelled = sorted({*sizes, *_MODELLED})
    looks = series[f"{_FIXED} shards"][-1].looks
    shards = {name: [_FIXED if name[0] != "o" else min(_MOST_SHARDS, peers // _SHARE) for peers in modelled] for name in series}
    model = {name: [_model(*size, looks) for size in zip(modelled, shards[name], strict=True)] for name in series}
    before = {name: [_model(*size, None) for size in zip(modelled, shards[name], strict=True)] for name in series}
    (out / "simulation-costs.md").write_text(_report(series, model, before, accepted))
    _draw(series, model, before, out / "simulation-costs.png")


class Notes:
    """What was measured already, on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def _note(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = measure()
            self._path.write_text(json.dumps(self._known, indent=1))
        return self._known[name]

    def size(self, peers: int, shards: int) -> Size:
        return Size(**self._note(f"{peers} peers, {shards} shards", lambda: asdict(_measure(peers, shards))))

    def checkpoint(self, peers: int) -> tuple[float, float, int]:
        talk, blobs, count = self._note(f"accepted with {peers} peers", lambda: _checkpoint_bytes(peers))
        return talk, blobs, count


def _measure(peers: int, shards: int) -> Size:
    began, memory = time.process_time(), _memory()
    world = SimulatedWorld(replace(_SETTING, shards=shards), peers, 7, strict=False)
    for peer in world.nodes:
        world.queue.after(peer.index / peers, peer.start)
    settled = math.inf
    while world.now < _SETTLED:
        world.queue.run(START + world.now + 1.0)
        if settled == math.inf and _one_holder_each(world):
            settled = world.now
    early = _counted(world)
    world.queue.run(START + _END)
    messages, size, looks, watch, stimuli = (
        (after - before) / (_END - _SETTLED) for before, after in zip(early, _counted(world), strict=True)
    )
    if settled == math.inf and _one_holder_each(world):
        settled = _END
    wall = (time.process_time() - began) * 3600 / _END
    memory = max(0.0, _memory() - memory)
    figures = Size(peers, shards, settled, messages / peers, size / peers, looks / shards, watch, stimuli, memory, wall)
    print(f"{peers} peers, {shards} shards: {figures}", flush=True)
    return figures


def _counted(world: SimulatedWorld) -> tuple[float, float, float, float, float]:
    """Messages and bytes of all peers, their looks at shards, the bytes that the coordinator read, and what it judged."""
    costs = world.costs
    messages, size = (
        sum(count for kind, count in counter.items() if kind != "watch") for counter in (costs.messages, costs.bytes)
    )
    return messages, size, costs.shards_seen, costs.bytes["watch"], costs.judged


def _one_holder_each(world: SimulatedWorld) -> bool:
    holders = world.holders()
    working = min(world.config.shards, len(world.nodes))
    return len(holders) == working and all(len(held) == 1 for held in holders.values())


def _memory() -> float:
    """Bytes that this process holds; the caller subtracts what an earlier size left."""
    import gc

    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss)


def _checkpoint_bytes(peers: int) -> tuple[float, float, int]:
    """Bytes of records and lookups, and of blobs, per accepted checkpoint; number of these. Ten minutes, epochs of a minute."""
    world = SimulatedWorld(replace(_SETTING, shards=_FIXED, epoch_seconds=60.0), peers, 7, strict=False)
    for peer in world.nodes:
        world.queue.after(10 * peer.index / peers, peer.start)
    world.queue.run(START + 600.0)
    blobs = world.costs.bytes["blob"]
    return (sum(world.costs.bytes.values()) - blobs) / world.accepted, blobs / world.accepted, world.accepted


def _model(peers: int, shards: int, looks: float | None) -> Size:
    """The same figures by formula. `looks` at each shard per second; None: every standby looks at every shard."""
    shards = max(1, shards)
    config, sizes, hops = _SETTING, record_bytes(), lookup_hops(peers)
    replicas, owners = min(config.replicas, peers), min(shards, peers)
    standbys, steps = peers - owners, hops + replicas
    if looks is None or standbys <= STEADY:
        looks = standbys / _LOOK_PERIOD + 1 / config.heartbeat
    looked = looks * shards / peers
    buckets, records = _list_read(peers, standbys)
    listed = 1 / read_pause(config.lease, records)
    beats = (1 + owners / peers) / config.heartbeat
    messages = 4 * steps * looked + 2 * steps * (beats + buckets * listed)
    look_bytes = 2 * (2 * hops + replicas) * QUESTION_BYTES + replicas * (sizes["claim"] + sizes["acceptance"])
    beat_bytes = 2 * hops * QUESTION_BYTES + replicas * (sizes["node"] + QUESTION_BYTES)
    list_bytes = 2 * buckets * steps * QUESTION_BYTES + replicas * records * sizes["node"]
    size = looked * look_bytes + beats * beat_bytes + listed * list_bytes
    pause = look_pause(config.heartbeat)
    polls, every = 1 / pause, pause + nodes_pause(peers, config.heartbeat)
    watch = polls * shards * look_bytes + replicas * peers * sizes["node"] / max(pause, every)
    stimuli = 1.0 + shards * polls + 3 * owners / config.epoch_seconds + min(5.0, standbys / config.heartbeat)
    return Size(peers, shards, math.nan, messages, size, looks, watch, stimuli, math.nan, math.nan, simulated=False)


def _list_read(peers: int, standbys: int) -> tuple[float, float]:
    """(buckets, records) of node records that a peer reads, on average: its own, and more if there are few standbys."""
    here = standbys / NODE_BUCKETS
    one = max(0.0, 1 - STEADY / here) if here else 0.0  # it is not among the first in its bucket
    buckets = one * WAVES[0] + (1 - one) * (sum(WAVES[:2]) if here * WAVES[1] >= STEADY else NODE_BUCKETS)
    return buckets, buckets * peers / NODE_BUCKETS


Sizes = dict[str, list[Size]]


def _report(series: Sizes, model: Sizes, before: Sizes, accepted: dict[int, tuple[float, float, int]]) -> str:
    lines = [
        "# What a swarm costs by its size", "",
        f"`python -m benchmarks simulate costs` on {Machine.this()}; simulated with seed 7.", "",
        "![messages and bytes per peer, looks per shard, the coordinator's reading and judging, time](simulation-costs.png)", "",
        "| peers | shards | one holder per shard after | messages/s per peer | bytes/s per peer | looks/s at one shard "
        "| coordinator reads, KiB/s | stimuli/s | memory MiB | CPU s per virtual hour |", "|" + 10 * "---|",
    ]  # fmt: skip
    for sizes in (*series.values(), *([size for size in sizes if size.peers >= 10_000] for sizes in model.values())):
        for s in sizes:
            settled = f"{s.settled:.0f} s" if s.simulated else "model"
            tail = f"{s.memory / 2**20:.0f} | {s.wall:.0f}" if s.simulated else "- | -"
            rates = f"{s.messages:.1f} | {s.bytes:.0f} | {s.looks:.2f} | {s.watch / 1024:.0f} | {s.stimuli:.1f}"
            lines.append(f"| {s.peers} | {s.shards} | {settled} | {rates} | {tail} |")
    config = _SETTING
    parcel = (config.weights_bytes + config.state_bytes) / 2**20
    lines += [
        "", "Memory and time are those of the simulation, all peers in one process, setting up included; not of a real machine.",
        "", "## Bytes sent per accepted checkpoint", "",
        f"{_FIXED} shards, epochs of 60 s, ten minutes, joining included; a checkpoint has {parcel:.0f} MiB, a shard's data "
        f"{config.shard_bytes / 2**20:.0f} MiB.", "",
        "| peers | accepted | blobs, MiB per accepted | records and lookups, KiB per accepted |", "|---|---|---|---|",
    ]  # fmt: skip
    for peers, (talk, blobs, count) in accepted.items():
        lines.append(f"| {peers} | {count} | {blobs / 2**20:.1f} | {talk / 2**10:.0f} |")
    lines += [
        "", "Each checkpoint travels once to the coordinator. While its author is new, it is audited, and the auditor fetches "
        "parent and data for that: the rest of the blobs. Every peer adds its heartbeats and its reads of node records.",
    ]  # fmt: skip
    return "\n".join([*lines, "", *_verdict(model, before), ""])


def _verdict(model: Sizes, before: Sizes) -> list[str]:
    """What broke first, what was done about it, and what breaks next, from the models alone."""
    few, shared = (next(sizes for name, sizes in model.items() if name.startswith("one") == one) for one in (False, True))
    few_before, shared_before = (
        next(sizes for name, sizes in before.items() if name.startswith("one") == one) for one in (False, True)
    )
    most = few[-1].peers
    node = record_bytes()["node"]
    limit = NODE_BUCKETS * _LONGEST_ANSWER // node
    crowd, alike, then, then_alike = few[-1], shared[-1], few_before[-1], shared_before[-1]
    text = (
        "Standbys, at first: every one looked at every shard, so each shard was looked at by all, and each peer looked at all. "
        f"By the same model, {most} peers would look {then.looks:.0f} times a second at each of {_FIXED} shards, and with "
        f"{alike.shards} shards each would send {then_alike.messages:.0f} messages/s, where {_ANSWERS:.0f} are assumed to be "
        "what a node can answer beside its training. And every peer read the node records of all others twice per lease, for the "
        f"copies that it keeps: {5 * most * node / 30 / 2**20:.1f} MiB/s each at {most} peers.",
        f"Now {STEADY} to {STEADY + CHANGING} standbys watch each shard (`node/services/standby_policy.py`), "
        "which they find from the node records"
        f" around them on a ring: {crowd.looks:.2f} looks/s at each shard whatever the number of standbys, "
        f"{alike.messages:.1f} messages/s of a peer with {alike.shards} shards, {crowd.bytes / 1024:.0f} KiB/s of it at {most} "
        f"peers. The list is read twice per lease up to {FULL_PACE} records, beyond that less often. When most standbys die at "
        "once, the others see it in the list and watch more shards: a free shard is still claimed within two leases (scenario "
        "`collapse`, and I4 in all others).",
        f"Next: the coordinator reads every node record, {crowd.watch / 2**20:.1f} MiB/s at {most} peers although it reads them "
        "six times less often then; and one bucket of node records grows to hivemind's longest message "
        f"({_LONGEST_ANSWER / 2**20:.0f} MiB) at about {limit} peers. More buckets than {NODE_BUCKETS} would solve the second, "
        "at the cost of more lookups in a small swarm.",
        "No checkpoint is filed within the simulated window, so stimuli lie below the model there, which counts one checkpoint "
        "record per shard, re-read at every poll. Standbys of a young swarm read one list before they share the shards, so the "
        "first half minute costs what it did before.",
    )
    return ["## What breaks first, and the remedy", *(line for paragraph in text for line in ("", paragraph))]


def _draw(series: Sizes, model: Sizes, before: Sizes, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    panels: tuple[tuple[str, str], ...] = (
        ("looks", "looks/s at one shard"), ("messages", "messages/s per peer"), ("bytes", "bytes/s per peer"),
        ("watch", "bytes/s that the coordinator reads"), ("stimuli", "coordinator stimuli/s"),
        ("wall", "CPU seconds per virtual hour"),
    )  # fmt: skip
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        for number, label in enumerate(series):
            _line(axis, series[label], name, f"C{number}o-", label)
            _line(axis, model[label], name, f"C{number}:", f"{label}, model")
            if name in ("looks", "messages"):
                _line(axis, before[label], name, f"C{number}--", f"{label}, every standby looking at all (model)")
        axis.set(xscale="log", yscale="log", xlabel="peers", title=title)
        axis.grid(visible=True, which="both", alpha=0.25)
    axes.flat[1].axhline(_ANSWERS, color="black", linewidth=0.8)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _line(axis: Any, sizes: Sequence[Size], name: str, style: str, label: str) -> None:
    points = [(size.peers, getattr(size, name)) for size in sizes if getattr(size, name) > 0]
    if points:
        axis.plot([peers for peers, _ in points], [value for _, value in points], style, label=label, markersize=4)
