"""Results that wait because an epoch below them is an unproved newcomer's. Pure.

A newcomer's first epochs are replayed whole, and its conviction voids what others have built on them. So at most BUILT_AT_ONCE
epochs of other authors are accepted on such an epoch at once. The next result passes its checks and is then held until the
replay ends, at most for one tenure; the one after it for two, then four, then LONGEST_HOLD. So a shard never stands still, and
what a conviction costs others grows with the logarithm of the time that the replay takes, at first. The same holds on an epoch
that an audit found invalid, until it is decided whether the epochs after it are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lutetia.coordinator.ledger.run_state import PendingAudit, RunState, WaitingResult
from lutetia.protocol.schema.manifest import Timing

NEWCOMER_EPOCHS = 2
"""So many epochs of each author are replayed whole, whatever the lottery says."""
BUILT_AT_ONCE = 2
"""So many epochs of other authors are accepted on an unproved one without waiting."""
LONGEST_HOLD = 8
"""A result is held for so many tenures at most."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a result waits: the unproved epoch below it, its author, and the epochs of others that stand on it already.

    `until`: Unix seconds at which the result is accepted all the same.
    """

    epoch: int
    author: str
    built: int
    until: float
    why: Literal["newcomer", "suspected"]


def is_unproved(run: RunState, audit: PendingAudit) -> bool:
    """Whether a whole replay is due of an author of whom few were found valid, or none since its last conviction or doubt."""
    return audit.whole and run.peer(audit.owner).proved < NEWCOMER_EPOCHS


def hold(run: RunState, timing: Timing, waiting: WaitingResult) -> Hold | None:
    """What holds an undecided result that has passed its checks, the longest hold first; None: it may be accepted."""
    return max(_holds(run, timing, waiting), key=lambda one: (one.until, -one.epoch), default=None)


def holds_up(run: RunState, timing: Timing, audit: PendingAudit) -> bool:
    """Whether an undecided result waits for this audit."""
    if not is_unproved(run, audit):
        return False
    waiting = run.shards[audit.shard].candidates.values()
    return any(found.epoch == audit.epoch for one in waiting for found in _holds(run, timing, one))


def _holds(run: RunState, timing: Timing, waiting: WaitingResult) -> Iterator[Hold]:
    shard, owner = run.shards[waiting.record.shard], waiting.record.owner
    unproved: list[tuple[int, str, Literal["newcomer", "suspected"]]] = []
    for audit in run.audits.values():
        if audit.shard == waiting.record.shard and is_unproved(run, audit):
            unproved.append((audit.epoch, audit.owner, "newcomer"))
    for link in shard.lineage:
        if link.acceptance.checkpoint in shard.suspects:
            unproved.append((link.acceptance.epoch, link.acceptance.author, "suspected"))
    for epoch, author, why in unproved:
        built = sum(link.acceptance.epoch > epoch and link.acceptance.author != author for link in shard.lineage)
        if author != owner and built >= BUILT_AT_ONCE:
            tenures = min(2 ** (built - BUILT_AT_ONCE), LONGEST_HOLD)
            yield Hold(epoch, author, built, waiting.seen + tenures * max(timing.tenure, timing.lease), why)
