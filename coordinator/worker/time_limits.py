"""For how long a job of a worker process may show no progress. Pure.

A job that goes on is never cut off: what hangs must be told from what is slow, on any machine and for experts of any size. So
the patience grows with the bytes that a job reads before it can report anything, and with the pauses that such jobs had before.
"""

from __future__ import annotations

_SHORTEST = 300.0
_SLOWEST_BYTES_PER_SECOND = 2e6
"""An expert that reports nothing before its first row is read, built and run once at this rate at least."""
_TIMES = 20.0
"""A pause this many times as long as the longest one before is a hang."""


def patience_for(size: int) -> float:
    """Seconds without progress after which a job that reads `size` bytes counts as hung."""
    return _SHORTEST + size / _SLOWEST_BYTES_PER_SECOND


def silence_limit(patience: float, longest_pause: float) -> float:
    """`patience`, or longer where jobs of this kind have been seen to pause for `longest_pause` seconds and to go on."""
    return max(patience, _TIMES * longest_pause)
