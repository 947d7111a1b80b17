"""Claims that hold a shard without working on it lose their protection: they then count as none, and the shard as free. Pure.

A claim costs nothing and says what it likes of its samples; only acceptances are evidence. So two kinds of claims are passed
over: whose reported samples stand still for IDLE tenures, and who has had nothing accepted for SLOWEST tenures, whatever it
reports. The first finds boxes that hang and naive squatters, the second bounds a liar. Each reader judges by what it has seen
itself, without a gap; readers who disagree for a while waste work, as two owners during a partition do, and corrupt nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lutetia.protocol.claims import ShardView

IDLE, SLOWEST = 2, 24

Seen = Mapping[str, "ClaimHistory"]
"""Owner -> what this reader has seen of its claim on one shard."""


class ClaimHistory(NamedTuple):
    """`since` this claim has had no acceptance of its own, `moved` when its samples last rose, `seen` when it was last seen."""

    place: tuple[int, int]
    samples: int
    since: float
    moved: float
    seen: float


def observe_claims(known: Seen, view: ShardView, now: float, longest_gap: float) -> dict[str, ClaimHistory]:
    """`known` of a shard after a look at it. Claims not seen for `longest_gap` seconds are watched anew, those gone forgotten."""
    watched: dict[str, ClaimHistory] = {}
    for claim in view.live(now):
        owner, samples = claim.record.owner, claim.record.samples
        old = known.get(owner)
        if old is None or now - old.seen > longest_gap or now < old.seen:
            watched[owner] = ClaimHistory(view.place, samples, now, now, now)
            continue
        own = view.place != old.place and view.acceptance is not None and view.acceptance.author == owner
        moved = own or samples > old.samples
        since, most = now if own else old.since, samples if view.place != old.place else max(samples, old.samples)
        watched[owner] = ClaimHistory(view.place, most, since, now if moved else old.moved, now)
    return watched


def without_stalled(seen: Seen, view: ShardView, owner: str, tenure: float, interval: int, now: float) -> ShardView:
    """The view without the claims of others that have lost their protection. `interval`: samples of an epoch.

    Who says that its epoch is whole waits for the coordinator, and only the longer time runs against it.
    """
    whole, idle_since, slow_since = (view.epoch + 1) * interval, now - IDLE * tenure, now - SLOWEST * tenure
    lost = {
        claimant
        for claimant, entry in seen.items()
        if (entry.moved < idle_since and entry.samples < whole or entry.since < slow_since) and claimant != owner
    }
    return view.with_claims(claim for claim in view.claims if claim.record.owner not in lost) if lost else view
