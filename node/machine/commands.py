"""Decisions on the volunteer's commands and the schedule, and on how a device ends."""

from __future__ import annotations

from lutetia.node.machine.lease import release
from lutetia.node.machine.messages import BytesAllowed, Claim, Leave, PublishClaim, RenewRecords, UserVerb
from lutetia.node.machine.state import wants_trainer
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.schema.owner.orders import because


def user_verb(transition: NodeTransition, event: UserVerb) -> None:
    transition.set(
        wanted="run" if event.verb == "resume" else event.verb, pause_until=event.until if event.verb == "pause" else None
    )
    phase = transition.state.phase
    busy = phase in ("training", "publishing", "draining") or (
        transition.state.work is not None and bool(transition.state.work.pending)
    )
    if event.verb == "leave" or (event.verb == "finish" and not busy):
        leave(transition, "leaving as asked")
    elif event.verb == "finish" and phase in ("training", "publishing", "paused"):
        transition.set(drain_until=None)
        what = "waiting for the verdict on the last checkpoint" if phase == "paused" else "finishing the current checkpoint"
        transition.enter("draining", f"{what} before leaving")
    elif event.verb == "pause" and phase not in ("joining", "probing"):
        pause(transition)
    elif event.verb == "resume":
        transition.set(closed_until=None)
        resume(transition)


def follow_ban(transition: NodeTransition) -> None:
    """Stop as soon as the owner bans this node: nothing that it does counts. Its work stays on disk until the ban is lifted."""
    state = transition.state
    if state.phase in ("joining", "probing", "left"):
        return
    if transition.rules.banned is not None and state.phase == "draining":
        leave(transition, "the run's owner has banned this node; leaving")
    elif transition.rules.banned is not None:
        release(transition, save=True)
        transition.set(target=None, drain_until=None)
        transition.enter("paused", why_paused(transition))
    elif state.phase == "paused" and state.wanted == "run" and state.closed_until is None:
        resume(transition)


def resume(transition: NodeTransition) -> None:
    held = transition.rules.banned is not None or transition.state.bytes_until is not None
    if held and transition.state.phase == "paused":
        transition.explain(why_paused(transition))
        return
    transition.set(drain_until=None)
    if transition.state.phase == "paused" or (transition.state.work and not transition.state.work.owned):
        transition.set(work=None, look_at=transition.now)
        transition.enter("idle", "resumed; looking for a shard")
    elif transition.state.phase == "draining":
        transition.enter("training", "finish was cancelled")


def hours_changed(transition: NodeTransition, closed_until: float | None) -> None:
    """The schedule opened or closed. The volunteer's own command (pause, finish, leave) takes precedence."""
    transition.set(closed_until=closed_until)
    if transition.state.wanted != "run" or transition.state.phase in ("joining", "probing"):
        return
    if closed_until is not None:
        pause(transition)
    elif transition.state.phase == "paused":
        resume(transition)


def bytes_allowed(transition: NodeTransition, event: BytesAllowed) -> None:
    """The cap on bytes lets no epoch begin, or does again. An epoch that has begun ends, and its result is uploaded."""
    transition.set(bytes_until=event.until, bytes_why=event.why, may_offer=event.offers)
    state = transition.state
    if state.wanted != "run" or state.closed_until is not None:
        return
    if event.until is not None and (state.phase in ("idle", "claiming", "syncing") or not event.offers):
        hand_back(transition)
    elif event.until is None and state.phase == "paused":
        resume(transition)


def hand_back(transition: NodeTransition) -> None:
    """Release the shard: another peer may train it before the cap on bytes lets this one go on."""
    if transition.state.phase in ("idle", "claiming", "syncing", "training", "publishing"):
        pause(transition)


def why_paused(transition: NodeTransition) -> str:
    if transition.rules.banned is not None:
        return f"the run's owner has banned this node{because(transition.rules.banned)}"
    if transition.state.wanted != "pause":
        capped = transition.state.closed_until is None and transition.state.bytes_until is not None
        return transition.state.bytes_why if capped else "outside its hours"
    until = transition.state.pause_until
    return "paused by the volunteer" if until is None else f"paused for {until - transition.now:.0f} s by the volunteer"


def pause(transition: NodeTransition) -> None:
    """Stop training and release the lease. Complete checkpoints are still offered."""
    work = transition.state.work
    release(transition, save=True)
    if work and work.pending:
        transition.set(work=work)
        transition.set_work(owned=False, trainer="off", waiting=False, failure=None)
    transition.set(target=None, drain_until=None)
    transition.enter("paused", why_paused(transition))


def drain(transition: NodeTransition) -> None:
    """Leave once the last checkpoint is judged or `patience` is over, and no failed trainer waits for its restart."""
    state, work = transition.state, transition.state.work
    if work is None:
        leave(transition, "the shard was released; leaving")
    elif work.trainer == "on" or wants_trainer(transition.rules, state, work):
        transition.set(drain_until=None)
    elif not work.pending and work.cut_short:
        what = "the current checkpoint was not finished, its saved part stays on this disk"
        leave(transition, f"the trainer failed ({work.failure}); {what}; leaving")
    elif not work.pending:
        leave(transition, "the last checkpoint is accepted; leaving")
    elif state.drain_until is None:
        transition.set(drain_until=transition.now + max(transition.rules.patience, transition.rules.lease))
        transition.explain("waiting for the last checkpoint to be accepted")
    elif transition.now >= state.drain_until:
        leave(
            transition,
            "the last checkpoint was not judged in time; it stays on this disk and is offered again at the next start; leaving",
        )


def leave(transition: NodeTransition, why: str) -> None:
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


def device_gone(transition: NodeTransition, why: str) -> None:
    """Hand the shard back and end; complete checkpoints are offered until they are judged."""
    work = transition.state.work
    release(transition, save=True)
    if work is None or not work.pending:
        leave(transition, why)
        return
    transition.set(work=work, target=None, drain_until=None)
    transition.set_work(owned=False, trainer="off", waiting=False, failure=None)
    transition.enter("draining", f"{why}; waiting for the verdict on its last checkpoint")
