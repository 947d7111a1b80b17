"""The part of the state machine that works on a shard in hand: trainer, checkpoints, offers when due, and their limits."""

from __future__ import annotations

from lutetia.node.machine.lease import give_up, release, start_sync, to_idle
from lutetia.node.machine.messages import (
    AllowEpochs,
    CheckpointReady,
    DiscardWork,
    Exit,
    PublishCheckpoint,
    StartTrainer,
    StopTrainer,
    Sync,
    TrainerExited,
    TrainerProgress,
)
from lutetia.node.machine.state import wants_trainer
from lutetia.node.machine.transition import NodeTransition

_HEALTHY = 600.0
"""A trainer that has run this long starts a new count of crashes."""


def trainer_progress(turn: NodeTransition, event: TrainerProgress) -> None:
    work = turn.state.work
    if work and work.trainer == "on" and event.run == turn.state.trainers:
        turn.change(at=event.epoch, samples=event.samples, waiting=event.waiting, progress_at=turn.now)


def checkpoint_ready(turn: NodeTransition, event: CheckpointReady) -> None:
    """A trainer that was stopped may still finish writing: what it wrote counts while it fits our lineage."""
    work, candidate = turn.state.work, event.candidate
    if not work or candidate.shard != work.shard or candidate.epoch != work.newest + 1:
        return
    if candidate.parent != (work.pending[-1].digest if work.pending else work.checkpoint):
        return
    turn.change(pending=(*work.pending, candidate), crashes=0, progress_at=turn.now)
    if not work.pending:
        turn.change(offer_at=turn.now)


def trainer_exited(turn: NodeTransition, event: TrainerExited) -> Exit | None:
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


def _trainer_failed(turn: NodeTransition, reason: Exit, text: str) -> None:
    turn.change(failure=text)
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
        give_up(turn, text, save=False, seconds=10 * rules.lease)
    elif reason == "hardware":
        turn.warn(f"the trainer lost its device: {text}")
        release(turn, save=True)
    elif crashes > rules.crash_limit:
        give_up(turn, f"the trainer failed {crashes} times in a row, last: {text}", save=True, seconds=10 * rules.lease)
    elif reason == "bad-state":
        leaving = turn.state.phase == "draining"
        then = "it cannot be handed in" if leaving else "starting from the accepted one"
        turn.warn(f"the local state of shard {work.shard} cannot be used: {text}; {then}")
        turn.do(DiscardWork(work.shard, None))
        if leaving:
            release(turn, save=False)
        else:
            start_sync(turn, work.shard, work.stand)
            turn.change(crashes=crashes)
    else:
        turn.warn(f"the trainer failed ({text}); restarting it from its last local checkpoint in {wait:.1f} s")


def manifest_changed(turn: NodeTransition, training: bool) -> None:
    """A trainer at work ends its epoch as it began it; where the new version changes training, another takes the next one."""
    work = turn.state.work
    if work and training and work.trainer == "on":
        turn.change(relay=work.at if work.waiting else work.at + 1)
    if work and turn.state.phase == "publishing" and work.may_train(turn.rules):
        turn.enter("training", f"the budget was raised: training shard {work.shard} on")


def _until(turn: NodeTransition) -> int:
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


def _train_on(turn: NodeTransition) -> None:
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
    elif wants_trainer(rules, turn.state, work) and now >= work.restart_at:
        number = state.trainers + 1
        turn.set(trainers=number)
        turn.change(trainer="on", at=work.newest, until=until, relay=None, waiting=False, failure=None)
        turn.change(progress_at=now, started_at=now)
        turn.do(StartTrainer(number, work.shard, work.epoch, work.checkpoint, until, work.shrink))


def _silent(turn: NodeTransition) -> bool:
    """Whether the trainer hangs: it has nothing to wait for, and says nothing."""
    waits = turn.work.waiting or turn.state.disk_full_since is not None
    return not waits and turn.now >= turn.work.silent_from(turn.rules)


def _end_trainer_when_due(turn: NodeTransition, until: int) -> None:
    work, state = turn.work, turn.state
    whole = work.newest >= until  # all that it may do is written
    if whole and (state.phase == "draining" or until >= turn.rules.epochs or work.relay is not None):
        turn.do(StopTrainer(save=False))
        turn.change(trainer="off", waiting=False, restart_at=turn.now)


def work_on(turn: NodeTransition) -> None:
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


def _budget(turn: NodeTransition) -> None:
    """The shard's last epoch: wait for its acceptance, then look for other work."""
    work, epochs = turn.work, turn.rules.epochs
    if work.epoch >= epochs:
        turn.do(DiscardWork(work.shard, work.epoch))
        to_idle(turn, f"shard {work.shard} is done", save=False)
    elif work.newest >= epochs and work.trainer == "off" and turn.state.phase == "training":
        turn.enter("publishing", f"shard {work.shard} is trained; waiting for its last checkpoints to be accepted")
