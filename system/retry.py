"""How long to wait before the next attempt. The one formula for every retry in Lutetia."""

from __future__ import annotations

_MOST_DOUBLED = 64  # beyond it a float would overflow long after any cap applies


def backoff(attempt: int, *, first: float = 1.0, longest: float = 60.0, factor: float = 2.0, jitter: float = 0.0) -> float:
    """Seconds to wait after failed attempt number `attempt`: exponential, capped, spread by jitter.

    Args:
        attempt: How many attempts have failed, 1 for the first.
        first: Seconds after the first failure.
        longest: Cap in seconds, before jitter.
        factor: Growth per failure.
        jitter: A number in [0, 1). It adds up to a quarter, so that peers that failed together do not retry together.
    """
    return min(longest, first * factor ** min(max(attempt, 1) - 1, _MOST_DOUBLED)) * (1 + jitter / 4)
