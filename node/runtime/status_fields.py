"""What the shells contribute to the local status."""

from __future__ import annotations

import time
from typing import Any

from lutetia.node.local_status import DeviceStatus, TrafficStatus
from lutetia.node.machine.state import BUSIEST
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.traffic import expected_traffic
from lutetia.protocol.claims import shard_and_lane


def device_status(shell: DeviceShell) -> DeviceStatus:
    """What the device does."""
    state, work, report, probed, now = shell.state, shell.state.work, shell.trainer.report, shell.prober.result, time.time()
    capped = state.bytes_until if state.phase == "paused" else None
    fields: dict[str, Any] = {
        "device": shell.name if probed or shell.named else None, "state": state.phase, "reason": state.why, "since": state.since,
        "problem": shell.problem, "paused_until": state.pause_until or state.closed_until or capped,
        "precision": probed.precision_reason if probed else None, "celsius": shell.celsius, "slowed": shell.slowed,
        "left_out": state.left_out or None,
    }  # fmt: skip
    if work:
        shard, lane = shard_and_lane(work.shard)
        fields |= {
            "shard": shard, "lane": lane if shell.manifest.team else None, "shard_name": shell.manifest.shards[shard].name,
            "epoch": work.epoch, "epochs": shell.manifest.epochs, "pending": len(work.pending), "samples": work.samples,
        }  # fmt: skip
    if work and report:
        rate = report.rate or None
        left = (shell.manifest.lane_steps(shard_and_lane(work.shard)[1]) - report.step) * shell.manifest.optimisation.batch
        fields |= {
            "step": report.step, "steps": report.steps or None, "samples": report.samples, "loss": report.loss,
            "samples_per_second": rate, "due": now + left / rate if rate else None,
        }  # fmt: skip
    if waits := shell.trainer.waits:
        fields |= {"waits_for_part": waits.part, "waits_since": waits.since}
    return DeviceStatus(**fields)


def summed_up(devices: tuple[DeviceStatus, ...], since: float) -> dict[str, Any]:
    """The node's own fields: those of the first of its busiest devices, and the sums. `since`: of a node that has none yet."""
    if not devices:
        return {"state": "probing", "reason": "looking for cards that torch can use", "since": since}
    first = min(devices, key=lambda each: BUSIEST.index(each.state))
    fields = dict(first)
    if len(devices) > 1:
        rates = [each.samples_per_second for each in devices if each.samples_per_second]
        fields |= {
            "device": ", ".join(each.device or "?" for each in devices), "pending": sum(each.pending for each in devices),
            "samples_per_second": sum(rates) if rates else None,
            "problem": next((each.problem for each in devices if each.problem), None),
            "slowed": next((f"{each.device}: {each.slowed}" for each in devices if each.slowed), None),
            "celsius": max((each.celsius for each in devices if each.celsius is not None), default=None),
        }  # fmt: skip
    return fields


def traffic_status(shell: NodeShell) -> TrafficStatus | None:
    """What the node sent and received, and what its caps hold back."""
    traffic = shell.network.traffic
    if traffic is None:
        return None
    counts, caps, expected = traffic.counts, traffic.caps, expected_traffic(shell)
    others = "copies, audits and checks wait, and other peers fetch nothing here: training needs what is left"
    return TrafficStatus(
        sent_today=counts.sent, received_today=counts.received, this_month=counts.month,
        bytes_per_day=caps.day, bytes_per_month=caps.month,
        held_back=traffic.why or (others if traffic.spare <= 0 else None),
        expected="; ".join(expected.lines()) if expected else None,
    )  # fmt: skip


def status_fields(shell: NodeShell, since: float) -> dict[str, Any]:
    """The fields of `LocalStatus` that the shells know. `since`: when the daemon started, in Unix seconds."""
    counts, now = shell.contributions, time.time()
    devices = tuple(device_status(device) for device in shell.devices.values())
    online = any(device.state.online for device in shell.devices.values())
    own = summed_up(devices, since)
    return {
        **own, "devices": devices, "run": shell.manifest.run_id, "name": shell.manifest.name,
        "manifest_version": shell.manifest.version, "online": online, "problem": shell.offline or own.get("problem"),
        "traffic": traffic_status(shell),
        "copies": len(shell.replicator.replicas), "blobs_bytes": shell.blobs_bytes,
        "accepted": counts.accepted, "refused": counts.refused, "last_accepted": counts.last_accepted,
        "accepted_today": counts.today(now),
        "audits_today": counts.today(now, "audits"), "checks_today": counts.today(now, "checks"),
        "addresses": shell.network.addresses if online else (),
    }  # fmt: skip
