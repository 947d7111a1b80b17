"""How often a trainer writes its local state. Pure.

A local state saves the work since the last one if the machine crashes; a trainer that is stopped writes one in any case. Each
costs time and wears the disk, so the state's size and the measured cost decide how often it is worth it.
"""

from __future__ import annotations

from dataclasses import dataclass

COST_SHARE = 0.02
"""Largest share of the training time that local states may cost."""
_DAY = 86400.0


@dataclass(frozen=True)
class SaveInterval:
    """Seconds from one local state to the next, and why."""

    seconds: float
    reason: str


def save_interval(wanted: float, size: int, cost: float, daily: int) -> SaveInterval:
    """The longest of: what is wanted, what keeps the cost small, what keeps to the bytes a day.

    Args:
        wanted: seconds, if nothing else speaks against it.
        size: bytes of a local state.
        cost: seconds of training that the last one took: the loop's waiting and the processor time of its writing.
        daily: bytes of local states that may be written in a day.
    """
    choices = (
        SaveInterval(wanted, "as set"),
        SaveInterval(cost / COST_SHARE, f"one takes {cost:.2g} s of training, of which {COST_SHARE:.0%} may be spent so"),
        SaveInterval(size * _DAY / daily, f"one has {size / 1e9:.3g} GB, and {daily / 1e9:.3g} GB a day may be written"),
    )
    return max(choices, key=lambda choice: choice.seconds)
