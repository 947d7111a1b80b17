"""The node's decisions: `advance(rules, state, event) -> (state, actions)`. No clock, socket or randomness of its own.

Phases: joining → probing → idle ⇄ claiming → syncing → training ⇄ publishing, and paused, draining, left. A node

1. looks at the swarm and picks the free shard that fits best, ties by its own rendezvous hash (`protocol.claims`);
2. waits its takeover delay, looks again, claims, waits one propagation delay, looks again, and yields if it lost;
3. syncs the shard and its accepted state, trains, and offers its checkpoints one after another while it trains on;
4. gives its own work up when somebody else's epoch was accepted (fenced), or when the shard has another rightful owner;
5. holds no lease while it is paused, stuck on a full disk or gone.
"""

from __future__ import annotations

from lutetia.node.machine.claiming import go_on_claiming, look_around, swarm_seen, take_duty
from lutetia.node.machine.lease import release, shard_synced, sync_failed
from lutetia.node.machine.messages import (
    Action,
    CheckpointReady,
    Claim,
    ClockTick,
    DiskFree,
    DiskFull,
    Event,
    HoursChanged,
    Joined,
    Leave,
    LookAtShards,
    ManifestChanged,
    NetworkBack,
    NetworkLost,
    OfferAnswered,
    Probed,
    ProbeFailed,
    ProbeHardware,
    PublishClaim,
    RenewRecords,
    SwarmSeen,
    SyncDone,
    SyncFailed,
    TrainerExited,
    TrainerProgress,
    UserVerb,
    WatchedShardsSet,
)
from lutetia.node.machine.state import MachineState, NodeRules, wants_trainer
from lutetia.node.machine.submission import answered
from lutetia.node.machine.training import checkpoint_ready, manifest_changed, trainer_exited, trainer_progress, work_on
from lutetia.node.machine.transition import NodeTransition


def advance(rules: NodeRules, state: MachineState, event: Event) -> tuple[MachineState, list[Action]]:
    """The whole machine. Deterministic: equal arguments, equal results."""
    if state.phase == "left":
        return state, []
    turn = NodeTransition(rules, state, event.now)
    if state.work and event.now - state.last > 2 * rules.heartbeat:
        turn.change(progress_at=event.now)  # the box slept, and its trainer with it
    if event.now < state.last:
        _clock_went_back(turn)
    turn.set(last=event.now)
    _absorb(turn, event)
    if turn.state.phase not in ("joining", "left"):
        _act(turn)
    return turn.state, turn.actions


def _clock_went_back(turn: NodeTransition) -> None:
    """Nothing that was due soon may now be due in hours."""
    state, soon = turn.state, turn.now + turn.rules.heartbeat
    turn.set(
        renew_at=min(state.renew_at, soon), renewed_at=min(state.renewed_at, turn.now), look_at=min(state.look_at, soon),
        act_at=min(state.act_at, soon), looked={},
    )  # fmt: skip
    if work := turn.state.work:
        turn.change(
            progress_at=min(work.progress_at, turn.now), restart_at=min(work.restart_at, soon), offer_at=min(work.offer_at, soon),
            sync_at=None if work.sync_at is None else min(work.sync_at, soon),
        )  # fmt: skip


def _absorb(turn: NodeTransition, event: Event) -> None:
    """Take the event's facts in."""
    match event:
        case ClockTick():
            pass
        case SwarmSeen(views=views):
            swarm_seen(turn, views)
        case WatchedShardsSet(shards=shards, until=until):
            take_duty(turn, shards, until)
        case TrainerProgress():
            trainer_progress(turn, event)
        case CheckpointReady():
            checkpoint_ready(turn, event)
        case OfferAnswered():
            answered(turn, event)
        case TrainerExited():
            if trainer_exited(turn, event) == "hardware" and turn.state.phase != "draining":
                _probe(turn, "the device failed; probing again")
        case SyncDone():
            shard_synced(turn, event)
        case SyncFailed():
            sync_failed(turn, event)
        case UserVerb():
            _wish(turn, event)
        case Joined():
            turn.set(online=True)
            _probe(turn, "finding out what this box can do")
        case NetworkLost():
            turn.set(online=False)
            turn.warn("the network side is down; training goes on while it is rebuilt")
        case NetworkBack():
            turn.set(online=True, renew_at=turn.now, look_at=turn.now)
            turn.info("the network side is back")
        case Probed(fitness=fitness):
            _probed(turn, dict(fitness))
        case ProbeFailed(reason=reason):
            failures = turn.state.probe_failures + 1
            turn.set(
                probe_failures=failures,
                probe_at=turn.now + min(turn.rules.probe_again, turn.rules.backoff(failures + 2, "probe")),
            )
            turn.warn(f"probing the hardware failed: {reason}; trying again")
        case DiskFull(text=text):
            turn.disk_full(text)
        case ManifestChanged(version=version, training=training):
            turn.info(f"the run goes on under version {version} of its manifest")
            turn.set(look_at=turn.now, renew_at=turn.now)
            manifest_changed(turn, training)
        case HoursChanged(closed_until=closed_until):
            _hours(turn, closed_until)
        case DiskFree():
            if turn.state.disk_full_since is not None:
                turn.set(disk_full_since=None, disk_freed=(turn.state.disk_full_since, turn.now), look_at=turn.now)
                turn.info("the disk has space again; going on")


def _act(turn: NodeTransition) -> None:
    """Do what is due now."""
    state, now = turn.state, turn.now
    if state.probe_at is not None and now >= state.probe_at:
        turn.set(probe_at=None)
        turn.do(ProbeHardware())
    if state.pause_until is not None and now >= state.pause_until:
        turn.set(wanted="run", pause_until=None)
        if state.closed_until is None:
            _resume(turn)
        else:
            _pause(turn)
    if turn.state.work:
        work_on(turn)
    if turn.state.phase == "draining":
        _drain(turn)
    if turn.state.phase == "idle":
        look_around(turn)
    if turn.state.phase == "claiming":
        go_on_claiming(turn)
    if turn.state.phase != "left" and now >= turn.state.renew_at:
        turn.set(renew_at=now + turn.rules.heartbeat)
        if turn.state.online:
            _heartbeat(turn)


# --- hardware -------------------------------------------------------------------------------------------------------------


def _probe(turn: NodeTransition, why: str) -> None:
    turn.enter("probing", why)
    turn.do(ProbeHardware())


def _probed(turn: NodeTransition, fitness: dict[int, float]) -> None:
    turn.set(fitness=fitness, probe_failures=0)
    fits = any(value > 0 for value in fitness.values())
    turn.set(probe_at=None if fits else turn.now + turn.rules.probe_again)
    turn.set(look_at=turn.now)
    if turn.state.phase != "probing":
        return
    if turn.state.wanted == "pause" or turn.state.closed_until is not None:
        turn.enter("paused", _why_paused(turn))
    else:
        turn.enter("idle", "looking for a shard" if fits else "no device of this box fits the run; probing again now and then")


# --- heartbeat ------------------------------------------------------------------------------------------------------------


def _heartbeat(turn: NodeTransition) -> None:
    """Renew our records; a lease that may have lapsed (a sleeping laptop, a lost network) is looked at before it is renewed."""
    state, rules, now = turn.state, turn.rules, turn.now
    work = state.work
    if not work or not work.owned:
        turn.do(RenewRecords(None))
        return
    stuck = state.disk_full_since is not None and now - state.disk_full_since > rules.stuck_after
    lapsed = work.checking or now - state.renewed_at >= rules.lease
    if stuck or lapsed:
        turn.change(checking=True)
        turn.do(RenewRecords(None))
    else:
        turn.set(renewed_at=now)
        turn.do(RenewRecords(work.claim(state.phase == "draining")))
    if not stuck:
        turn.do(LookAtShards((work.shard,)))


# --- the volunteer's wishes -----------------------------------------------------------------------------------------------


def _wish(turn: NodeTransition, event: UserVerb) -> None:
    turn.set(wanted="run" if event.verb == "resume" else event.verb, pause_until=event.until if event.verb == "pause" else None)
    phase = turn.state.phase
    busy = phase in ("training", "publishing", "draining") or (turn.state.work is not None and bool(turn.state.work.pending))
    if event.verb == "leave" or (event.verb == "finish" and not busy):
        _leave(turn, "leaving as asked")
    elif event.verb == "finish" and phase in ("training", "publishing", "paused"):
        turn.set(drain_until=None)
        what = "waiting for the verdict on the last checkpoint" if phase == "paused" else "finishing the current checkpoint"
        turn.enter("draining", f"{what} before leaving")
    elif event.verb == "pause" and phase not in ("joining", "probing"):
        _pause(turn)
    elif event.verb == "resume":
        turn.set(closed_until=None)
        _resume(turn)


def _resume(turn: NodeTransition) -> None:
    turn.set(drain_until=None)
    if turn.state.phase == "paused" or (turn.state.work and not turn.state.work.owned):
        turn.set(work=None, look_at=turn.now)
        turn.enter("idle", "resumed; looking for a shard")
    elif turn.state.phase == "draining":
        turn.enter("training", "finishing was called off")


def _hours(turn: NodeTransition, closed_until: float | None) -> None:
    """The clock's wish, which gives way to the volunteer's: who paused stays paused, who leaves leaves."""
    turn.set(closed_until=closed_until)
    if turn.state.wanted != "run" or turn.state.phase in ("joining", "probing"):
        return
    if closed_until is not None:
        _pause(turn)
    elif turn.state.phase == "paused":
        _resume(turn)


def _why_paused(turn: NodeTransition) -> str:
    if turn.state.wanted != "pause":
        return "outside of its hours"
    until = turn.state.pause_until
    return "paused by the volunteer" if until is None else f"paused for {until - turn.now:.0f} s by the volunteer"


def _pause(turn: NodeTransition) -> None:
    """Stop training and let the lease go; checkpoints that are whole are still offered."""
    work = turn.state.work
    release(turn, save=True)
    if work and work.pending:
        turn.set(work=work)
        turn.change(owned=False, trainer="off", waiting=False, failure=None)
    turn.set(target=None, drain_until=None)
    turn.enter("paused", _why_paused(turn))


def _drain(turn: NodeTransition) -> None:
    """Leave once the last checkpoint is accepted, refused, or out of patience, and no failed trainer is to be restarted."""
    state, work = turn.state, turn.state.work
    if work is None:
        _leave(turn, "the shard was let go; leaving")
    elif work.trainer == "on" or wants_trainer(turn.rules, state, work):
        turn.set(drain_until=None)
    elif not work.pending and work.cut_short:
        what = "the checkpoint under way was not finished, what was saved of it stays on this disk"
        _leave(turn, f"the trainer failed ({work.failure}); {what}; leaving")
    elif not work.pending:
        _leave(turn, "the last checkpoint is accepted; leaving")
    elif state.drain_until is None:
        turn.set(drain_until=turn.now + max(turn.rules.patience, turn.rules.lease))
        turn.because("waiting for the last checkpoint to be accepted")
    elif turn.now >= state.drain_until:
        _leave(turn, "the last checkpoint was not judged in time; it stays on this disk and is offered again next time; leaving")


def _leave(turn: NodeTransition, why: str) -> None:
    if turn.state.phase == "claiming" and turn.state.stage in ("settle", "judge") and turn.state.target is not None:
        turn.do(PublishClaim(Claim(turn.state.target, 0, 0, "released")))
    release(turn, save=True)
    turn.set(target=None, pause_until=None, drain_until=None)
    turn.enter("left", why)
    turn.do(RenewRecords(None))
    turn.do(Leave())
