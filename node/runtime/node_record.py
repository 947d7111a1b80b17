"""The one record of a node, made of what its devices do. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from lutetia.node.machine.state import BUSIEST
from lutetia.node.trainer.probe import ProbeResult
from lutetia.protocol.schema.records import MOST_DEVICES, DeviceEntry, Hardware, NodeState

_AGAIN = 0.9
"""Part of a heartbeat after which the record is published again, whichever device asks for it."""


class DeviceFacts(NamedTuple):
    """What a device contributes to the record. `rate` in samples per second; 0: it reports none now."""

    name: str
    phase: NodeState
    probed: ProbeResult | None
    rate: float
    shard: int | None


class NodeSummary(NamedTuple):
    """What the node record says; see NodeRecord."""

    state: NodeState
    hardware: Hardware
    samples_per_second: float
    shard: int | None
    devices: tuple[DeviceEntry, ...]


def summary_of(devices: Sequence[DeviceFacts]) -> NodeSummary:
    """What a node with these devices says of itself. One device is said to be the node; several are listed besides."""
    said = [_announced(device) for device in devices]
    if len(said) < 2:
        return said[0] if said else NodeSummary("joining", _unprobed(), 0.0, None, ())
    best = min(said, key=lambda one: BUSIEST.index(one.state))
    shards = [device.shard for device in devices if device.shard is not None]
    entries = tuple(
        DeviceEntry(device=device.name, state=one.state, shard=one.shard, samples_per_second=one.samples_per_second)
        for device, one in zip(devices, said, strict=True)
    )
    return NodeSummary(
        best.state, best.hardware, sum(one.samples_per_second for one in said), min(shards, default=None), entries[:MOST_DEVICES]
    )


def _announced(device: DeviceFacts) -> NodeSummary:
    """Until the first probe ends, which may take minutes, a device is announced as joining: nobody counts on it yet."""
    if device.probed:
        rate = device.rate or device.probed.samples_per_second
        return NodeSummary(device.phase, device.probed.hardware, rate, device.shard, ())
    return NodeSummary("left" if device.phase == "left" else "joining", _unprobed(), 0.0, device.shard, ())


def _unprobed() -> Hardware:
    return Hardware(device="not probed", memory_bytes=psutil.virtual_memory().total, cores=os.cpu_count() or 1)


def summary_due(published: tuple[NodeSummary, float] | None, summary: NodeSummary, now: float, heartbeat: float) -> bool:
    """Whether to publish the record again: something else than the speed has changed, or a heartbeat is nearly over.

    Each device asks for it with its own heartbeat.

    Args:
        published: what was published last, and when in seconds.
        summary: what the node says of itself now.
        now: seconds, of the same clock.
        heartbeat: seconds.
    """
    if published is None or now - published[1] >= _AGAIN * heartbeat or len(summary.devices) < 2:
        return True
    return _without_speed(published[0]) != _without_speed(summary)


def _without_speed(summary: NodeSummary) -> tuple[object, ...]:
    return summary.state, summary.shard, [(one.device, one.state, one.shard) for one in summary.devices]
