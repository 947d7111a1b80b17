"""Pauses and bounds of what a node does beside its state machine, in seconds. The simulator uses the same ones."""

from __future__ import annotations

from dataclasses import dataclass

LOOKUPS_AT_ONCE = 8
"""Shards that are looked up in the DHT at the same time."""
CHECKPOINT_RECORD_SECONDS = 600.0
"""A checkpoint's record is published again after this time, while the checkpoint is still offered."""
AUDIT_WATCH_SECONDS = 0.5
"""How often a node that replays an epoch looks whether it has work of its own."""
AUDIT_SIGN_SECONDS = 120.0
"""How often a node that replays an epoch asks the coordinator for the same audit again, which shows that it still works on it."""
LATEST_MANIFEST_QUESTION = 1.25
"""Leases after which every node has asked for a newer manifest."""


def manifest_pause(lease: float, owner: str) -> float:
    """Pause between two questions for a newer manifest: 0.75 to 1.25 leases, which spreads nodes by their public key."""
    return lease * (0.75 + (LATEST_MANIFEST_QUESTION - 0.75) * int(owner[:8], 16) / 16**8)


def audit_pause(heartbeat: float, wanted: float, jitter: float) -> float:
    """Pause before the next question for an audit.

    Args:
        heartbeat: the shortest pause.
        wanted: the pause that the coordinator asked for; 0 if it asked for none.
        jitter: a number in [0, 1) that spreads the nodes.
    """
    return max(wanted, heartbeat) * (1 + jitter / 4)


def provider_record_due(since: float, ttl: float) -> bool:
    """Whether to publish a provider record again that was published `since` seconds ago and lives `ttl` seconds."""
    return since > ttl / 3


def tick_pause(due: float, now: float, heartbeat: float) -> float:
    """Pause before the state machine's next ClockTick, due at `due`: at most a heartbeat, because clocks may jump."""
    return min(max(0.0, due - now), heartbeat)


LOCAL_COST_SHARE = 0.02
"""Largest share of the training time that local states may cost."""
_DAY = 86400.0


@dataclass(frozen=True)
class SaveInterval:
    """Seconds from one local state to the next, and why."""

    seconds: float
    reason: str


def save_interval(wanted: float, size: int, cost: float, daily: int) -> SaveInterval:
    """The longest of: what is wanted, what keeps the cost small, what keeps to the bytes a day.

    A local state saves the work since the last one if the machine crashes; a trainer that is stopped writes one in any case. Each
    costs time and wears the disk.

    Args:
        wanted: seconds, if nothing else speaks against it.
        size: bytes of a local state.
        cost: seconds of training that the last one took: the loop's waiting and the processor time of its writing.
        daily: bytes of local states that may be written in a day.
    """
    choices = (
        SaveInterval(wanted, "as set"),
        SaveInterval(cost / LOCAL_COST_SHARE, f"one costs {cost:.2g} s, and {LOCAL_COST_SHARE:.0%} of the time may be spent so"),
        SaveInterval(size * _DAY / daily, f"one has {size / 1e9:.3g} GB, and {daily / 1e9:.3g} GB a day may be written"),
    )
    return max(choices, key=lambda choice: choice.seconds)
