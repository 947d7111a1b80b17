"""Claims that hold a shard without working on it lose their protection: they then count as none, and the shard as free. Pure.

A claim costs nothing and says what it likes of its samples; only acceptances are evidence. So two kinds of claims are passed
over: whose reported samples stand still for IDLE tenures, and who has had nothing accepted for SLOWEST tenures, whatever it
reports. The first finds boxes that hang and naive squatters, the second bounds a liar. Each reader judges by what it has seen
itself, without a gap; readers who disagree for a while waste work, as two owners during a partition do, and corrupt nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .claims import ShardView

IDLE, SLOWEST = 2, 24

Seen = Mapping[tuple[int, str], "Watched"]
"""(shard, owner) -> what this reader has seen of that claim."""


@dataclass(frozen=True, slots=True)
class Watched:
    """`since` this claim has had no acceptance of its own, `moved` when its samples last rose, `seen` when it was last seen."""

    place: tuple[int, int]
    samples: int
    since: float
    moved: float
    seen: float


def watch(known: Seen, view: ShardView, now: float, longest_gap: float) -> dict[tuple[int, str], Watched]:
    """`known` after a look at one shard. Claims not seen for `longest_gap` seconds are watched anew; those gone are forgotten."""
    watched = {key: entry for key, entry in known.items() if key[0] != view.shard}
    for claim in view.live(now):
        owner, samples = claim.record.owner, claim.record.samples
        old = known.get((view.shard, owner))
        if old is None or now - old.seen > longest_gap or now < old.seen:
            watched[view.shard, owner] = Watched(view.place, samples, now, now, now)
            continue
        own = view.place != old.place and view.acceptance is not None and view.acceptance.author == owner
        moved = own or samples > old.samples
        since, most = now if own else old.since, samples if view.place != old.place else max(samples, old.samples)
        watched[view.shard, owner] = Watched(view.place, most, since, now if moved else old.moved, now)
    return watched


def protected(seen: Seen, view: ShardView, owner: str, tenure: float, interval: int, now: float) -> ShardView:
    """The view without the claims of others that have lost their protection. `interval`: samples of an epoch.

    Who says that its epoch is whole waits for the coordinator, and only the longer time runs against it.
    """
    whole = (view.epoch + 1) * interval

    def holds(claimant: str) -> bool:
        entry = seen.get((view.shard, claimant))
        if entry is None or claimant == owner:
            return True
        idle = entry.samples < whole and now - entry.moved > IDLE * tenure
        return not idle and now - entry.since <= SLOWEST * tenure

    lost = {claimant for claimant in view.claimants if not holds(claimant)}
    return view.with_claims(claim for claim in view.claims if claim.record.owner not in lost) if lost else view
