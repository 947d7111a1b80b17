"""The part of the state machine that holds a shard: sync, trainer, checkpoints, offers, fencing and giving up."""

from __future__ import annotations

from ..protocol.claims import LiveClaim, ShardView, Stand, shard_owner
from ..protocol.records import ClaimRecord
from .messages import (
    AllowEpochs,
    CheckpointReady,
    Claim,
    DiscardWork,
    Exit,
    Look,
    OfferAnswered,
    PublishCheckpoint,
    PublishClaim,
    StartTrainer,
    StopTrainer,
    Superseded,
    Sync,
    SyncDone,
    SyncFailed,
    TrainerExited,
    TrainerProgress,
)
from .state import Work
from .turn import Turn

_HEALTHY = 600.0
"""A trainer that has run this long starts a new count of crashes."""


# --- taking a shard up, and letting it go ---------------------------------------------------------------------------------


def start_sync(turn: Turn, shard: int, known: Stand = (0, 0, None)) -> None:
    """The shard is ours: fetch its data and the accepted state. `known`: an acceptance that the DHT may not show yet."""
    view = turn.state.views.get(shard) or ShardView(shard)
    term, epoch, checkpoint = known if known[:2] >= view.place else view.stand
    turn.set(work=Work(shard, epoch, checkpoint, term=term, at=epoch), renew_at=turn.now)
    turn.enter("syncing", f"fetching shard {shard} at epoch {epoch}")
    turn.do(Sync(shard, epoch, checkpoint))


def release(turn: Turn, *, save: bool) -> None:
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


def _give_up(turn: Turn, why: str, *, save: bool, seconds: float) -> None:
    """Let the shard go and leave it alone for a while."""
    turn.set(shunned={**turn.state.shunned, turn.work.shard: turn.now + seconds})
    turn.warn(f"giving shard {turn.work.shard} up: {why}")
    _to_idle(turn, why, save=save)


def _to_idle(turn: Turn, why: str, *, save: bool) -> None:
    leaving = turn.state.phase == "draining"
    release(turn, save=save)
    turn.set(look_at=turn.now)
    if not leaving:  # a draining node without work leaves by itself
        turn.enter("idle", why)


# --- syncing --------------------------------------------------------------------------------------------------------------


def shard_synced(turn: Turn, event: SyncDone) -> None:
    work = turn.state.work
    if turn.state.phase != "syncing" or not work:
        return
    if (work.shard, work.epoch, work.checkpoint) != (event.shard, event.epoch, event.checkpoint):
        return  # the answer to an older wish
    turn.change(pending=event.pending, sync_failures=0, sync_at=None, restart_at=turn.now, offer_at=turn.now)
    turn.set(remembered=turn.state.remembered | {event.shard})
    turn.enter("training", f"training shard {event.shard}, begun on top of epoch {turn.work.newest}")


def sync_failed(turn: Turn, event: SyncFailed) -> None:
    work = turn.state.work
    if turn.state.phase != "syncing" or not work or work.shard != event.shard:
        return
    failures = work.sync_failures + 1
    turn.warn(f"could not fetch shard {event.shard}: {event.reason}")
    if failures >= turn.rules.crash_limit:
        _give_up(turn, f"fetching failed {failures} times", save=True, seconds=turn.rules.lease)
    else:
        turn.change(sync_failures=failures, sync_at=turn.now + turn.rules.backoff(failures, "sync", event.shard))
        turn.because(f"fetching again soon: {event.reason}")


# --- what the swarm shows of our shard ------------------------------------------------------------------------------------


def own_shard_seen(turn: Turn) -> None:
    """Yield to a rightful owner; then follow the accepted lineage."""
    state, rules, now, work = turn.state, turn.rules, turn.now, turn.work
    view = state.views[work.shard]
    others = any(claim.record.owner != rules.owner for claim in view.live(now))
    if work.owned and others:
        lapsed = work.checking or now - state.renewed_at >= rules.lease
        owner = None if lapsed else shard_owner(rules.run, _with_own_claim(turn, view), now)
        if owner != rules.owner:
            _follow(turn, view, resync=False)
            if turn.state.work:
                _to_idle(turn, f"shard {work.shard} has another owner", save=work.shard in turn.state.remembered)
            return
    if work.checking and state.disk_full_since is None:  # the shard is still free: take it up again
        turn.change(checking=False)
        turn.set(renewed_at=now, renew_at=now)
    _follow(turn, view, resync=True)


def _with_own_claim(turn: Turn, view: ShardView) -> ShardView:
    """A replica may lag behind our own renewals; we know that our claim lives."""
    rules, work = turn.rules, turn.work
    claim = work.claim(draining=False)
    record = ClaimRecord(
        run=rules.run, owner=rules.owner, issued=turn.state.renewed_at,
        shard=claim.shard, epoch=claim.epoch, samples=claim.samples, state=claim.state,
    )  # fmt: skip
    others = [claim for claim in view.claims if claim.record.owner != rules.owner]
    return view.with_claims([*others, LiveClaim(record, turn.state.renewed_at + rules.lease)])


def _follow(turn: Turn, view: ShardView, *, resync: bool) -> None:
    """Stand on the newest acceptance: ours moves us forward, another's fences us, a roll-back takes us along."""
    work, before = turn.work, turn.work.term
    term, epoch, checkpoint = view.stand
    if view.place < (work.term, work.epoch):
        return
    turn.change(term=term)
    if (epoch, checkpoint) == (work.epoch, work.checkpoint):
        return
    if checkpoint and any((c.epoch, c.digest) == (epoch, checkpoint) for c in work.pending):
        _accepted(turn, epoch, checkpoint)
        return
    if term > before:
        turn.warn(f"shard {work.shard} was rolled back: it goes on from epoch {epoch}, and our work beyond is void")
    elif turn.state.phase == "syncing" and not work.pending:
        turn.info(f"shard {work.shard} moved on to epoch {epoch} meanwhile")
    else:
        turn.warn(f"epoch {epoch} of shard {work.shard} was accepted from another peer; our work on it is void")
    _void(turn, min(epoch, work.epoch))
    if turn.state.phase == "draining" or not work.owned:
        release(turn, save=False)
    elif resync and term == before:
        _overtaken(turn)
    elif resync:
        start_sync(turn, work.shard)


def _overtaken(turn: Turn) -> None:
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
    _give_up(turn, why, save=False, seconds=rules.lease)


def _void(turn: Turn, epoch: int) -> None:
    """Stop the trainer and drop all work beyond accepted `epoch`."""
    if turn.work.trainer == "on":
        turn.do(StopTrainer(save=False))
    turn.set(remembered=turn.state.remembered - {turn.work.shard})
    turn.change(trainer="off", pending=(), offering=None)
    turn.do(DiscardWork(turn.work.shard, epoch))


def _accepted(turn: Turn, epoch: int, digest: str) -> None:
    work, now = turn.work, turn.now
    rest = tuple(candidate for candidate in work.pending if candidate.epoch > epoch)
    turn.change(epoch=epoch, checkpoint=digest, pending=rest, offering=None, offers=0, offer_at=now)
    turn.set(rejections={**turn.state.rejections, work.shard: 0}, overtaken={**turn.state.overtaken, work.shard: 0})
    turn.info(f"epoch {epoch} of shard {work.shard} was accepted")
    turn.do(Superseded(work.shard, epoch))


# --- the trainer ----------------------------------------------------------------------------------------------------------


def trainer_progress(turn: Turn, event: TrainerProgress) -> None:
    work = turn.state.work
    if work and work.trainer == "on" and event.run == turn.state.trainers:
        turn.change(at=event.epoch, samples=event.samples, waiting=event.waiting, progress_at=turn.now)


def checkpoint_ready(turn: Turn, event: CheckpointReady) -> None:
    """A trainer that was stopped may still finish writing: what it wrote counts while it fits our lineage."""
    work, candidate = turn.state.work, event.candidate
    if not work or candidate.shard != work.shard or candidate.epoch != work.newest + 1:
        return
    if candidate.parent != (work.pending[-1].digest if work.pending else work.checkpoint):
        return
    turn.change(pending=(*work.pending, candidate), crashes=0, progress_at=turn.now)
    if not work.pending:
        turn.change(offer_at=turn.now)


def trainer_exited(turn: Turn, event: TrainerExited) -> Exit | None:
    """Back off and restart, sync again, or give up. Returns the reason if this trainer was in our hands."""
    state, work = turn.state, turn.state.work
    if not work or work.trainer != "on" or event.run != state.trainers:
        return None
    turn.change(trainer="off", waiting=False)
    if event.reason == "stopped":
        turn.change(restart_at=turn.now)
        return event.reason
    _trainer_failed(turn, event.reason, event.text or event.reason)
    return event.reason


def _trainer_failed(turn: Turn, reason: Exit, text: str) -> None:
    work, rules, now = turn.work, turn.rules, turn.now
    if reason == "disk-full":  # it starts again when there is space
        turn.change(restart_at=now)
        turn.disk_full(text)
        return
    crashes = 1 if now - work.started_at > _HEALTHY else work.crashes + 1
    shrink = work.shrink + (reason == "out-of-memory")
    wait = rules.backoff(crashes, "crash", work.shard)
    turn.change(trainer="off", waiting=False, crashes=crashes, shrink=shrink, restart_at=now + wait)
    if reason == "bad-shard":
        _give_up(turn, text, save=False, seconds=10 * rules.lease)
    elif reason == "hardware":
        turn.warn(f"the trainer lost its device: {text}")
        release(turn, save=True)
    elif crashes > rules.crash_limit:
        _give_up(turn, f"the trainer failed {crashes} times in a row, last: {text}", save=True, seconds=10 * rules.lease)
    elif reason == "bad-state":
        turn.warn(f"the local state of shard {work.shard} cannot be used: {text}; starting from the accepted one")
        turn.do(DiscardWork(work.shard, None))
        start_sync(turn, work.shard, work.stand)
        turn.change(crashes=crashes)
    else:
        turn.warn(f"the trainer failed ({text}); restarting it from its last local checkpoint in {wait:.1f} s")


def manifest_changed(turn: Turn, training: bool) -> None:
    """A trainer at work ends its epoch as it began it; where the new version changes training, another takes the next one."""
    work = turn.state.work
    if work and training and work.trainer == "on":
        turn.change(relay=work.at if work.waiting else work.at + 1)
    if work and turn.state.phase == "publishing" and work.may_train(turn.rules):
        turn.enter("training", f"the budget was raised: training shard {work.shard} on")


def _until(turn: Turn) -> int:
    """The epoch below which the trainer may work. A leaving node ends the epoch under way, and no other."""
    work = turn.work
    most = work.most(turn.rules)
    if work.relay is not None and work.trainer == "on":
        most = min(most, work.relay)
    if turn.state.phase != "draining":
        if work.drain is not None:  # called off
            turn.change(drain=None)
        return most
    if work.drain is None:
        turn.change(drain=work.at if work.waiting else work.at + 1)
    return min(most, turn.work.drain or 0)


def _train_on(turn: Turn) -> None:
    """Start, hold, restart or end the trainer as the lineage asks."""
    state, rules, now = turn.state, turn.rules, turn.now
    until = _until(turn)
    work = turn.work
    if work.trainer == "on":
        if until != work.until:
            heard = now if work.begun else work.progress_at
            turn.change(until=until, progress_at=heard, waiting=work.waiting and until <= work.at)
            turn.do(AllowEpochs(until))
        _end_trainer_when_due(turn, until)
        if turn.work.trainer == "on" and _silent(turn):
            turn.do(StopTrainer(save=False))
            _trainer_failed(turn, "crash", f"no sign of life for {now - turn.work.progress_at:.0f} s")
    elif state.phase == "training" and work.may_train(rules) and state.disk_full_since is None and now >= work.restart_at:
        number = state.trainers + 1
        turn.set(trainers=number)
        turn.change(trainer="on", at=work.newest, until=until, relay=None, waiting=False, progress_at=now, started_at=now)
        turn.do(StartTrainer(number, work.shard, work.epoch, work.checkpoint, until, work.shrink))


def _silent(turn: Turn) -> bool:
    """Whether the trainer hangs: it has nothing to wait for, and says nothing."""
    waits = turn.work.waiting or turn.state.disk_full_since is not None
    return not waits and turn.now >= turn.work.silent_from(turn.rules)


def _end_trainer_when_due(turn: Turn, until: int) -> None:
    work, state = turn.work, turn.state
    whole = work.newest >= until  # all that it may do is written
    if whole and (state.phase == "draining" or until >= turn.rules.epochs or work.relay is not None):
        turn.do(StopTrainer(save=False))
        turn.change(trainer="off", waiting=False, restart_at=turn.now)


# --- offers ---------------------------------------------------------------------------------------------------------------


def answered(turn: Turn, event: OfferAnswered) -> None:
    work, rules = turn.state.work, turn.rules
    if not work or not work.pending or work.pending[0].digest != event.digest:
        return
    head, offers = work.pending[0], work.offers + 1
    turn.change(offering=None, offers=offers)
    jitter = 1 + rules.jitter("offer", event.digest, offers) / 4
    match event.verdict:
        case "accepted":
            _accepted(turn, head.epoch, head.digest)
            turn.do(Look((work.shard,)))
        case "invalid":
            _rejected(turn, event.text)
        case "quarantined":
            _void(turn, work.epoch)
            long = 10 * rules.lease
            turn.set(shunned=dict.fromkeys(range(rules.shards), turn.now + long))
            _give_up(turn, event.text, save=False, seconds=long)
        case "superseded":
            turn.change(offer_at=turn.now + rules.heartbeat * jitter)
            turn.do(Look((work.shard,)))
        case "queued":
            wait = event.retry_after or min(rules.heartbeat, rules.propagation * 1.5**offers)
            turn.change(offer_at=turn.now + wait * jitter)
        case "busy":
            turn.change(offer_at=turn.now + (event.retry_after or rules.heartbeat) * jitter)
        case "inconclusive" | "unreachable":
            turn.change(offer_at=turn.now + (event.retry_after or rules.backoff(offers, "offer", event.digest)))
            if event.verdict == "inconclusive" or offers == 1:
                turn.warn(f"the checkpoint of epoch {head.epoch} was not judged: {event.text}; offering it again")


def _rejected(turn: Turn, text: str) -> None:
    """Train the epoch again from the accepted state; a second refusal in a row means that we cannot do this shard."""
    work, rules = turn.work, turn.rules
    head, count = work.pending[0], turn.state.rejections.get(work.shard, 0) + 1
    turn.set(rejections={**turn.state.rejections, work.shard: count})
    turn.warn(f"the checkpoint of epoch {head.epoch} of shard {work.shard} was refused: {text}")
    _void(turn, work.epoch)
    if count >= rules.rejection_limit:
        _give_up(turn, f"{count} checkpoints in a row were refused, last: {text}", save=False, seconds=10 * rules.lease)
    elif turn.state.phase == "draining" or not work.owned:
        release(turn, save=False)
    else:
        start_sync(turn, work.shard, work.stand)


def work_on(turn: Turn) -> None:
    """What is due for the shard in our hands."""
    state, now = turn.state, turn.now
    if state.phase == "syncing" and turn.work.sync_at is not None and now >= turn.work.sync_at:
        turn.change(sync_at=None)
        turn.do(Sync(turn.work.shard, turn.work.epoch, turn.work.checkpoint))
    if state.phase in ("training", "draining"):
        _train_on(turn)
    work = turn.state.work
    if work and work.pending and work.offering is None and state.online and now >= work.offer_at:
        turn.change(offering=work.pending[0].digest)
        turn.do(PublishCheckpoint(work.pending[0]))
    if turn.state.phase in ("training", "publishing") and turn.state.work:
        _budget(turn)


def _budget(turn: Turn) -> None:
    """The shard's last epoch: wait for its acceptance, then look for other work."""
    work, epochs = turn.work, turn.rules.epochs
    if work.epoch >= epochs:
        turn.do(DiscardWork(work.shard, work.epoch))
        _to_idle(turn, f"shard {work.shard} is done", save=False)
    elif work.newest >= epochs and work.trainer == "off" and turn.state.phase == "training":
        turn.enter("publishing", f"shard {work.shard} is trained; waiting for its last checkpoints to be accepted")
