"""What a swarm costs by its size: simulated up to some ten thousand peers, by a stated model up to 10^5, drawn log-log.

Every size runs the calm swarm (epochs of 300 s, heartbeat 20 s) for 180 virtual seconds; figures are of the last 120, when every
shard has its owner. The model beyond has three terms per peer and second: a node record per heartbeat; for a standby one look
at every shard per `LOOK_PERIOD` (the time until a claim that was seen runs out, as measured); for an owner a claim per
heartbeat. Each lookup asks log2(peers / 20) peers on its way and then each replica.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lutetia.simulation.agenda import START
from lutetia.simulation.costs import QUESTION_BYTES, lookup_hops, record_bytes
from lutetia.simulation.setting import Setting
from lutetia.simulation.world import World

from .report import Machine

_SETTLED, _END = 60.0, 180.0
_SETTING = Setting(epochs=100_000, epoch_seconds=300.0)
LOOK_PERIOD = 43.0
"""Seconds between two looks of a standby at one shard: claims live 60 s, are renewed every 20 s, and looks are gathered."""
_FIXED, _SHARE = 16, 10
_MOST_SHARDS = 4096  # as many as a manifest may name
_MODELLED = (10_000, 30_000, 100_000)
_ANSWERS = 500.0
"""Requests per second that one peer is assumed to bear beside its training (p2pd and Python, a tenth of a core)."""


@dataclass(frozen=True)
class Size:
    """Figures of one size; rates per second, memory in bytes. `settled`: seconds until every shard has exactly one owner."""

    peers: int
    shards: int
    settled: float
    messages: float
    bytes: float
    keys: int
    stimuli: float
    memory: float
    wall: float
    simulated: bool = True


def study(most: int, out: Path) -> None:
    """Measure what `simulation-costs.json` in `out` lacks, then write the table and the picture. A study that was cut goes on."""
    notes = Notes(out / "simulation-costs.json")
    sizes = [size for size in (10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if size <= most]
    series: dict[str, list[Size]] = {f"{_FIXED} shards": [], f"one shard per {_SHARE} peers": []}
    for peers in sizes:
        series[f"{_FIXED} shards"].append(notes.size(peers, _FIXED))
        if peers <= 1000:
            series[f"one shard per {_SHARE} peers"].append(notes.size(peers, max(1, peers // _SHARE)))
    accepted = {peers: notes.checkpoint(peers) for peers in sizes if peers <= 1000}
    modelled = sorted({*sizes, *_MODELLED})
    model = {
        name: [_model(peers, _FIXED if name[0] != "o" else min(_MOST_SHARDS, peers // _SHARE)) for peers in modelled]
        for name in series
    }
    (out / "simulation-costs.md").write_text(_report(series, model, accepted))
    _draw(series, model, out / "simulation-costs.png")


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
    world = World(replace(_SETTING, shards=shards), peers, 7, strict=False)
    for peer in world.volunteers:
        world.agenda.after(peer.index / peers, peer.start)
    settled = math.inf
    while world.now < _SETTLED:
        world.agenda.run(START + world.now + 1.0)
        if settled == math.inf and _one_owner_each(world):
            settled = world.now
    before = sum(world.costs.messages.values()), sum(world.costs.bytes.values()), world.costs.judged
    world.agenda.run(START + _END)
    seconds = _END - _SETTLED
    after = sum(world.costs.messages.values()), sum(world.costs.bytes.values()), world.costs.judged
    messages, size, stimuli = ((late - early) / seconds for early, late in zip(before, after, strict=True))
    keys = len({key for peer in world.volunteers for key in peer.parts}) + 16
    if settled == math.inf and _one_owner_each(world):
        settled = _END
    wall = (time.process_time() - began) * 3600 / _END
    found = Size(peers, shards, settled, messages / peers, size / peers, keys, stimuli, max(0.0, _memory() - memory), wall)
    print(f"{peers} peers, {shards} shards: {found}", flush=True)
    return found


def _one_owner_each(world: World) -> bool:
    owners = world.owners()
    at_work = min(world.setting.shards, len(world.volunteers))
    return len(owners) == at_work and all(len(held) == 1 for held in owners.values())


def _memory() -> float:
    """Bytes that this process holds; what an earlier size left behind is in it, and taken off by the caller."""
    import gc

    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss)


def _checkpoint_bytes(peers: int) -> tuple[float, float, int]:
    """(bytes of talk, bytes of blobs) per accepted checkpoint, and how many there were: ten minutes with epochs of a minute."""
    world = World(replace(_SETTING, shards=_FIXED, epoch_seconds=60.0), peers, 7, strict=False)
    for peer in world.volunteers:
        world.agenda.after(10 * peer.index / peers, peer.start)
    world.agenda.run(START + 600.0)
    blobs = world.costs.bytes["blob"]
    return (sum(world.costs.bytes.values()) - blobs) / world.accepted, blobs / world.accepted, world.accepted


def _model(peers: int, shards: int) -> Size:
    """The same figures by the formula."""
    shards = max(1, shards)
    setting, sizes, hops = _SETTING, record_bytes(), lookup_hops(peers)
    replicas, owners = min(setting.replicas, peers), min(shards, peers)
    standby = 1 - owners / peers
    steps = hops + replicas
    looks = standby * shards / LOOK_PERIOD + (owners / peers) / setting.heartbeat
    beats = (1 + owners / peers) / setting.heartbeat
    messages = 4 * steps * looks + 2 * steps * beats
    look_bytes = 2 * (2 * hops + replicas) * QUESTION_BYTES + replicas * (sizes["claim"] + sizes["acceptance"])
    beat_bytes = 2 * hops * QUESTION_BYTES + replicas * (sizes["node"] + QUESTION_BYTES)
    size = looks * look_bytes + beats * beat_bytes
    stimuli = 1.0 + shards / (setting.heartbeat / 4) + 3 * owners / setting.epoch_seconds
    return Size(peers, shards, math.nan, messages, size, 3 * shards + 16, stimuli, math.nan, math.nan, simulated=False)


def _report(series: dict[str, list[Size]], model: dict[str, list[Size]], accepted: dict[int, tuple[float, float, int]]) -> str:
    lines = [
        "# What a swarm costs by its size", "",
        f"`python -m benchmarks simulate costs` on {Machine.this()}; simulated with seed 7.", "",
        "![messages and bytes per peer, coordinator stimuli, memory and time by peers](simulation-costs.png)", "",
        "| peers | shards | one owner per shard after | messages/s per peer | bytes/s per peer | DHT keys "
        "| coordinator stimuli/s | memory MiB | CPU s per virtual hour |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for sizes in (*series.values(), *([size for size in sizes if size.peers >= 10_000] for sizes in model.values())):
        for s in sizes:
            settled = f"{s.settled:.0f} s" if s.simulated else "model"
            tail = f"{s.memory / 2**20:.0f} | {s.wall:.0f}" if s.simulated else "- | -"
            rates = f"{s.messages:.1f} | {s.bytes:.0f} | {s.keys} | {s.stimuli:.1f}"
            lines.append(f"| {s.peers} | {s.shards} | {settled} | {rates} | {tail} |")
    setting = _SETTING
    parcel = (setting.weights_bytes + setting.state_bytes) / 2**20
    lines += [
        "", "## Bytes sent per accepted checkpoint", "",
        f"{_FIXED} shards, epochs of 60 s, ten minutes, joining included; a checkpoint has {parcel:.0f} MiB, a shard's data "
        f"{setting.shard_bytes / 2**20:.0f} MiB.", "",
        "| peers | accepted | blobs, MiB per accepted | records and lookups, KiB per accepted |", "|---|---|---|---|",
    ]  # fmt: skip
    for peers, (talk, blobs, count) in accepted.items():
        lines.append(f"| {peers} | {count} | {blobs / 2**20:.1f} | {talk / 2**10:.0f} |")
    lines += ["", "Each checkpoint travels once to the coordinator. What standbys look up beside it grows with their number."]
    return "\n".join([*lines, "", *_verdict(model), ""])


def _verdict(model: dict[str, list[Size]]) -> list[str]:
    """What breaks first, from the model alone."""
    shared = next(sizes for name, sizes in model.items() if name.startswith("one"))
    first = next((s for s in shared if s.messages > _ANSWERS), None)
    where = f"about {first.shards} shards ({first.peers} peers at one per {_SHARE})" if first else "no size that was looked at"
    largest = shared[-1]
    text = (
        f"Every standby looks at each shard once per {LOOK_PERIOD:.0f} s, so its cost grows with the shards, not the peers. "
        f"At {_ANSWERS:.0f} messages/s per peer, assumed to be what a box bears beside its training, that ends at {where}; "
        f"with {largest.shards} shards a standby would send {largest.messages:.0f} messages/s. Nothing else comes near: an "
        "owner's cost does not depend on the size but for the logarithm of a lookup, and the coordinator takes in "
        f"{largest.stimuli:.0f} stimuli/s there, nearly all of them records that it reads again and knows.",
        "Remedy, not built: the coordinator reads all claims anyway; one signed record of which shards are free (4,096 bits "
        "under one key, living a heartbeat) makes a standby's cost one lookup per heartbeat, whatever the number of shards. "
        "Before it claims, a standby looks at that one shard itself, as it does now, so nobody need trust the record; while "
        "the coordinator is away, standbys look at a few shards each, chosen by rendezvous hash. The coordinator's polls "
        "shrink by the same means: records that it has judged need not be judged again at every look.",
        "No checkpoint is filed within the simulated window, so keys and coordinator stimuli lie below the model there, which "
        "counts one checkpoint record per shard, re-read at every poll.",
        "Memory and time are those of the simulation, all peers in one process, not of a real box; the time includes setting up.",
    )
    return ["## What breaks first, and the remedy", *(line for paragraph in text for line in ("", paragraph))]


def _draw(series: dict[str, list[Size]], model: dict[str, list[Size]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    panels: tuple[tuple[str, str], ...] = (
        ("messages", "messages/s per peer"), ("bytes", "bytes/s per peer"), ("stimuli", "coordinator stimuli/s"),
        ("keys", "DHT keys"), ("memory", "memory of the simulation (bytes)"), ("wall", "CPU seconds per virtual hour"),
    )  # fmt: skip
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        for number, label in enumerate(series):
            _line(axis, series[label], name, f"C{number}o-", label)
            _line(axis, model[label], name, f"C{number}:", f"{label}, model")
        axis.set(xscale="log", yscale="log", xlabel="peers", title=title)
        axis.grid(visible=True, which="both", alpha=0.25)
    axes.flat[0].axhline(_ANSWERS, color="black", linewidth=0.8)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _line(axis: Any, sizes: Sequence[Size], name: str, style: str, label: str) -> None:
    points = [(size.peers, getattr(size, name)) for size in sizes if getattr(size, name) > 0]
    if points:
        axis.plot([peers for peers, _ in points], [value for _, value in points], style, label=label, markersize=4)
