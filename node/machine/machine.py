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
from lutetia.node.machine.commands import (
    bytes_allowed,
    device_gone,
    drain,
    follow_ban,
    hours_changed,
    pause,
    resume,
    user_verb,
    why_paused,
)
from lutetia.node.machine.lease import shard_synced, sync_failed
from lutetia.node.machine.messages import (
    Action,
    BytesAllowed,
    CheckpointReady,
    ClockTick,
    DeviceGone,
    DiskFree,
    DiskFull,
    Event,
    HardwareChanged,
    HoursChanged,
    Joined,
    LookAtShards,
    ManifestChanged,
    NetworkBack,
    NetworkLost,
    OfferAnswered,
    Probed,
    ProbeFailed,
    ProbeHardware,
    RenewRecords,
    ShardsTaken,
    SwarmSeen,
    SyncDone,
    SyncFailed,
    TrainerExited,
    TrainerProgress,
    UserVerb,
    WatchedShardsSet,
)
from lutetia.node.machine.state import MachineState, NodeRules
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
            offer_at=min(work.offer_at, soon), merge_look_at=min(work.merge_look_at, soon),
            sync_at=None if work.sync_at is None else min(work.sync_at, soon),
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
            user_verb(transition, event)
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
            transition.set(rate=rate)
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
        case ManifestChanged():
            transition.info(f"version {event.version} of the manifest applies now")
            transition.set(look_at=transition.now, renew_at=transition.now)
            manifest_changed(transition, event)
            follow_ban(transition)
        case HoursChanged(closed_until=closed_until):
            hours_changed(transition, closed_until)
        case BytesAllowed():
            bytes_allowed(transition, event)
        case ShardsTaken(shards=shards):
            freed = transition.state.taken - shards
            transition.set(taken=shards)
            if freed and transition.state.phase == "idle":
                transition.set(look_at=transition.now)
        case HardwareChanged():
            if transition.state.probe_at is not None:
                transition.set(probe_at=transition.now, probe_failures=0)
        case DeviceGone(reason=reason):
            device_gone(transition, reason)
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
            resume(transition)
        else:
            pause(transition)
    if transition.state.work:
        continue_work(transition)
    if transition.state.phase == "draining":
        drain(transition)
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
    again = transition.rules.probe_again * (0.75 + transition.rules.jitter("probe", int(transition.now)) / 2)
    # at unlike times: the probes of nodes on one machine slow each other down
    transition.set(probe_at=None if fits else transition.now + again)
    transition.set(look_at=transition.now, watched_shards=None, to_look=())  # assigned by what it was before: look at all once
    if transition.state.phase != "probing":
        return
    state = transition.state
    held = state.closed_until is not None or state.bytes_until is not None or transition.rules.banned is not None
    if state.wanted == "pause" or held:
        transition.enter("paused", why_paused(transition))
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
