"""Decisions while a shard is trained: start, restart and stop the trainer, take its checkpoints, offer them when due."""

from __future__ import annotations

from lutetia.node.machine.commands import hand_back
from lutetia.node.machine.lease import give_up, release, start_sync, to_idle
from lutetia.node.machine.messages import (
    AllowEpochs,
    CheckpointReady,
    DiscardWork,
    Exit,
    LookAtShards,
    ManifestChanged,
    PublishCheckpoint,
    StartTrainer,
    StopTrainer,
    Sync,
    TrainerExited,
    TrainerProgress,
)
from lutetia.node.machine.state import wants_trainer
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.claims import slot_name
from lutetia.protocol.schema.owner.orders import because

_WAITS = "training waits until one is accepted"
_GATHERED = "training goes on with the merged epoch"
_PAUSED = "the run is paused by its owner"
_LAST = "the epoch under way and its upload end first"
_HEALTHY = 600.0
"""Seconds. A trainer that ran longer than this resets the count of crashes."""


def trainer_progress(transition: NodeTransition, event: TrainerProgress) -> None:
    work = transition.state.work
    if work and work.trainer == "on" and event.run == transition.state.trainers_started:
        transition.set_work(trainer_epoch=event.epoch, samples=event.samples, waiting=event.waiting, progress_at=transition.now)


def checkpoint_ready(transition: NodeTransition, event: CheckpointReady) -> None:
    """A stopped trainer may still finish writing: its checkpoint counts if it continues our lineage."""
    work, candidate = transition.state.work, event.candidate
    if not work or candidate.shard != work.shard or candidate.epoch != work.newest + 1:
        return
    if candidate.parent != (work.pending[-1].digest if work.pending else work.checkpoint):
        return
    transition.set_work(pending=(*work.pending, candidate), crashes=0, progress_at=transition.now)
    if not work.pending:
        transition.set_work(offer_at=transition.now)


def trainer_exited(transition: NodeTransition, event: TrainerExited) -> Exit | None:
    """Restart with back-off, fetch again, or give up. Returns the reason if it was the current trainer."""
    state, work = transition.state, transition.state.work
    if not work or work.trainer != "on" or event.run != state.trainers_started:
        return None
    transition.set_work(trainer="off", waiting=False)
    if event.reason == "stopped":
        transition.set_work(restart_at=transition.now)
        return event.reason
    _trainer_failed(transition, event.reason, event.text or event.reason)
    return event.reason


def _trainer_failed(transition: NodeTransition, reason: Exit, text: str) -> None:
    transition.set_work(failure=text)
    work, rules, now = transition.work, transition.rules, transition.now
    if reason == "disk-full":  # it is restarted when the disk has space
        transition.set_work(restart_at=now)
        transition.disk_full(text)
        return
    crashes = 1 if now - work.started_at > _HEALTHY else work.crashes + 1
    halvings = work.halvings + (reason == "out-of-memory")
    wait = rules.backoff(crashes, "crash", work.shard)
    transition.set_work(trainer="off", waiting=False, crashes=crashes, halvings=halvings, restart_at=now + wait)
    if reason == "bad-shard":
        give_up(transition, text, save=False, seconds=10 * rules.lease)
    elif reason == "hardware":
        transition.warn(f"the trainer lost its device: {text}")
        release(transition, save=True)
    elif crashes > rules.crash_limit:
        give_up(transition, f"the trainer failed {crashes} times in a row, last: {text}", save=True, seconds=10 * rules.lease)
    elif reason == "bad-state":
        leaving = transition.state.phase == "draining"
        then = "it cannot be offered" if leaving else "starting from the accepted state"
        transition.warn(f"the local state of {slot_name(work.shard)} is unusable: {text}; {then}")
        transition.do(DiscardWork(work.shard, None))
        if leaving:
            release(transition, save=False)
        else:
            start_sync(transition, work.shard, work.stand)
            transition.set_work(crashes=crashes)
    else:
        transition.warn(f"the trainer failed ({text}); it restarts from its last local checkpoint in {wait:.1f} s")


def manifest_changed(transition: NodeTransition, event: ManifestChanged) -> None:
    """A running trainer ends its epoch under the old manifest. If the training changed, a new trainer takes the next epoch.

    Refusals of earlier versions count no more, and no shard is avoided for them: the new rules may be the owner's remedy.
    """
    transition.set(rejections={}, avoided_until={})
    work = transition.state.work
    if work and event.training and work.trainer == "on":
        transition.set_work(handover_epoch=work.trainer_epoch if work.waiting else work.trainer_epoch + 1)
    if event.resumed:  # what waited is offered at once, and no claim counts as idle for the pause
        transition.set(claim_histories={}, looked_at={})
        if work:
            transition.set_work(offer_at=transition.now, pause_epoch=None)
    if work and transition.state.phase == "publishing" and work.may_train(transition.rules):
        transition.enter("training", f"the epoch budget was raised: training {slot_name(work.shard)} further")


def _until(transition: NodeTransition) -> int:
    """The last epoch that the trainer may train. A draining node ends the current epoch and starts no other."""
    work = transition.work
    most = work.epoch_limit(transition.rules)
    if work.handover_epoch is not None and work.trainer == "on":
        most = min(most, work.handover_epoch)
    held = transition.rules.paused is not None or transition.state.bytes_until is not None
    if not held and work.pause_epoch is not None:
        transition.set_work(pause_epoch=None)
    if held and work.trainer == "on":
        if work.pause_epoch is None:
            transition.set_work(pause_epoch=work.trainer_epoch if work.waiting else work.trainer_epoch + 1)
        most = min(most, transition.work.pause_epoch or 0)
    if transition.state.phase != "draining":
        if work.drain_epoch is not None:  # finish was cancelled
            transition.set_work(drain_epoch=None)
        return most
    if work.drain_epoch is None:
        transition.set_work(drain_epoch=work.trainer_epoch if work.waiting else work.trainer_epoch + 1)
    return min(most, transition.work.drain_epoch or 0)


def _supervise_trainer(transition: NodeTransition) -> None:
    """Start, hold, restart or stop the trainer, as its limits require."""
    state, rules, now = transition.state, transition.rules, transition.now
    until = _until(transition)
    work = transition.work
    if work.trainer == "on":
        if until != work.until:
            progress_at = now if work.has_reported else work.progress_at
            transition.set_work(until=until, progress_at=progress_at, waiting=work.waiting and until <= work.trainer_epoch)
            transition.do(AllowEpochs(until))
        _end_trainer_when_due(transition, until)
        if transition.work.trainer == "on" and _silent(transition):
            transition.do(StopTrainer(save=False))
            _trainer_failed(transition, "crash", f"no report for {now - transition.work.progress_at:.0f} s")
    elif wants_trainer(rules, transition.state, work) and now >= work.restart_at:
        number = state.trainers_started + 1
        transition.set(trainers_started=number)
        transition.set_work(
            trainer="on", trainer_epoch=work.newest, until=until, handover_epoch=None, waiting=False, failure=None
        )
        transition.set_work(progress_at=now, started_at=now)
        transition.do(StartTrainer(number, work.shard, work.epoch, work.checkpoint, until, work.halvings))


def _silent(transition: NodeTransition) -> bool:
    """Whether the trainer hangs: it does not wait for anything and does not report."""
    waits = transition.work.waiting or transition.state.disk_full_since is not None
    return not waits and transition.now >= transition.work.hung_at(transition.rules)


def _end_trainer_when_due(transition: NodeTransition, until: int) -> None:
    work, state = transition.work, transition.state
    whole = work.newest >= until  # all epochs that it may train are written
    if whole and (state.phase == "draining" or until >= transition.rules.epochs or work.handover_epoch is not None):
        transition.do(StopTrainer(save=False))
        transition.set_work(trainer="off", waiting=False, restart_at=transition.now)


def continue_work(transition: NodeTransition) -> None:
    """Carry out what is due for the held shard."""
    state, now = transition.state, transition.now
    _explain_waiting(transition)
    if state.phase == "syncing" and transition.work.sync_at is not None and now >= transition.work.sync_at:
        transition.set_work(sync_at=None)
        transition.do(Sync(transition.work.shard, transition.work.epoch, transition.work.checkpoint))
    if state.phase in ("training", "draining"):
        _supervise_trainer(transition)
    work = transition.state.work
    if work and work.pending and work.offering is None and state.online and state.may_offer and now >= work.offer_at:
        transition.set_work(offering=work.pending[0].digest)
        transition.do(PublishCheckpoint(work.pending[0]))
    work = transition.state.work
    if work and work.gathered and state.online and now >= work.merge_look_at:
        transition.set_work(merge_look_at=now + transition.rules.merge_look)
        transition.do(LookAtShards((work.shard,)))
    if transition.state.phase in ("training", "publishing") and transition.state.work:
        _finish_shard(transition)
    _hand_back_when_spent(transition)


def _hand_back_when_spent(transition: NodeTransition) -> None:
    """Release the shard once the last epoch that the cap on bytes allows is trained and judged."""
    state, work = transition.state, transition.state.work
    if state.bytes_until is None or state.phase != "training" or work is None or work.pending:
        return
    if work.trainer == "off" or work.waiting:
        hand_back(transition)


def _explain_waiting(transition: NodeTransition) -> None:
    """Say why the trainer waits, in the node's status, and that it goes on."""
    work, paused = transition.work, transition.rules.paused
    if transition.state.phase != "training" or work.newest >= transition.rules.epochs:
        return
    if paused is not None:
        ends = "after this epoch" if work.trainer == "on" and not work.waiting else "until it goes on"
        transition.explain(f"{_PAUSED}{because(paused)}; training waits {ends}")
        return
    if transition.state.bytes_until is not None:
        transition.explain(f"{transition.state.bytes_why}; {_LAST}")
        return
    waits = work.trainer == "on" and work.waiting and not work.may_train(transition.rules)
    if waits and work.gathered:
        transition.explain(f"its result of {slot_name(work.shard)} is accepted and waits for the merge of the lanes; {_GATHERED}")
    elif waits:
        who = "no coordinator answers" if work.ahead else "the coordinator has not judged them"
        transition.explain(f"{len(work.pending)} checkpoints wait for acceptance, and {who}; {_WAITS}")
    elif transition.state.why.endswith((_WAITS, _GATHERED, _LAST)) or transition.state.why.startswith(_PAUSED):
        transition.explain(f"training {slot_name(work.shard)} from epoch {work.newest}")


def _finish_shard(transition: NodeTransition) -> None:
    """After the shard's last epoch: wait for its acceptance, then look for another shard."""
    work, epochs = transition.work, transition.rules.epochs
    if work.epoch >= epochs:
        transition.do(DiscardWork(work.shard, work.epoch))
        to_idle(transition, f"{slot_name(work.shard)} is done", save=False)
    elif work.newest >= epochs and work.trainer == "off" and transition.state.phase == "training":
        transition.enter("publishing", f"{slot_name(work.shard)} is trained; waiting for its last checkpoints to be accepted")
