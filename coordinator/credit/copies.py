"""Counts who keeps copies of accepted checkpoints, and for how long, until it is written to the ledger. Pure.

An hour of a shard's copies is worth one batch, shared equally by those that proved that they hold the accepted checkpoint. What
is less than a sample is carried on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lutetia.coordinator.ledger.events import CopiesKept, CopyKept

HOUR = 3600.0
WRITE_SECONDS = 6 * HOUR
"""Seconds from one event to the next."""
MOST_ENTRIES = 256
"""Entries of one event: those with most samples."""
_LONGEST_LOOK = 600.0
"""Seconds: the gap between two looks that counts; in a longer one nobody was asked."""


@dataclass
class CopyKeeping:
    """What peers have kept since the last event. `batch`: samples of one step."""

    batch: int
    looked: float | None = None
    written: float | None = None
    kept: dict[tuple[str, int], float] = field(default_factory=dict)
    """(public key, shard) -> samples."""

    def look(self, holders: Mapping[int, Collection[str]], now: float) -> None:
        """`holders`: by shard, the public keys of those with proved copies at `now` (Unix seconds) that may be credited."""
        seconds = 0.0 if self.looked is None else min(max(0.0, now - self.looked), _LONGEST_LOOK)
        self.looked = now
        if self.written is None:
            self.written = now
        for shard, owners in holders.items():
            for owner in owners:
                share = self.batch * seconds / HOUR / len(owners)
                self.kept[owner, shard] = self.kept.get((owner, shard), 0.0) + share

    def due(self, now: float, last: bool = False) -> CopiesKept | None:
        """The event to write at `now`, if one is due, or any at all if it is the `last`. What it says counts as written."""
        if self.written is None or (now - self.written < WRITE_SECONDS and not last):
            return None
        self.written = now
        most = sorted(self.kept, key=lambda key: (-self.kept[key], key))[:MOST_ENTRIES]
        whole = {key: int(self.kept[key]) for key in most if self.kept[key] >= 1}
        self.kept = {key: self.kept[key] - whole.get(key, 0) for key in most}
        if not whole:
            return None
        copies = tuple(CopyKept(owner=owner, shard=shard, samples=samples) for (owner, shard), samples in whole.items())
        return CopiesKept(time=now, copies=copies)
