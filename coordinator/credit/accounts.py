"""A peer's credit: how much of the run's computing counts as its own. Pure.

It is counted in samples of each shard and shown in FLOPs: samples times what training one of them costs the shard's expert. The
recent average halves in a week, as BOINC's does (its wiki, "CreditNew", recent average credit): each sample adds ln 2 divided by
the half-life when it is credited, and 2^(-t / half-life) of that t seconds later. Work at a steady rate is shown as that rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

DAY = 86_400.0
HALF_LIFE = 7 * DAY
"""Seconds in which the recent average of a peer that does nothing halves."""

CreditKind = Literal["standing", "kept", "audits", "copies"]


def fading(seconds: float) -> float:
    """What is left of a recent average after so many seconds, 0 to 1; times before count as 0."""
    return 2.0 ** (-max(0.0, seconds) / HALF_LIFE)


def daily(samples: float, seconds: float) -> float:
    """What so many samples add to the recent average, in samples per day, `seconds` after they were credited."""
    return samples * math.log(2) * DAY / HALF_LIFE * fading(seconds)


@dataclass(frozen=True, slots=True)
class ShardCredit:
    """What one peer did for one shard, in samples of the shard."""

    standing: int = 0
    """Of its accepted epochs that stand."""
    kept: int = 0
    """Of its accepted epochs that are void through no fault of its own."""
    audits: int = 0
    """Replayed in audits that counted, and what lent checks were worth."""
    copies: int = 0
    """For copies of accepted checkpoints that it kept."""
    recent: float = 0.0
    """Recent average at `at`, in samples per day."""
    at: float = 0.0
    """Unix seconds."""

    @property
    def total(self) -> int:
        return self.standing + self.kept + self.audits + self.copies

    def plus(self, kind: CreditKind, samples: int, now: float) -> ShardCredit:
        """With more samples, credited `now`."""
        at = max(self.at, now)
        recent = self.recent_at(at) + daily(samples, at - now)
        return replace(self, **{kind: getattr(self, kind) + samples}, recent=recent, at=at)

    def minus(self, samples: int, credited: float) -> ShardCredit:
        """Without standing samples that were credited at `credited` (Unix seconds), as if they had never been."""
        recent = max(0.0, self.recent - daily(samples, self.at - credited))
        return replace(self, standing=max(0, self.standing - samples), recent=recent)

    def keeping(self, samples: int) -> ShardCredit:
        """With standing samples that are void from now on, but stay credited."""
        return replace(self, standing=self.standing - samples, kept=self.kept + samples)

    def recent_at(self, now: float) -> float:
        """The recent average at `now`, in samples per day."""
        return self.recent * fading(now - self.at)


PeerCredit = Mapping[int, ShardCredit]
"""By shard."""


@dataclass(frozen=True, slots=True)
class Credit:
    """A peer's credit in FLOPs."""

    epochs: int = 0
    """Of its accepted epochs, void ones that count included."""
    audits: int = 0
    copies: int = 0
    recent: float = 0.0
    """FLOPs per day."""

    @property
    def total(self) -> int:
        return self.epochs + self.audits + self.copies


def credit_in_flops(shards: PeerCredit, flops: Sequence[int], now: float) -> Credit:
    """The credit at `now` (Unix seconds). `flops`: of training one sample, by shard; where it is not known nothing is shown."""
    priced = [(credit, flops[shard]) for shard, credit in shards.items() if shard < len(flops)]
    return Credit(
        epochs=sum((credit.standing + credit.kept) * price for credit, price in priced),
        audits=sum(credit.audits * price for credit, price in priced),
        copies=sum(credit.copies * price for credit, price in priced),
        recent=sum(credit.recent_at(now) * price for credit, price in priced),
    )
