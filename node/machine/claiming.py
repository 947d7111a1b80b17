"""The part of the state machine that has no shard yet: look at the swarm, choose a free shard, claim it, settle or yield."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lutetia.node.machine.lease import own_shard_seen, start_sync
from lutetia.node.machine.messages import Claim, LookAtShards, PublishClaim
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.claims import ShardView, free_shards, preferred_shard, rendezvous
from lutetia.protocol.stalled_claims import LONGEST_GAP, current_holder, observe_claims, without_stalled

WAVE = 16
"""How many shards are looked at before the first choice: what looks free among them is claimed before the rest is seen."""


def swarm_seen(turn: NodeTransition, views: tuple[ShardView, ...]) -> None:
    state, known, looked, rules = turn.state, dict(turn.state.views), dict(turn.state.looked), turn.rules
    watched = dict(state.watched)
    for view in views:
        old = known.get(view.shard)
        if old and old.place > view.place:  # a stale replica: the claims are news, the acceptance is not
            view = old.with_claims(view.claims)
        if view.claims or (old and old.claims):
            watched[view.shard] = seen = observe_claims(watched.get(view.shard, {}), view, turn.now, LONGEST_GAP * rules.lease)
            view = without_stalled(seen, view, rules.owner, rules.tenure, rules.interval, turn.now)
        known[view.shard], looked[view.shard] = view, turn.now
    turn.set(views=known, looked=looked, watched=watched)
    fresh = {view.shard for view in views}
    if state.work and state.work.shard in fresh:
        own_shard_seen(turn)
    elif state.phase == "claiming" and state.target in fresh:
        _target_seen(turn, known[state.target])
    elif state.phase == "idle":
        _choose(turn)


def take_duty(turn: NodeTransition, shards: frozenset[int] | None, until: float) -> None:
    """From now on we look after these shards. Who has just begun to stand by, and has no duty yet, looks at all of them."""
    standing_by = turn.state.phase in ("idle", "claiming")
    turn.set(duty=shards if standing_by else None, duty_until=until, to_look=())
    if turn.state.phase == "idle":
        turn.set(look_at=min(turn.state.look_at, turn.now))


def _duty(turn: NodeTransition) -> Iterable[int]:
    """In ascending order: the views of other shards may be old, and others look after those."""
    state = turn.state
    if state.duty is None or turn.now >= state.duty_until:
        return range(turn.rules.shards)
    return sorted(state.duty)


def _strangers(turn: NodeTransition, view: ShardView) -> ShardView:
    """The view without our own claim, which is no obstacle to us (we may have been restarted)."""
    if turn.rules.owner not in view.claimants:
        return view
    return view.with_claims(claim for claim in view.claims if claim.record.owner != turn.rules.owner)


def _open_views(turn: NodeTransition) -> list[ShardView]:
    """Shards that we look after, with work left, fitting, and not given up lately; without our own claims."""
    seen = [view for shard in _duty(turn) if (view := turn.state.views.get(shard))]
    state, now, epochs, owner = turn.state, turn.now, turn.rules.epochs, turn.rules.owner
    fitness, shunned = state.fitness, state.shunned
    return [
        view if owner not in view.claimants else _strangers(turn, view)
        for view in seen
        if view.epoch < epochs and fitness.get(view.shard, 0) > 0 and shunned.get(view.shard, 0) <= now
    ]


def _choose(turn: NodeTransition) -> None:
    """Go for the best free shard, or stand by."""
    state, rules, now = turn.state, turn.rules, turn.now
    views = _open_views(turn)
    held = state.disk_full_since is not None or min([view.held_until for view in views], default=now + 1) > now
    free = [] if held else free_shards(views, rules.epochs, now)
    guessed = [
        view for view in free if view.held_until > state.looked.get(view.shard, 0.0)
    ]  # its claim has run out since we looked
    free = [view for view in free if view not in guessed]
    fitness = {view.shard: _fitness(turn, view) for view in free}
    best = preferred_shard(rules.run, rules.owner, free, fitness)
    if best is not None:
        delay = 0.0 if best.shard in state.remembered else rules.takeover_delay(best.shard, best.epoch)
        turn.set(target=best.shard, stage="delay", judged=0, act_at=now + delay, to_look=())
        turn.enter("claiming", f"shard {best.shard} is free")
        return
    turn.set(look_at=now if guessed or state.to_look else _next_look(turn, views))
    turn.because(_why_idle(turn, views))


def _fitness(turn: NodeTransition, view: ShardView) -> float:
    """Hardware fit × work left, twice that for a shard of which we hold local work.

    Work left counts in quarters: exact differences would send all newcomers to one shard.
    """
    epochs = turn.rules.epochs
    quarters = -(-4 * (epochs - view.epoch) // epochs)
    return turn.state.fitness[view.shard] * quarters * (2 if view.shard in turn.state.remembered else 1)


def _why_idle(turn: NodeTransition, views: list[ShardView]) -> str:
    state = turn.state
    if not any(value > 0 for value in state.fitness.values()):
        return "no device of this box fits the run; probing again now and then"
    if state.disk_full_since is not None:
        return "the disk is full; free some space"
    if len(state.views) == turn.rules.shards and all(view.epoch >= turn.rules.epochs for view in state.views.values()):
        return "the run is complete; seeding its checkpoints"
    if state.duty is not None and not state.duty:
        return "enough others look after the shards; standing by"
    if state.to_look:
        return f"none of the shards seen so far is free; looking at {len(state.to_look)} more"
    return "every shard has an owner; standing by" if views else "no shard is open to this box; standing by"


def _next_look(turn: NodeTransition, views: list[ShardView]) -> float:
    """When the first claim that we saw may have expired, and at least once per lease."""
    rules, now = turn.rules, turn.now
    spread = 0.02 * rules.heartbeat * rules.jitter("look", int(now))
    expiries = [view.held_until if view.held_until > now else now + rules.lease for view in views]
    expiries += [until for until in turn.state.shunned.values() if until > now]
    if turn.state.duty is not None and turn.state.duty_until > now:
        expiries.append(turn.state.duty_until)
    return min([*expiries, now + rules.lease], default=now + rules.lease) + spread


def look_around(turn: NodeTransition) -> None:
    """Look at what may have changed, a wave at a time."""
    state, rules, now = turn.state, turn.rules, turn.now
    if not state.online or now < state.look_at:
        return
    due = state.to_look or _looks_due(turn, now, now + rules.heartbeat / 4)
    turn.set(look_at=now + rules.heartbeat)  # the answer moves it; without an answer we ask again
    if not due:
        _choose(turn)
        return
    if len(due) > WAVE and not state.to_look:
        due = _promising_first(turn, due)
    turn.set(to_look=due[WAVE:])
    turn.do(LookAtShards(due[:WAVE]))


def _promising_first(turn: NodeTransition, shards: Iterable[int]) -> tuple[int, ...]:
    """In the order in which we would claim them if all were free: so newcomers spread, and none waits for a look at the rest."""
    state, rules = turn.state, turn.rules
    return tuple(
        sorted(
            shards,
            key=lambda shard: (
                shard not in state.remembered, -state.fitness.get(shard, 0.0), rendezvous(rules.run, shard, 0, rules.owner)
            ),
        )
    )  # fmt: skip


def _looks_due(turn: NodeTransition, now: float, soon: float) -> tuple[int, ...]:
    """The shards of which our picture may be out of date: never or long ago seen, or with claims that will have run out.

    If any is `now`, all that will be `soon`: fewer and larger looks. Else none.
    """
    state, epochs, owner = turn.state, turn.rules.epochs, turn.rules.owner
    views, looked, lease, due, first = state.views, state.looked, turn.rules.lease, [], math.inf
    for shard in _duty(turn):  # the innermost loop of a standby
        view, stale = views.get(shard), 0.0
        if view is not None:
            stale = looked.get(shard, 0.0) + lease
            if view.epoch < epochs:
                held = view.held_until if owner not in view.claimants else _strangers(turn, view).held_until
                if held < stale:
                    stale = held
        if stale <= soon:
            due.append(shard)
            first = min(first, stale)
    return tuple(due) if first <= now else ()


def go_on_claiming(turn: NodeTransition) -> None:
    """The steps of claiming that time brings; `_target_seen` has the others."""
    state, rules, now = turn.state, turn.rules, turn.now
    if now < state.act_at or state.target is None:
        return
    if not state.online:
        turn.set(target=None, look_at=now)
        turn.enter("idle", "the network went away while claiming")
        return
    stage = {"delay": "check", "settle": "judge"}.get(state.stage, state.stage)
    turn.set(stage=stage, act_at=now + rules.heartbeat)
    turn.do(LookAtShards((state.target,)))


def _target_seen(turn: NodeTransition, view: ShardView) -> None:
    state, rules, now = turn.state, turn.rules, turn.now
    if state.stage == "check":
        if not free_shards([_strangers(turn, view)], rules.epochs, now):
            done = view.epoch >= rules.epochs
            _back_to_idle(turn, f"shard {view.shard} is done" if done else f"somebody else claimed shard {view.shard} first")
            return
        turn.set(stage="settle", act_at=now + rules.propagation, renewed_at=now)
        turn.do(PublishClaim(Claim(view.shard, view.epoch, 0, "claiming")))
    elif state.stage == "judge":
        seen = state.watched.get(view.shard, {})
        owner = current_holder(rules.run, view, seen, rules.tenure, rules.interval, now, reader=rules.owner)
        if owner == rules.owner:
            turn.set(target=None)
            start_sync(turn, view.shard)
        elif owner is None and state.judged < 3:  # our own claim is not visible yet
            turn.set(stage="settle", judged=state.judged + 1, act_at=now + rules.propagation)
        else:
            turn.do(PublishClaim(Claim(view.shard, view.epoch, 0, "released")))
            _back_to_idle(turn, f"lost shard {view.shard} to an equal claim")


def _back_to_idle(turn: NodeTransition, why: str) -> None:
    rules = turn.rules
    turn.set(target=None, look_at=turn.now + rules.propagation * (1 + rules.jitter("again", int(turn.now))))
    turn.enter("idle", why)
