"""How often local states are written."""

from __future__ import annotations

import pytest

from lutetia.node.pacing import save_interval

GB = 10**9


@pytest.mark.parametrize(
    ("size", "cost", "seconds", "why"),
    [
        (GB // 50, 0.1, 30, "as set"),  # of a small expert
        (GB // 50, 3.0, 150, "2% of the time"),
        (int(22.7 * GB), 3.0, 6537.6, "300 GB a day"),  # of an expert of 1.4 billion parameters
    ],
)
def test_interval_keeps_cost_and_wear_small(size: int, cost: float, seconds: float, why: str):
    interval = save_interval(30.0, size, cost, 300 * GB)
    assert interval.seconds == pytest.approx(seconds)
    assert why in interval.reason
