"""The node's decisions: `advance(rules, state, event) -> (state, actions)`. It has no clock, socket or randomness.

Phases: joining → probing → idle ⇄ claiming → syncing → training ⇄ publishing, and paused, draining, left. A node

1. looks at the swarm and picks the free shard that fits best; ties go by its own rendezvous hash (`protocol.claims`);
2. waits its takeover delay, looks again, claims, waits one propagation delay, looks again, and yields if it lost;
3. fetches the shard and its accepted state, trains, and offers its checkpoints one after another while it trains on;
4. discards its work when another peer's epoch was accepted (fenced), and releases the shard to a rightful holder;
5. holds no lease while it is paused, blocked by a full disk or gone.
"""

from __future__ import annotations

from lutetia.node.machine.claiming import continue_claiming, look_at_due_shards, set_watched_shards, swarm_seen
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
from lutetia.node.machine.submission import offer_answered
from lutetia.node.machine.training import checkpoint_ready, continue_work, manifest_changed, trainer_exited, trainer_progress
from lutetia.node.machine.transition import NodeTransition


def advance(rules: NodeRules, state: MachineState, event: Event) -> tuple[MachineState, list[Action]]:
    """Decide on one event; returns the new state and the actions to carry out. Equal arguments give equal results."""
    if state.phase == "left":
        return state, []
    transition = NodeTransition(rules, state, event.now)
    if state.work and event.now - state.last_event_at > 2 * rules.heartbeat:
        transition.set_work(progress_at=event.now)  # the machine slept, and so did its trainer
    if event.now < state.last_event_at:
        _clock_went_back(transition)
    transition.set(last_event_at=event.now)
    _take_in(transition, event)
    if transition.state.phase not in ("joining", "left"):
        _act(transition)
    return transition.state, transition.actions


def _clock_went_back(transition: NodeTransition) -> None:
    """The clock was set back: keep all deadlines within one heartbeat of the new time."""
    state, soon = transition.state, transition.now + transition.rules.heartbeat
    transition.set(
        renew_at=min(state.renew_at, soon), renewed_at=min(state.renewed_at, transition.now), look_at=min(state.look_at, soon),
        act_at=min(state.act_at, soon), looked_at={},
    )  # fmt: skip
    if work := transition.state.work:
        transition.set_work(
            progress_at=min(work.progress_at, transition.now), restart_at=min(work.restart_at, soon),
            offer_at=min(work.offer_at, soon), sync_at=None if work.sync_at is None else min(work.sync_at, soon),
        )  # fmt: skip


def _take_in(transition: NodeTransition, event: Event) -> None:
    """Update the state with the facts of the event."""
    match event:
        case ClockTick():
            pass
        case SwarmSeen(views=views):
            swarm_seen(transition, views)
        case WatchedShardsSet(shards=shards, until=until):
            set_watched_shards(transition, shards, until)
        case TrainerProgress():
            trainer_progress(transition, event)
        case CheckpointReady():
            checkpoint_ready(transition, event)
        case OfferAnswered():
            offer_answered(transition, event)
        case TrainerExited():
            if trainer_exited(transition, event) == "hardware" and transition.state.phase != "draining":
                _probe(transition, "the device failed; probing again")
        case SyncDone():
            shard_synced(transition, event)
        case SyncFailed():
            sync_failed(transition, event)
        case UserVerb():
            _user_verb(transition, event)
        case Joined():
            transition.set(online=True)
            _probe(transition, "probing the hardware")
        case NetworkLost():
            transition.set(online=False)
            transition.warn("the network is down; training goes on while it is restarted")
        case NetworkBack():
            transition.set(online=True, renew_at=transition.now, look_at=transition.now)
            transition.info("the network is up again")
        case Probed(fitness=fitness, rate=rate):
            _probed(transition, dict(transition.rules.slot_fitness(fitness, rate)))
        case ProbeFailed(reason=reason):
            failures = transition.state.probe_failures + 1
            transition.set(
                probe_failures=failures,
                probe_at=transition.now + min(transition.rules.probe_again, transition.rules.backoff(failures + 2, "probe")),
            )
            transition.warn(f"probing the hardware failed: {reason}; it is repeated")
        case DiskFull(text=text):
            transition.disk_full(text)
        case ManifestChanged(version=version, training=training):
            transition.info(f"version {version} of the manifest applies now")
            transition.set(look_at=transition.now, renew_at=transition.now)
            manifest_changed(transition, training)
        case HoursChanged(closed_until=closed_until):
            _hours_changed(transition, closed_until)
        case DiskFree():
            if transition.state.disk_full_since is not None:
                transition.set(
                    disk_full_since=None, disk_freed=(transition.state.disk_full_since, transition.now), look_at=transition.now
                )
                transition.info("the disk has free space again")


def _act(transition: NodeTransition) -> None:
    """Carry out what is due now."""
    state, now = transition.state, transition.now
    if state.probe_at is not None and now >= state.probe_at:
        transition.set(probe_at=None)
        transition.do(ProbeHardware())
    if state.pause_until is not None and now >= state.pause_until:
        transition.set(wanted="run", pause_until=None)
        if state.closed_until is None:
            _resume(transition)
        else:
            _pause(transition)
    if transition.state.work:
        continue_work(transition)
    if transition.state.phase == "draining":
        _drain(transition)
    if transition.state.phase == "idle":
        look_at_due_shards(transition)
    if transition.state.phase == "claiming":
        continue_claiming(transition)
    if transition.state.phase != "left" and now >= transition.state.renew_at:
        transition.set(renew_at=now + transition.rules.heartbeat)
        if transition.state.online:
            _heartbeat(transition)


# --- hardware -------------------------------------------------------------------------------------------------------------


def _probe(transition: NodeTransition, why: str) -> None:
    transition.enter("probing", why)
    transition.do(ProbeHardware())


def _probed(transition: NodeTransition, fitness: dict[int, float]) -> None:
    transition.set(fitness=fitness, probe_failures=0)
    fits = any(value > 0 for value in fitness.values())
    transition.set(probe_at=None if fits else transition.now + transition.rules.probe_again)
    transition.set(look_at=transition.now)
    if transition.state.phase != "probing":
        return
    if transition.state.wanted == "pause" or transition.state.closed_until is not None:
        transition.enter("paused", _why_paused(transition))
    else:
        transition.enter(
            "idle", "looking for a shard" if fits else "no device of this node fits the run; it is probed again every few minutes"
        )


# --- heartbeat ------------------------------------------------------------------------------------------------------------


def _heartbeat(transition: NodeTransition) -> None:
    """Renew our records. A lease that may have lapsed (sleeping laptop, lost network) is checked before it is renewed."""
    state, rules, now = transition.state, transition.rules, transition.now
    work = state.work
    if not work or not work.owned:
        transition.do(RenewRecords(None))
        return
    stuck = state.disk_full_since is not None and now - state.disk_full_since > rules.stuck_after
    lapsed = work.checking or now - state.renewed_at >= rules.lease
    if stuck or lapsed:
        transition.set_work(checking=True)
        transition.do(RenewRecords(None))
    else:
        transition.set(renewed_at=now)
        transition.do(RenewRecords(work.claim(state.phase == "draining")))
    if not stuck:
        transition.do(LookAtShards((work.shard,)))


# --- the volunteer's commands ----------------------------------------------------------------------------------------------


def _user_verb(transition: NodeTransition, event: UserVerb) -> None:
    transition.set(
        wanted="run" if event.verb == "resume" else event.verb, pause_until=event.until if event.verb == "pause" else None
    )
    phase = transition.state.phase
    busy = phase in ("training", "publishing", "draining") or (
        transition.state.work is not None and bool(transition.state.work.pending)
    )
    if event.verb == "leave" or (event.verb == "finish" and not busy):
        _leave(transition, "leaving as asked")
    elif event.verb == "finish" and phase in ("training", "publishing", "paused"):
        transition.set(drain_until=None)
        what = "waiting for the verdict on the last checkpoint" if phase == "paused" else "finishing the current checkpoint"
        transition.enter("draining", f"{what} before leaving")
    elif event.verb == "pause" and phase not in ("joining", "probing"):
        _pause(transition)
    elif event.verb == "resume":
        transition.set(closed_until=None)
        _resume(transition)


def _resume(transition: NodeTransition) -> None:
    transition.set(drain_until=None)
    if transition.state.phase == "paused" or (transition.state.work and not transition.state.work.owned):
        transition.set(work=None, look_at=transition.now)
        transition.enter("idle", "resumed; looking for a shard")
    elif transition.state.phase == "draining":
        transition.enter("training", "finish was cancelled")


def _hours_changed(transition: NodeTransition, closed_until: float | None) -> None:
    """The schedule opened or closed. The volunteer's own command (pause, finish, leave) takes precedence."""
    transition.set(closed_until=closed_until)
    if transition.state.wanted != "run" or transition.state.phase in ("joining", "probing"):
        return
    if closed_until is not None:
        _pause(transition)
    elif transition.state.phase == "paused":
        _resume(transition)


def _why_paused(transition: NodeTransition) -> str:
    if transition.state.wanted != "pause":
        return "outside its hours"
    until = transition.state.pause_until
    return "paused by the volunteer" if until is None else f"paused for {until - transition.now:.0f} s by the volunteer"


def _pause(transition: NodeTransition) -> None:
    """Stop training and release the lease. Complete checkpoints are still offered."""
    work = transition.state.work
    release(transition, save=True)
    if work and work.pending:
        transition.set(work=work)
        transition.set_work(owned=False, trainer="off", waiting=False, failure=None)
    transition.set(target=None, drain_until=None)
    transition.enter("paused", _why_paused(transition))


def _drain(transition: NodeTransition) -> None:
    """Leave once the last checkpoint is judged or `patience` is over, and no failed trainer waits for its restart."""
    state, work = transition.state, transition.state.work
    if work is None:
        _leave(transition, "the shard was released; leaving")
    elif work.trainer == "on" or wants_trainer(transition.rules, state, work):
        transition.set(drain_until=None)
    elif not work.pending and work.cut_short:
        what = "the current checkpoint was not finished, its saved part stays on this disk"
        _leave(transition, f"the trainer failed ({work.failure}); {what}; leaving")
    elif not work.pending:
        _leave(transition, "the last checkpoint is accepted; leaving")
    elif state.drain_until is None:
        transition.set(drain_until=transition.now + max(transition.rules.patience, transition.rules.lease))
        transition.explain("waiting for the last checkpoint to be accepted")
    elif transition.now >= state.drain_until:
        _leave(
            transition,
            "the last checkpoint was not judged in time; it stays on this disk and is offered again at the next start; leaving",
        )


def _leave(transition: NodeTransition, why: str) -> None:
    if (
        transition.state.phase == "claiming"
        and transition.state.stage in ("settle", "decide")
        and transition.state.target is not None
    ):
        transition.do(PublishClaim(Claim(transition.state.target, 0, 0, "released")))
    release(transition, save=True)
    transition.set(target=None, pause_until=None, drain_until=None)
    transition.enter("left", why)
    transition.do(RenewRecords(None))
    transition.do(Leave())
