"""Whether a report answers its check at all. Pure."""

from __future__ import annotations

from lutetia.protocol.rpc.check_request import MOST_ROWS, CheckJob, CheckReport


def well_formed(job: CheckJob, report: CheckReport, fewest: int) -> str:
    """Empty, or why the report counts as one that failed: it says nothing of what was asked.

    Args:
        job: what was lent.
        report: what came back.
        fewest: rows that each part of a result must have been scored on.
    """
    if report.outcome == "failed":
        return ""
    if report.outcome == "refused":
        return "" if job.result and report.check else "it refuses without naming a check"
    if job.result:
        parts = {"parent": report.parent, "averages": report.averages, "raw": report.raw}
        wrong = [name for name, rows in parts.items() if not fewest <= len(rows) <= job.result.rows]
        return f"it has {len(parts[wrong[0]])} losses of the {wrong[0]}" if wrong else ""
    if job.replay:
        audit = job.replay.audit
        if report.made is None or not 1 <= len(report.losses) <= audit.steps:
            return f"it has {len(report.losses)} losses of {audit.steps} steps"
        diverged = report.losses[-1] is None
        if (len(report.losses) < audit.steps or (audit.end_state and report.drift is None)) and not diverged:
            return "it ends before the last step, or does not compare the ends"
        return ""
    if job.gallery:
        return "" if report.pictures else "it names no pictures"
    if job.mixture:
        counts = len(report.averages), len(report.parent)
        if report.mode is None or report.temperature is None or not fewest <= counts[0] <= MOST_ROWS:
            return f"it has {counts[0]} losses of the new mixture, or does not say how it routes"
        wanted = counts[0] if job.mixture.current else 0
        return "" if counts[1] == wanted else f"it has {counts[1]} losses of the current mixture instead of {wanted}"
    if report.router is None or report.accuracy is None or (job.router and report.router != job.router):
        return "it does not say how good which router is"
    return ""
