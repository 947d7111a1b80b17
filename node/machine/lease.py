"""The part of the state machine that takes a shard up, follows what the swarm shows of it, and lets it go."""

from __future__ import annotations

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
from lutetia.protocol.claims import LiveClaim, ShardView, Stand
from lutetia.protocol.schema.records import ClaimRecord
from lutetia.protocol.stalled_claims import current_holder

# --- taking a shard up, and letting it go ---------------------------------------------------------------------------------


def start_sync(turn: NodeTransition, shard: int, known: Stand = (0, 0, None)) -> None:
    """The shard is ours: fetch its data and the accepted state. `known`: an acceptance that the DHT may not show yet."""
    view = turn.state.views.get(shard) or ShardView(shard)
    term, epoch, checkpoint = known if known[:2] >= view.place else view.stand
    turn.set(work=ShardWork(shard, epoch, checkpoint, term=term, at=epoch), renew_at=turn.now)
    turn.enter("syncing", f"fetching shard {shard} at epoch {epoch}")
    turn.do(Sync(shard, epoch, checkpoint))


def release(turn: NodeTransition, *, save: bool) -> None:
    """Stop the trainer and tell the swarm that the shard is free."""
    work = turn.state.work
    if work is None:
        return
    if work.trainer == "on":
        turn.do(StopTrainer(save))
    if work.owned:
        turn.do(PublishClaim(Claim(work.shard, work.epoch, work.samples, "released")))
    remembered = turn.state.remembered
    views = {shard: view for shard, view in turn.state.views.items() if shard != work.shard}  # much may have changed: look anew
    turn.set(work=None, views=views, remembered=remembered | {work.shard} if save else remembered - {work.shard})


def give_up(turn: NodeTransition, why: str, *, save: bool, seconds: float) -> None:
    """Let the shard go and leave it alone for a while."""
    turn.set(shunned={**turn.state.shunned, turn.work.shard: turn.now + seconds})
    turn.warn(f"giving shard {turn.work.shard} up: {why}")
    to_idle(turn, why, save=save)


def to_idle(turn: NodeTransition, why: str, *, save: bool) -> None:
    leaving = turn.state.phase == "draining"
    release(turn, save=save)
    turn.set(look_at=turn.now)
    if not leaving:  # a draining node without work leaves by itself
        turn.enter("idle", why)


# --- syncing --------------------------------------------------------------------------------------------------------------


def shard_synced(turn: NodeTransition, event: SyncDone) -> None:
    work = turn.state.work
    if turn.state.phase != "syncing" or not work:
        return
    if (work.shard, work.epoch, work.checkpoint) != (event.shard, event.epoch, event.checkpoint):
        return  # the answer to an older wish
    turn.change(pending=event.pending, sync_failures=0, sync_at=None, restart_at=turn.now, offer_at=turn.now)
    turn.set(remembered=turn.state.remembered | {event.shard})
    turn.enter("training", f"training shard {event.shard}, begun on top of epoch {turn.work.newest}")


def sync_failed(turn: NodeTransition, event: SyncFailed) -> None:
    work = turn.state.work
    if turn.state.phase != "syncing" or not work or work.shard != event.shard:
        return
    failures = work.sync_failures + 1
    turn.warn(f"could not fetch shard {event.shard}: {event.reason}")
    if failures >= turn.rules.crash_limit:
        give_up(turn, f"fetching failed {failures} times", save=True, seconds=turn.rules.lease)
    else:
        turn.change(sync_failures=failures, sync_at=turn.now + turn.rules.backoff(failures, "sync", event.shard))
        turn.because(f"fetching again soon: {event.reason}")


# --- what the swarm shows of our shard ------------------------------------------------------------------------------------


def own_shard_seen(turn: NodeTransition) -> None:
    """Yield to a rightful owner; then follow the accepted lineage."""
    state, rules, now, work = turn.state, turn.rules, turn.now, turn.work
    view = state.views[work.shard]
    others = any(claim.record.owner != rules.owner for claim in view.live(now))
    if work.owned and others:
        lapsed = work.checking or now - state.renewed_at >= rules.lease
        seen, own = state.watched.get(work.shard, {}), _with_own_claim(turn, view)
        holder = current_holder(rules.run, own, seen, rules.tenure, rules.interval, now, reader=rules.owner)
        if lapsed or holder != rules.owner:
            _follow(turn, view, resync=False)
            if turn.state.work:
                to_idle(turn, f"shard {work.shard} has another owner", save=work.shard in turn.state.remembered)
            return
    if work.checking and state.disk_full_since is None:  # the shard is still free: take it up again
        turn.change(checking=False)
        turn.set(renewed_at=now, renew_at=now)
    _follow(turn, view, resync=True)


def _with_own_claim(turn: NodeTransition, view: ShardView) -> ShardView:
    """A replica may lag behind our own renewals; we know that our claim lives."""
    rules, work = turn.rules, turn.work
    claim = work.claim(draining=False)
    record = ClaimRecord(
        run=rules.run, owner=rules.owner, issued=turn.state.renewed_at,
        shard=claim.shard, epoch=claim.epoch, samples=claim.samples, state=claim.state,
    )  # fmt: skip
    others = [claim for claim in view.claims if claim.record.owner != rules.owner]
    return view.with_claims([*others, LiveClaim(record, turn.state.renewed_at + rules.lease)])


def _follow(turn: NodeTransition, view: ShardView, *, resync: bool) -> None:
    """Stand on the newest acceptance: ours moves us forward, another's fences us, a roll-back takes us along."""
    work, before = turn.work, turn.work.term
    term, epoch, checkpoint = view.stand
    if view.place < (work.term, work.epoch):
        return
    turn.change(term=term)
    if (epoch, checkpoint) == (work.epoch, work.checkpoint):
        return
    if checkpoint and any((c.epoch, c.digest) == (epoch, checkpoint) for c in work.pending):
        own_accepted(turn, epoch, checkpoint)
        return
    if term > before:
        turn.warn(f"shard {work.shard} was rolled back: it goes on from epoch {epoch}, and our work beyond is void")
    elif turn.state.phase == "syncing" and not work.pending:
        turn.info(f"shard {work.shard} moved on to epoch {epoch} meanwhile")
    else:
        turn.warn(f"epoch {epoch} of shard {work.shard} was accepted from another peer; our work on it is void")
    void(turn, min(epoch, work.epoch))
    if turn.state.phase == "draining" or not work.owned:
        release(turn, save=False)
    elif resync and term == before:
        _overtaken(turn)
    elif resync:
        start_sync(turn, work.shard)


def _overtaken(turn: NodeTransition) -> None:
    """Go on from what others did instead: late results of who held the shard before us, who may have had so many pending.

    More than those come from somebody who holds it now, and whose claim looks expired to us: one clock is off by a lease.
    """
    shard, rules, counts = turn.work.shard, turn.rules, turn.state.overtaken
    times = counts.get(shard, 0) + 1
    turn.set(overtaken={**counts, shard: times % (rules.max_pending + 1)})
    if times <= rules.max_pending:
        start_sync(turn, shard)
        return
    why = "others work on it too, and their claims look expired here; is this machine's clock right?"
    give_up(turn, why, save=False, seconds=rules.lease)


def void(turn: NodeTransition, epoch: int) -> None:
    """Stop the trainer and drop all work beyond accepted `epoch`."""
    if turn.work.trainer == "on":
        turn.do(StopTrainer(save=False))
    turn.set(remembered=turn.state.remembered - {turn.work.shard})
    turn.change(trainer="off", pending=(), offering=None)
    turn.do(DiscardWork(turn.work.shard, epoch))


def own_accepted(turn: NodeTransition, epoch: int, digest: str) -> None:
    work, now = turn.work, turn.now
    rest = tuple(candidate for candidate in work.pending if candidate.epoch > epoch)
    turn.change(epoch=epoch, checkpoint=digest, pending=rest, offering=None, offers=0, unjudged=0, offer_at=now)
    turn.set(rejections={**turn.state.rejections, work.shard: 0}, overtaken={**turn.state.overtaken, work.shard: 0})
    turn.info(f"epoch {epoch} of shard {work.shard} was accepted")
    turn.do(CheckpointsSuperseded(work.shard, epoch))
