"""The part of the reducer for lanes: accepted results wait by lane until they are merged into the next epoch. Pure."""

from __future__ import annotations

from lutetia.coordinator.ledger.audit_reducer import LedgerOutOfOrder, add_costs, shard_of
from lutetia.coordinator.ledger.events import LaneDropped, LanesMerged
from lutetia.coordinator.ledger.run_state import HISTORY, AcceptedEpoch, Changes, RunState, ShardLedger
from lutetia.protocol.schema.records import AcceptanceRecord


def check_lane_follows(shard: ShardLedger, given: AcceptanceRecord) -> None:
    """Raises LedgerOutOfOrder unless this is a first result of one lane for the shard's next epoch."""
    follows = given.epoch == shard.epoch + 1 and given.parent == shard.accepted and given.term == shard.term
    if not follows or len(given.lanes) != 1 or given.lanes[0] in shard.gathered:
        text = f"a lane's result for epoch {given.epoch} of shard {given.shard} cannot be accepted on epoch {shard.epoch}"
        raise LedgerOutOfOrder(text)


def apply_lane_dropped(state: RunState, event: LaneDropped) -> Changes:
    """Its audit is not needed any more."""
    shard = shard_of(state, event.shard)
    gathered = {lane: link for lane, link in shard.gathered.items() if link.acceptance.checkpoint != event.checkpoint}
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint != event.checkpoint}
    return {"shards": state.shards.set(event.shard, shard.updated(gathered=gathered)), "audits": audits}


def apply_lanes_merged(state: RunState, event: LanesMerged) -> Changes:
    """The merged results are the sources of the new epoch. The others are left out: no audit of them can change anything."""
    given = event.acceptance
    shard = shard_of(state, given.shard)
    sources = tuple(shard.gathered[lane] for lane in given.lanes if lane in shard.gathered)
    if given.epoch != shard.epoch + 1 or given.parent != shard.accepted or given.term != shard.term:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be merged on epoch {shard.epoch}")
    if not sources or tuple(source.acceptance.checkpoint for source in sources) != event.sources:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} is merged from results that were not accepted")
    left_out = {link.acceptance.checkpoint for link in shard.gathered.values()} - {*event.sources}
    link = AcceptedEpoch(given, event.time, state.budgets, event.trace, sources=sources)
    shard = shard.updated(
        epoch=given.epoch, acceptance=given, accepted_at=event.time, lineage=(*shard.lineage[-HISTORY + 1 :], link),
        gathered={}, judged={}, refuted=0, refuted_at=0.0,
    )  # fmt: skip
    return {
        "shards": state.shards.set(given.shard, shard), "spent": add_costs(state, event.costs),
        "audits": {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint not in left_out},
    }  # fmt: skip
