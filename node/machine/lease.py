"""Decisions on the shard that this node holds: fetch it, follow its acceptances, release it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lutetia.node.machine.messages import (
    CheckpointsSuperseded,
    Claim,
    DiscardWork,
    PublishClaim,
    StopTrainer,
    Sync,
    SyncDone,
    SyncFailed,
)
from lutetia.node.machine.state import ShardWork
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.claims import LiveClaim, ShardView, Stand, shard_and_lane, slot_name
from lutetia.protocol.schema.records import ClaimRecord
from lutetia.protocol.stalled_claims import current_holder

T = TypeVar("T")

# --- taking and releasing a shard ---------------------------------------------------------------------------------


def start_sync(transition: NodeTransition, shard: int, known: Stand = (0, 0, None)) -> None:
    """Take the shard: fetch its data and accepted state. `known`: a newer acceptance that the DHT may not show yet.

    What is known of other shards is dropped: it will be out of date when this node needs it again.
    """
    state = transition.state
    view = state.views.get(shard) or ShardView(shard)
    term, epoch, checkpoint = known if known[:2] >= view.place else view.stand
    transition.set(
        work=ShardWork(shard, epoch, checkpoint, term=term, trainer_epoch=epoch), renew_at=transition.now,
        views=_only(shard, state.views), looked_at=_only(shard, state.looked_at),
        claim_histories=_only(shard, state.claim_histories),
    )  # fmt: skip
    transition.enter("syncing", f"fetching {slot_name(shard)} at epoch {epoch}")
    transition.do(Sync(shard, epoch, checkpoint))


def _only(shard: int, known: Mapping[int, T]) -> dict[int, T]:
    return {shard: known[shard]} if shard in known else {}


def release(transition: NodeTransition, *, save: bool) -> None:
    """Stop the trainer and publish that the shard is free. `save`: keep the local work on disk."""
    work = transition.state.work
    if work is None:
        return
    if work.trainer == "on":
        transition.do(StopTrainer(save))
    if work.owned:
        transition.do(PublishClaim(Claim(work.shard, work.epoch, work.samples, "released")))
    remembered = transition.state.remembered
    views = {shard: view for shard, view in transition.state.views.items() if shard != work.shard}  # old by now: look again
    transition.set(work=None, views=views, remembered=remembered | {work.shard} if save else remembered - {work.shard})


def give_up(transition: NodeTransition, why: str, *, save: bool, seconds: float) -> None:
    """Release the shard and avoid it for `seconds`. `save`: keep the local work on disk."""
    transition.set(avoided_until={**transition.state.avoided_until, transition.work.shard: transition.now + seconds})
    transition.warn(f"giving up {slot_name(transition.work.shard)}: {why}")
    to_idle(transition, why, save=save)


def to_idle(transition: NodeTransition, why: str, *, save: bool) -> None:
    leaving = transition.state.phase == "draining"
    release(transition, save=save)
    transition.set(look_at=transition.now)
    if not leaving:  # a draining node without work leaves on its own
        transition.enter("idle", why)


# --- syncing --------------------------------------------------------------------------------------------------------------


def shard_synced(transition: NodeTransition, event: SyncDone) -> None:
    work = transition.state.work
    if transition.state.phase != "syncing" or not work:
        return
    if (work.shard, work.epoch, work.checkpoint) != (event.shard, event.epoch, event.checkpoint):
        return  # the answer to an earlier request
    transition.set_work(pending=event.pending, sync_failures=0, sync_at=None, restart_at=transition.now, offer_at=transition.now)
    transition.set(remembered=transition.state.remembered | {event.shard})
    transition.enter("training", f"training {slot_name(event.shard)} from epoch {transition.work.newest}")


def sync_failed(transition: NodeTransition, event: SyncFailed) -> None:
    work = transition.state.work
    if transition.state.phase != "syncing" or not work or work.shard != event.shard:
        return
    failures = work.sync_failures + 1
    transition.warn(f"could not fetch {slot_name(event.shard)}: {event.reason}")
    if failures >= transition.rules.crash_limit:
        give_up(transition, f"fetching failed {failures} times", save=True, seconds=transition.rules.lease)
    else:
        transition.set_work(
            sync_failures=failures, sync_at=transition.now + transition.rules.backoff(failures, "sync", event.shard)
        )
        transition.explain(f"waiting to fetch again: {event.reason}")


# --- what the DHT shows of our shard ------------------------------------------------------------------------------------


def own_shard_seen(transition: NodeTransition) -> None:
    """Yield to a rightful holder; then follow the accepted lineage."""
    state, rules, now, work = transition.state, transition.rules, transition.now, transition.work
    view = state.views[work.shard]
    others = any(claim.record.owner != rules.owner for claim in view.live(now))
    if work.owned and others:
        lapsed = work.checking or now - state.renewed_at >= rules.lease
        seen, own = state.claim_histories.get(work.shard, {}), _with_own_claim(transition, view)
        holder = current_holder(rules.run, own, seen, rules.tenure, rules.interval, now, reader=rules.owner)
        if lapsed or holder != rules.owner:
            _follow(transition, view, resync=False)
            if transition.state.work:
                to_idle(transition, f"{slot_name(work.shard)} has another owner", save=work.shard in transition.state.remembered)
            return
    if work.checking and state.disk_full_since is None:  # the shard is still free: renew the lease
        transition.set_work(checking=False)
        transition.set(renewed_at=now, renew_at=now)
    _follow(transition, view, resync=True)


def _with_own_claim(transition: NodeTransition, view: ShardView) -> ShardView:
    """A DHT replica may lag behind our renewals, so add our own claim as it is."""
    rules, work = transition.rules, transition.work
    claim = work.claim(draining=False)
    shard, lane = shard_and_lane(claim.shard)
    record = ClaimRecord(
        run=rules.run, owner=rules.owner, issued=transition.state.renewed_at,
        shard=shard, lane=lane, epoch=claim.epoch, samples=claim.samples, state=claim.state,
    )  # fmt: skip
    others = [claim for claim in view.claims if claim.record.owner != rules.owner]
    return view.with_claims([*others, LiveClaim(record, transition.state.renewed_at + rules.lease)])


def _follow(transition: NodeTransition, view: ShardView, *, resync: bool) -> None:
    """Move to the newest acceptance.

    Our own checkpoint advances the work; another peer's checkpoint or a rollback voids it. `resync`: go on with the shard then.
    """
    work, before = transition.work, transition.work.term
    term, epoch, checkpoint = view.stand
    if view.place < (work.term, work.epoch):
        return
    transition.set_work(term=term)
    if (epoch, checkpoint) == (work.epoch, work.checkpoint):
        return
    if term == before and transition.rules.team and work.epoch < epoch:
        _merged(transition, epoch)
        return
    if checkpoint and any((c.epoch, c.digest) == (epoch, checkpoint) for c in work.pending):
        own_accepted(transition, epoch, checkpoint)
        return
    if term > before:
        transition.warn(f"{slot_name(work.shard)} was rolled back to epoch {epoch}; newer local work is discarded")
    elif transition.state.phase == "syncing" and not work.pending:
        transition.info(f"{slot_name(work.shard)} is at epoch {epoch} now")
    else:
        transition.warn(f"epoch {epoch} of {slot_name(work.shard)} was accepted from another peer; local work on it is discarded")
    discard_work(transition, min(epoch, work.epoch))
    if transition.state.phase == "draining" or not work.owned:
        release(transition, save=False)
    elif resync and term == before:
        _overtaken(transition)
    elif resync:
        start_sync(transition, work.shard)


def _merged(transition: NodeTransition, epoch: int) -> None:
    """The lanes were merged, with or without our own result: go on from the new epoch."""
    work = transition.work
    merged = f"the lanes of shard {shard_and_lane(work.shard)[0]} were merged into epoch {epoch}"
    if work.gathered or not (work.pending or work.trainer == "on"):
        transition.info(merged)
    else:
        leave_out(transition, f"{merged} before this node's result was there")
    done, leaving = epoch >= transition.rules.epochs, transition.state.phase == "draining" or not work.owned
    discard_work(transition, work.epoch, again=not done and not leaving)
    if done:
        to_idle(transition, f"{slot_name(work.shard)} is done", save=False)
    elif leaving:
        release(transition, save=False)
    else:
        start_sync(transition, work.shard)


def leave_out(transition: NodeTransition, why: str) -> None:
    """Say that a result came too late for its merge, in the node's status until one is in time."""
    text = f"{why}; it is left out, which is nobody's fault and costs this node nothing"
    if text != transition.state.left_out:
        transition.set(left_out=text)
        transition.info(text)


def _overtaken(transition: NodeTransition) -> None:
    """Continue from another peer's epochs.

    The previous holder may still have `max_pending` results under way. More than that come from a peer that holds the shard
    now and whose claim looks expired here: one of the two clocks is wrong by a lease.
    """
    shard, rules, counts = transition.work.shard, transition.rules, transition.state.overtaken
    times = counts.get(shard, 0) + 1
    transition.set(overtaken={**counts, shard: times % (rules.max_pending + 1)})
    if times <= rules.max_pending:
        start_sync(transition, shard)
        return
    why = "another peer also works on it, and its claim looks expired here; check this machine's clock"
    give_up(transition, why, save=False, seconds=rules.lease)


def discard_work(transition: NodeTransition, epoch: int, *, again: bool = False) -> None:
    """Stop the trainer and drop all work after accepted `epoch`. `again`: training goes on soon."""
    if transition.work.trainer == "on":
        transition.do(StopTrainer(save=False, again=again))
    transition.set(remembered=transition.state.remembered - {transition.work.shard})
    transition.set_work(trainer="off", pending=(), offering=None)
    transition.do(DiscardWork(transition.work.shard, epoch))


def own_accepted(transition: NodeTransition, epoch: int, digest: str) -> None:
    work, now = transition.work, transition.now
    pending = tuple(candidate for candidate in work.pending if candidate.epoch > epoch)
    transition.set_work(epoch=epoch, checkpoint=digest, pending=pending, offering=None, offers=0, unjudged=0, offer_at=now)
    transition.set(
        rejections={**transition.state.rejections, work.shard: 0}, overtaken={**transition.state.overtaken, work.shard: 0}
    )
    transition.info(f"epoch {epoch} of {slot_name(work.shard)} was accepted")
    transition.do(CheckpointsSuperseded(work.shard, epoch))
