"""What checks that are lent to nodes count for, by the rule of docs/explanation/credit.md. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lutetia.coordinator.ledger.events import LentCheckCounted
from lutetia.coordinator.lending.agreement import Settled
from lutetia.protocol.rpc.check_request import CheckJob, CheckReport

PASSES_OF_A_SAMPLE = 3
"""Training on a sample costs about three times as much as scoring it: a forward pass, and a backward one of twice its cost
(Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1)."""


def samples_of(kind: str, report: CheckReport, batch: int) -> int:
    """The samples of training that a check was worth.

    A replay trains on a batch in each step, and a result's check scores rows. Other kinds are of all shards or of the router, and
    their cost is not in samples of one shard: they count nothing.
    """
    if kind == "replay":
        return len(report.losses) * batch
    rows = len(report.parent) + len(report.averages) + len(report.raw)
    return rows // PASSES_OF_A_SAMPLE if kind == "result" else 0


def counted(
    job: CheckJob, reports: Sequence[CheckReport], known: Collection[str], settled: Settled, batch: int, now: float
) -> LentCheckCounted | None:
    """The event that credits those whose reports agree with the one that counts; None: the check counts for nobody.

    Args:
        job: the check.
        reports: all of it that were taken.
        known: the peers whose own work was accepted, or whom the owner has named. Two new identities could confirm to each
            other what neither has computed, so others get nothing.
        settled: its outcome. What it says of rows and steps counts, however many more a report claims.
        batch: samples of one step.
        now: Unix seconds.
    """
    if settled.report is None or not (samples := samples_of(job.kind, settled.report, batch)):
        return None
    owners = tuple(report.owner for report in reports if report.owner in known and report.owner not in settled.liars)
    if not owners:
        return None
    return LentCheckCounted(time=now, shard=job.shard, epoch=job.epoch, check=job.kind, samples=samples, owners=owners)
