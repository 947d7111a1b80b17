"""Which claims no longer hold their shard because their owner makes no progress. Pure.

A claim costs nothing, and the samples that it reports are not verified; only acceptances are evidence. So a claim stops counting
when its reported samples have not risen for IDLE tenures, and, whatever it reports, when nothing of its owner was accepted for
SLOWEST tenures. The first rule finds nodes that hang and simple squatters; the second bounds a liar. Every reader (each node and
the coordinator) judges only by what it has seen itself without a gap. Readers that disagree for a while waste work, as two owners
during a partition do, but corrupt nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lutetia.protocol.claims import ShardView, shard_and_lane, shard_owner, trained

IDLE = 2
"""Tenures without a rise of the reported samples after which a claim no longer counts."""
SLOWEST = 24
"""Tenures without an acceptance of its own after which a claim no longer counts."""
LONGEST_GAP = 2
"""Leases between two looks after which a reader starts to watch a claim from the beginning."""

Seen = Mapping[str, "ClaimHistory"]
"""Owner -> what this reader has seen of its claim on one shard."""


class ClaimHistory(NamedTuple):
    """What one reader has seen of one claim. Times are seconds of the reader's clock."""

    place: tuple[int, int]
    """(term, epoch) of the shard at the last look."""
    samples: int
    """The most samples that the claim has reported at this place."""
    since: float
    """Since when nothing of this owner was accepted."""
    moved: float
    """When its samples last rose."""
    seen: float
    """When it was last seen."""


def observe_claims(known: Seen, view: ShardView, now: float, longest_gap: float) -> dict[str, ClaimHistory]:
    """The histories of a shard's claims after one more look at it.

    `known` holds those of the look before. A claim that was not seen for `longest_gap` seconds starts a new history; that of a
    claim that has gone is dropped.
    """
    watched: dict[str, ClaimHistory] = {}
    for claim in view.live(now):
        owner, samples = claim.record.owner, claim.record.samples
        old = known.get(owner)
        if old is None or now - old.seen > longest_gap or now < old.seen:
            watched[owner] = ClaimHistory(view.place, samples, now, now, now)
            continue
        accepted = view.place != old.place and _accepted_work_of(view, owner)
        moved = accepted or samples > old.samples
        since, most = now if accepted else old.since, samples if view.place != old.place else max(samples, old.samples)
        watched[owner] = ClaimHistory(view.place, most, since, now if moved else old.moved, now)
    return watched


def _accepted_work_of(view: ShardView, owner: str) -> bool:
    """Whether `owner` trained the last acceptance, or this lane of it. Where no record says who, it may be any claimant."""
    given, lane = view.acceptance, shard_and_lane(view.shard)[1]
    if given is None:
        return False
    own = trained(given, lane, owner)
    return lane in given.lanes if own is None else own


def without_stalled(seen: Seen, view: ShardView, reader: str | None, tenure: float, interval: int, now: float) -> ShardView:
    """The view without the claims that no longer count.

    A claim that reports a whole epoch waits for the coordinator, so only the SLOWEST rule applies to it.

    Args:
        seen: what the reader has seen of the shard's claims.
        view: the shard as the DHT shows it.
        reader: public key of the reading node, whose own claim always counts; None for a reader that claims nothing.
        tenure: the run's tenure in seconds.
        interval: samples of an epoch.
        now: seconds, of the clock by which `seen` was kept.
    """
    whole, idle_since, slow_since = (view.epoch + 1) * interval, now - IDLE * tenure, now - SLOWEST * tenure
    stalled = {
        claimant
        for claimant, entry in seen.items()
        if (entry.moved < idle_since and entry.samples < whole or entry.since < slow_since) and claimant != reader
    }
    return view.with_claims(claim for claim in view.claims if claim.record.owner not in stalled) if stalled else view


def current_holder(
    run: str, view: ShardView, seen: Seen, tenure: float, interval: int, now: float, reader: str | None = None
) -> str | None:
    """Public key of the peer that holds the shard now, or None. The one rule that nodes and the status document apply.

    Of the claims that count (`without_stalled`, which explains the other arguments) the one that wins (`claims.shard_owner`).
    """
    return shard_owner(run, without_stalled(seen, view, reader, tenure, interval, now), now)
