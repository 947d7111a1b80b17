"""How fast a trainer is, from a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_STEPS = 8
ENOUGH_SECONDS = 2.0


def fastest_rate(step: Callable[[], object], samples: int, clock: Callable[[], float] = time.monotonic) -> float:
    """Samples per second of the fastest of up to MOST_STEPS steps, begun within ENOUGH_SECONDS.

    The fastest, because whatever else the machine does for a moment makes steps slower and none faster: by one step alone, eight
    nodes that start together on two cores each look several times as slow as they are.

    Args:
        step: takes one step; one that was taken before has allocated memory and compiled kernels.
        samples: of a step.
        clock: seconds.
    """
    begin = now = clock()
    times = list[float]()
    while not times or (len(times) < MOST_STEPS and now - begin < ENOUGH_SECONDS):
        started = now
        step()
        now = clock()
        times.append(now - started)
    return samples / min(times)
