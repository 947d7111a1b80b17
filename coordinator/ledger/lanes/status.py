"""What the status document says of lanes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.schema.status import LaneStatus, StallStatus

LANES_SHOWN, LANES_FOR_A_NODE = 1024, 4
"""The document has room for so many lanes of all shards together, and shows one node less for so many of them."""


def lane_statuses(
    ledger: ShardLedger, holders: Mapping[int, tuple[str, str]], merging: Collection[str]
) -> tuple[LaneStatus, ...]:
    """The lanes of a shard at which nodes work, or of which the result is there.

    Args:
        ledger: the shard.
        holders: by lane, public key and state of the claim that holds it.
        merging: digests of the results that are being merged.
    """
    gathered = {lane: link.acceptance for lane, link in ledger.gathered.items()}
    return tuple(
        LaneStatus(
            lane=lane, owner=gathered[lane].author, state="merging" if gathered[lane].checkpoint in merging else "gathered"
        )
        if lane in gathered
        else LaneStatus(lane=lane, owner=holders[lane][0], state="claimed" if holders[lane][1] == "claiming" else "training")
        for lane in sorted(gathered.keys() | holders.keys())
    )


def merge_stalls(state: RunState) -> list[StallStatus]:
    """The shards whose last merge failed a check, until lanes are merged again."""
    return [
        StallStatus(
            kind="merge", shard=index, epoch=max(1, refused.epoch), since=refused.time,
            why=f"The merge of lanes {', '.join(map(str, refused.lanes))} of epoch {refused.epoch} failed the check "
            f"{refused.check}: {refused.text}"[:380] + ".",
            remedy="Nothing: the best of these results goes on alone. If it comes again and again, begin a new run with a lower "
            "team.inner_rate or a shorter interval.",
        )
        for index, shard in sorted(state.shards.items())
        if (refused := shard.refused_merge)
    ]  # fmt: skip
