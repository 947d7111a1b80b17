"""Keeps a node to the volunteer's cap on bytes: tells its devices what is allowed, and writes the counts."""

from __future__ import annotations

import asyncio
import logging
import time

from lutetia.node.machine import messages as m
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.traffic.forecast import TrafficForecast, forecast_traffic, waiting_records
from lutetia.node.traffic.meter import Traffic
from lutetia.node.traffic.policy import DeviceBytes
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.schema.manifest import Manifest, ShardSpec

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


async def keep_to_caps(node: NodeShell, traffic: Traffic) -> None:
    """Run until cancelled. The counts are written at the end, too."""
    shown = False
    told: dict[DeviceShell, tuple[float | None, bool]] = {}
    try:
        while True:
            traffic.records = waiting_records(node.manifest.timing.heartbeat)
            traffic.devices = await asyncio.to_thread(lambda: [device_bytes(each) for each in tuple(node.devices.values())])
            forecast = expected_traffic(node)
            if forecast and not shown:
                shown = True
                log.info("%s", "; ".join(forecast.lines()))
            if traffic.capped:
                _tell(node, traffic, told)
            await asyncio.to_thread(traffic.save)
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        traffic.save(now=True)


def _tell(node: NodeShell, traffic: Traffic, told: dict[DeviceShell, tuple[float | None, bool]]) -> None:
    """Tell each device what has changed for it."""
    until, left = traffic.spent_until, traffic.left.bytes
    for device, needs in zip(tuple(node.devices.values()), traffic.devices, strict=False):
        pending = len(device.state.work.pending) if device.state.work else 0
        allowed = until, left >= pending * needs.result
        if told.get(device, (None, True)) != allowed:
            told[device] = allowed
            device.feed(m.BytesAllowed(time.time(), until, traffic.why or "", allowed[1]))


def device_bytes(shell: DeviceShell) -> DeviceBytes:
    """What training on the device still takes; nothing is known of it before its probe. Blocks on the disk."""
    state, manifest = shell.state, shell.manifest
    fits = {shard: fit for shard, fit in shell.prober.result.shards.items() if fit.fitness > 0} if shell.prober.result else {}
    if not fits or shell.prober.result is None:
        return DeviceBytes(0)
    work = state.work
    if work is None:
        result = max(fit.result_bytes for fit in fits.values())
        return DeviceBytes(result, data=max(epoch_data(manifest, shard) for shard in fits), parent=result)
    shard, lane = shard_and_lane(work.shard)
    result = fits[shard].result_bytes if shard in fits else 0
    rate = shell.trainer.report.rate if shell.trainer.report else 0.0
    return DeviceBytes(
        result, begun=len(work.pending) + (work.trainer == "on" and not work.waiting), data=_missing(shell, work.shard),
        parent=result if state.phase == "syncing" else 0,
        per_second=result * (rate or shell.prober.result.samples_per_second) / _samples(manifest, lane),
    )  # fmt: skip


def _samples(manifest: Manifest, lane: int) -> int:
    """Samples of one result."""
    return manifest.lane_steps(lane) * manifest.optimisation.batch


def epoch_data(manifest: Manifest, shard: int) -> int:
    """Bytes of the data that one epoch of a shard takes at most."""
    spec = manifest.shards[shard]
    return spec.train.size if spec.data_bytes is None else int(spec.size * share_of_epoch(manifest, spec))


def share_of_epoch(manifest: Manifest, spec: ShardSpec) -> float:
    """The share of a shard's clips that an epoch trains at most."""
    return min(1.0, manifest.checkpoint_samples / spec.clips)


def _missing(shell: DeviceShell, slot: int) -> int:
    """Bytes of the data of an epoch that are not here. Blocks on the disk."""
    shard, _ = shard_and_lane(slot)
    workspace, spec = shell.workspace, shell.manifest.shards[shard]
    if spec.data_bytes is None:
        return 0 if workspace.store.has(spec.train.digest) else spec.train.size
    if not workspace.store.has(spec.train.digest):
        return epoch_data(shell.manifest, shard)
    missing = sum(ref.size for ref in workspace.parts(slot) if not workspace.store.has(ref.digest))
    return min(missing, epoch_data(shell.manifest, shard))


def expected_traffic(node: NodeShell) -> TrafficForecast | None:
    """What the node takes an hour, from what its devices' probes measured; None before the first has ended."""
    manifest, settings = node.manifest, node.settings
    probed = [result for device in tuple(node.devices.values()) if (result := device.prober.result)]
    fits = [(shard, fit.result_bytes) for result in probed for shard, fit in result.shards.items() if fit.fitness > 0]
    if not fits:
        return None
    shard, result = max(fits, key=lambda fit: fit[1])
    return forecast_traffic(
        result=result, data=manifest.shards[shard].size, rate=settings.duty * sum(each.samples_per_second for each in probed),
        samples=manifest.checkpoint_samples, heartbeat=manifest.timing.heartbeat, copies=settings.copies, audits=settings.audits,
    )  # fmt: skip
