"""What the shell contributes to the local status."""

from __future__ import annotations

import time
from typing import Any

from lutetia.node.runtime.shell import NodeShell


def status_fields(shell: NodeShell) -> dict[str, Any]:
    """The fields of `control.LocalStatus` that the shell knows."""
    state, work, report, probed, now = shell.state, shell.state.work, shell.trainer.report, shell.prober.result, time.time()
    counts = shell.contributions
    document: dict[str, Any] = {
        "state": state.phase, "reason": state.why, "since": state.since, "run": shell.manifest.run_id,
        "name": shell.manifest.name, "manifest_version": shell.manifest.version, "online": state.online,
        "problem": shell.problem, "slowed": shell.slowed, "copies": len(shell.replicator.replicas),
        "blobs_bytes": shell.blobs_bytes,
        "paused_until": state.pause_until or state.closed_until,
        "accepted": counts.accepted, "refused": counts.refused, "last_accepted": counts.last_accepted,
        "accepted_today": counts.today(now), "addresses": shell.network.addresses if state.online else (),
    }  # fmt: skip
    if probed:
        document |= {"device": probed.device, "precision": probed.precision_reason}
    if work:
        document |= {
            "shard": work.shard, "shard_name": shell.manifest.shards[work.shard].name, "epoch": work.epoch,
            "epochs": shell.manifest.epochs, "pending": len(work.pending), "samples": work.samples,
        }  # fmt: skip
    if work and report:
        rate = report.rate or None
        left = (shell.manifest.steps_per_epoch - report.step) * shell.manifest.optimisation.batch
        document |= {
            "step": report.step, "steps": report.steps or None, "samples": report.samples, "loss": report.loss,
            "samples_per_second": rate, "due": now + left / rate if rate else None,
        }  # fmt: skip
    return document
