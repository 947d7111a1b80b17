"""What the status document says of lanes. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from lutetia.coordinator.acceptance.lanes.merging import merge_due, quorum_of
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.status import LaneStatus, MergeStatus, StallStatus

LANES_SHOWN, LANES_FOR_A_NODE = 1024, 4
"""The document has room for so many lanes and merges of all shards together, and shows one node less for so many of them."""


def merge_status(ledger: ShardLedger, team: TeamSpec, at_work: Collection[int] | None) -> MergeStatus:
    """The next merge of a shard. `at_work`: the lanes at which nodes work; None: not known."""
    due = merge_due(ledger, team, at_work)
    return MergeStatus(
        lanes=team.lanes, quorum=quorum_of(team), gathered=len(ledger.gathered), deadline=team.deadline,
        due=due if math.isfinite(due) else None,
    )  # fmt: skip


def lane_statuses(
    ledger: ShardLedger, holders: Mapping[int, tuple[str, str]], merging: Collection[str], overdue: bool = False
) -> tuple[LaneStatus, ...]:
    """The lanes of a shard at which nodes work, or of which the result is there.

    Args:
        ledger: the shard.
        holders: by lane, public key and state of the claim that holds it.
        merging: digests of the results that are being merged.
        overdue: whether the merge is due.
    """
    gathered = {lane: link.acceptance for lane, link in ledger.gathered.items()}
    merged = ledger.acceptance.lanes if ledger.acceptance else ()
    late = overdue or any(given.checkpoint in merging for given in gathered.values())

    def state(lane: int) -> str:
        if lane in gathered:
            return "merging" if gathered[lane].checkpoint in merging else "gathered"
        return "late" if late else "claimed" if holders[lane][1] == "claiming" else "training"

    return tuple(
        LaneStatus(
            lane=lane, owner=gathered[lane].author if lane in gathered else holders[lane][0], state=state(lane),
            merged=lane in merged,
        )
        for lane in sorted(gathered.keys() | holders.keys())
    )  # fmt: skip


def merge_stalls(state: RunState) -> list[StallStatus]:
    """The shards whose last merge failed a check, until lanes are merged again."""
    return [
        StallStatus(
            kind="merge", shard=index, epoch=max(1, refused.epoch), since=refused.time,
            why=f"The merge of lanes {', '.join(map(str, refused.lanes))} of epoch {refused.epoch} failed the check "
            f"{refused.check}: {refused.text}"[:380] + ".",
            remedy="Nothing now: the best of these results goes on alone; if it comes again and again, begin a new run with a "
            "lower team.inner_rate or a shorter interval.",
        )
        for index, shard in sorted(state.shards.items())
        if (refused := shard.refused_merge)
    ]  # fmt: skip
