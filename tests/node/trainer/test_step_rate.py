"""The probe's speed is that of the fastest step."""

from __future__ import annotations

from lutetia.node.trainer.units.trials import ENOUGH_SECONDS, MOST_STEPS, fastest_rate


def rate_of(*durations: float) -> tuple[float, int]:
    """The rate with steps of these durations, in seconds, and how many were taken."""
    moment, left = [100.0], list(durations)

    def step() -> None:
        moment[0] += left.pop(0)

    rate = fastest_rate(step, 4, clock=lambda: moment[0])
    return rate, len(durations) - len(left)


def test_one_slow_step_does_not_count() -> None:
    assert rate_of(0.5, 0.125, 0.5, 0.5, 0.5, 0.5) == (32.0, 5)


def test_a_slow_machine_takes_one_step_and_a_fast_one_no_more_than_needed() -> None:
    assert rate_of(2 * ENOUGH_SECONDS, 0.5) == (4 / (2 * ENOUGH_SECONDS), 1)
    assert rate_of(*[0.125] * 20) == (32.0, MOST_STEPS)
