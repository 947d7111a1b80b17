"""Results that wait because an epoch below them is an unproved newcomer's, or because they are one's where others cheated. Pure.

A newcomer's first epochs are replayed whole, and its conviction voids what others have built on them. So at most BUILT_AT_ONCE
epochs of other authors are accepted on such an epoch at once. The next result passes its checks and is then held until the
replay ends, at most for one tenure; the one after it for two, then four, then LONGEST_HOLD. So a shard never stands still, and
what a conviction costs others grows with the logarithm of the time that the replay takes, at first. The same holds on an epoch
that an audit found invalid, until it is decided whether the epochs after it are kept.

A copy of the accepted epoch under a new key costs nothing, passes the checks, and is there before any honest work. It is
convicted later, and what was built on it is void; with ever new keys nothing else would ever stand. So where authors were
convicted lately, a result of an author of whom no whole epoch was found valid is held as well, for one tenure, two, four … up to
LONGEST_PROBATION: long enough for another author to train the epoch, whose result is accepted at once.

In a run with lanes nearly every epoch has a newcomer's share in it, so nothing is held for an epoch below. What is held for
convictions misses its merge, and delays nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lutetia.coordinator.ledger.run_state import PendingAudit, RunState, WaitingResult
from lutetia.protocol.schema.manifest import Manifest

NEWCOMER_EPOCHS = 2
"""So many epochs of each author are replayed whole, whatever the lottery says."""
BUILT_AT_ONCE = 2
"""So many epochs of other authors are accepted on an unproved one without waiting."""
LONGEST_HOLD = 8
"""A result is held for so many tenures at most."""
LONGEST_PROBATION = 24
"""The result of an author without a proved epoch is held for so many tenures at most. An epoch may last as long."""
PROBATION_TENURES = 144
"""Convictions of the last so many tenures count; a day by default."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a result waits: the unproved epoch below it, its author, and the epochs of others that stand on it already.

    For `convictions`: the result's own epoch and author, and how many authors were convicted. `until`: Unix seconds at which the
    result is accepted all the same.
    """

    epoch: int
    author: str
    built: int
    until: float
    why: Literal["newcomer", "suspected", "convictions"]


def hold(run: RunState, manifest: Manifest, waiting: WaitingResult, newcomer_epochs: int = NEWCOMER_EPOCHS) -> Hold | None:
    """What holds an undecided result that has passed its checks, the longest hold first; None: it may be accepted.

    An author is unproved as long as replays found fewer than `newcomer_epochs` of its whole epochs valid, since its last
    conviction or doubt.
    """
    return max(_holds(run, manifest, waiting, newcomer_epochs), key=lambda one: (one.until, -one.epoch), default=None)


def holds_up(run: RunState, manifest: Manifest, audit: PendingAudit, newcomer_epochs: int = NEWCOMER_EPOCHS) -> bool:
    """Whether an undecided result waits for this audit."""
    if manifest.team or not audit.whole or run.peer(audit.owner).proved >= newcomer_epochs:
        return False
    timing = manifest.timing
    waiting, tenure = run.shards[audit.shard].candidates.values(), max(timing.tenure, timing.lease)
    return any(found.epoch == audit.epoch for one in waiting for found in _holds_below(run, tenure, one, newcomer_epochs))


def _holds(run: RunState, manifest: Manifest, waiting: WaitingResult, newcomer_epochs: int) -> Iterator[Hold]:
    record, tenure = waiting.record, max(manifest.timing.tenure, manifest.timing.lease)
    if run.peer(record.owner).proved < min(1, newcomer_epochs):
        convicted = sum(
            event.kind == "peer-quarantined"
            and event.shard == record.shard
            and waiting.seen - event.time < PROBATION_TENURES * tenure
            for event in run.quarantined.values()
        )
        if convicted:
            until = waiting.seen + min(2 ** (convicted - 1), LONGEST_PROBATION) * tenure
            yield Hold(record.epoch, record.owner, convicted, until, "convictions")
    if not manifest.team:
        yield from _holds_below(run, tenure, waiting, newcomer_epochs)


def _holds_below(run: RunState, tenure: float, waiting: WaitingResult, newcomer_epochs: int) -> Iterator[Hold]:
    shard, owner = run.shards[waiting.record.shard], waiting.record.owner
    unproved: list[tuple[int, str, Literal["newcomer", "suspected"]]] = []
    for audit in run.audits.values():
        if audit.shard == waiting.record.shard and audit.whole and run.peer(audit.owner).proved < newcomer_epochs:
            unproved.append((audit.epoch, audit.owner, "newcomer"))
    for link in shard.lineage:
        if link.acceptance.checkpoint in shard.suspects:
            unproved.append((link.acceptance.epoch, link.acceptance.author, "suspected"))
    for epoch, author, why in unproved:
        built = sum(link.acceptance.epoch > epoch and link.acceptance.author != author for link in shard.lineage)
        if author != owner and built >= BUILT_AT_ONCE:
            tenures = min(2 ** (built - BUILT_AT_ONCE), LONGEST_HOLD)
            yield Hold(epoch, author, built, waiting.seen + tenures * tenure, why)
