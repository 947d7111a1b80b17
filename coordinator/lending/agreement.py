"""When two reports on one check say the same, and who lied where they do not. Pure.

Two nodes of unlike operators carry a check out. Where their reports differ a third is asked, and so on up to MOST_REPORTS: two
that agree decide, and those that contradict them are not asked again. Nobody is quarantined for a report: the word of two peers
against a third is no proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lutetia.coordinator.acceptance.audit_comparison import compare, tolerance
from lutetia.coordinator.acceptance.loss_bounds import in_common
from lutetia.protocol.rpc.check_request import CheckReport

NEEDED = 2
MOST_REPORTS = 5
"""After so many reports of which no two agree a check is given up as inconclusive."""
ROWS_APART = 5e-3
"""Relative difference up to which two losses of one row are the same. Processors agree to 1e-6 in float32; accelerators that
multiply with ten bits of mantissa differ by up to 1e-3 (assumed). A liar gains less than it: a quarter of the usual tolerance."""
ROUTERS_APART = 0.02
"""Difference up to which two accuracies of one router on the same clips are the same."""
_SMALLEST = 1e-6


@dataclass(frozen=True, slots=True)
class Settled:
    """The report that counts, and the owners whose reports contradict it. `report` None: no two agree, and no more are asked."""

    report: CheckReport | None
    liars: frozenset[str] = frozenset()


def settle(reports: Sequence[CheckReport], fewest: int = 1, known: frozenset[str] = frozenset()) -> Settled | None:
    """The outcome, or None while another report is needed.

    A new identity costs nothing, so newcomers alone outvote nobody whose work was accepted: while such a peer is among those that
    report, only a pair with one of them decides.

    Args:
        reports: one per operator, oldest first; none that failed.
        fewest: rows that each part of a result must have been scored on.
        known: the owners whose own work was accepted.
    """
    best: list[CheckReport] = []
    for report in reports:
        group = [other for other in reports if agree(report, other, fewest)]
        if (_has_known(group, known), len(group)) > (_has_known(best, known), len(best)):
            best = group
    if len(best) >= NEEDED and (_has_known(best, known) or not _has_known(reports, known)):
        return Settled(_as_far_as_all(best), frozenset(report.owner for report in reports if report not in best))
    return Settled(None) if len(reports) >= MOST_REPORTS else None


def _has_known(reports: Sequence[CheckReport], known: frozenset[str]) -> bool:
    return any(report.owner in known for report in reports)


def _as_far_as_all(reports: Sequence[CheckReport]) -> CheckReport:
    """The first report, its rows as far as every one of `reports` goes: nobody has confirmed later ones."""
    fields = ("parent", "averages", "raw")
    rows = {name: min((getattr(report, name) for report in reports), key=len) for name in fields}
    return reports[0].model_copy(update={name: getattr(reports[0], name)[: len(few)] for name, few in rows.items()})


def agree(one: CheckReport, other: CheckReport, fewest: int = 1) -> bool:
    """Whether two reports on one check say the same."""
    if one.outcome != other.outcome:
        return False
    if one.outcome == "refused":
        return one.check == other.check
    if one.made and other.made:
        return _replays_agree(one, other)
    if one.accuracy is not None and other.accuracy is not None:
        return one.router == other.router and abs(one.accuracy - other.accuracy) <= ROUTERS_APART
    if (one.mode, one.temperature) != (other.mode, other.temperature):
        return False
    pairs = [(one.parent, other.parent), (one.averages, other.averages), (one.raw, other.raw)]
    if one.mode:  # of a mixture: the first one is compared with none
        pairs = [pair for pair in pairs[:2] if any(pair)]
    return all(_rows_agree(numbers(ours), numbers(theirs), fewest) for ours, theirs in pairs)


def numbers(rows: Sequence[float | None]) -> list[float]:
    """Losses as they were computed: null is not a number."""
    return [math.nan if row is None else row for row in rows]


def _rows_agree(ours: Sequence[float], theirs: Sequence[float], fewest: int) -> bool:
    """On the rows that both have scored."""
    ours, theirs = in_common(ours, theirs)
    return len(ours) >= fewest and all(map(_same, ours, theirs))


def _same(one: float, other: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= ROWS_APART * max(abs(one), abs(other)) + _SMALLEST


def _replays_agree(one: CheckReport, other: CheckReport) -> bool:
    """The losses as those of two honest nodes, and the distances of their ends on one side of what is invalid."""
    assert one.made
    assert other.made
    finite = [all(map(math.isfinite, numbers(report.losses))) for report in (one, other)]
    if len(one.losses) != len(other.losses) or finite[0] != finite[1]:
        return False
    if compare(numbers(one.losses), numbers(other.losses), None, one.made, other.made).outcome == "invalid":
        return False
    if (one.drift is None) != (other.drift is None):
        return False
    bounds = tolerance(one.made, other.made).drift
    return one.drift is None or other.drift is None or _side(one.drift, bounds) == _side(other.drift, bounds)


def _side(drift: float, bounds: tuple[float, float]) -> bool:
    """Whether an end is nearer to being trained as claimed than to not being so."""
    near, far = bounds
    return drift > math.sqrt(near * far)
