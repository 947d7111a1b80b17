"""Decisions of a node without a shard: look at the swarm, choose a free shard, claim it, keep it or yield."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from lutetia.node.machine.lease import own_shard_seen, start_sync
from lutetia.node.machine.messages import Claim, LookAtShards, PublishClaim
from lutetia.node.machine.state import Stage
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.claims import ShardView, free_shards, preferred_shard, rendezvous, slot_name
from lutetia.protocol.schema.fields import MOST_SHARDS
from lutetia.protocol.schema.owner.orders import because
from lutetia.protocol.stalled_claims import LONGEST_GAP, current_holder, observe_claims, without_stalled

WAVE = 16
"""Shards per look. A free shard of the first look is claimed before the other shards are looked at."""
ALIKE = 1.25
"""Lanes whose fitness lies between two powers of this factor are taken as equal."""


def swarm_seen(transition: NodeTransition, views: tuple[ShardView, ...]) -> None:
    state, rules = transition.state, transition.rules
    known, looked_at = dict(state.views), dict(state.looked_at)
    claim_histories = dict(state.claim_histories)
    for view in views:
        old = known.get(view.shard)
        if old and old.place > view.place:  # from a stale replica: take its claims, keep the newer acceptance
            view = old.with_claims(view.claims)
        if view.claims or (old and old.claims):
            claim_histories[view.shard] = seen = observe_claims(
                claim_histories.get(view.shard, {}), view, transition.now, LONGEST_GAP * rules.lease
            )
            view = without_stalled(seen, view, rules.owner, rules.tenure, rules.interval, transition.now)
        known[view.shard], looked_at[view.shard] = view, transition.now
    transition.set(views=known, looked_at=looked_at, claim_histories=claim_histories)
    fresh = {view.shard for view in views}
    if state.work and state.work.shard in fresh:
        own_shard_seen(transition)
    elif state.phase == "claiming" and state.target in fresh:
        _target_seen(transition, known[state.target])
    elif state.phase == "idle":
        _choose(transition)


def set_watched_shards(transition: NodeTransition, shards: frozenset[int] | None, until: float) -> None:
    """Watch these shards until `until`. A node that was not standing by when they were assigned watches all shards."""
    standing_by = transition.state.phase in ("idle", "claiming")
    transition.set(watched_shards=shards if standing_by else None, watched_until=until, to_look=())
    if transition.state.phase == "idle":
        transition.set(look_at=min(transition.state.look_at, transition.now))


def _watched_shards(transition: NodeTransition) -> Iterable[int]:
    """In ascending order. Other standbys watch the remaining shards, and our views of those may be old."""
    state = transition.state
    if state.watched_shards is None or transition.now >= state.watched_until:
        return transition.rules.slots
    return sorted(state.watched_shards)


def _without_own_claim(transition: NodeTransition, view: ShardView) -> ShardView:
    """The view without our own claim: a claim from before a restart must not keep us from the shard."""
    if transition.rules.owner not in view.claimants:
        return view
    return view.with_claims(claim for claim in view.claims if claim.record.owner != transition.rules.owner)


def _claimable_views(transition: NodeTransition) -> list[ShardView]:
    """Watched shards with work left that fit, and are neither avoided nor another device's; without our own claims."""
    taken = transition.state.taken
    seen = [
        view
        for shard in _watched_shards(transition)
        if (view := transition.state.views.get(shard)) is not None and shard not in taken
    ]
    state, now, epochs, owner = transition.state, transition.now, transition.rules.epochs, transition.rules.owner
    fitness, avoided_until = state.fitness, state.avoided_until
    return [
        view if owner not in view.claimants else _without_own_claim(transition, view)
        for view in seen
        if view.epoch < epochs and fitness.get(view.shard, 0) > 0 and avoided_until.get(view.shard, 0) <= now
    ]


def _choose(transition: NodeTransition) -> None:
    """Start to claim the best free shard, or stand by."""
    state, rules, now = transition.state, transition.rules, transition.now
    if rules.paused is not None:
        transition.set(look_at=now + rules.lease, to_look=())
        transition.explain(f"the run is paused by its owner{because(rules.paused)}; standing by until it goes on")
        return
    views = _claimable_views(transition)
    held = state.disk_full_since is not None or min([view.held_until for view in views], default=now + 1) > now
    free = [] if held else free_shards(views, rules.epochs, now)
    # these claims have expired since the last look, so it is only a guess that their shards are free
    guessed = [view for view in free if view.held_until > state.looked_at.get(view.shard, 0.0)]
    free = [view for view in free if view not in guessed]
    fitness = {view.shard: _fitness(transition, view) for view in free}
    best = preferred_shard(rules.run, rules.owner, free, fitness, state.remembered)
    if best is not None:
        delay = 0.0 if best.shard in state.remembered else rules.takeover_delay(best.shard, best.epoch)
        transition.set(target=best.shard, stage="delay", settle_rounds=0, act_at=now + delay, to_look=())
        transition.enter("claiming", f"{slot_name(best.shard)} is free")
        return
    transition.set(look_at=now if guessed or state.to_look else _next_look(transition, views))
    transition.explain(_why_idle(transition, views))


def _fitness(transition: NodeTransition, view: ShardView) -> float:
    """Hardware fit × work left, doubled for a shard whose local work is still on disk.

    Work left is rounded up to quarters: exact differences would send all newcomers to one shard. In lanes above the first it
    does not count, so that the lanes of all shards fill alike.
    """
    epochs, fit, begun = transition.rules.epochs, transition.state.fitness[view.shard], view.shard in transition.state.remembered
    if view.shard >= MOST_SHARDS and not begun:
        return _coarse(fit)
    return fit * -(-4 * (epochs - view.epoch) // epochs) * (2 if begun else 1)


def _coarse(fit: float) -> float:
    """Rounded down to a power of ALIKE: nodes of about the same speed would else all claim the same few lanes, and most lose."""
    return ALIKE ** math.floor(math.log(fit, ALIKE) + 1e-9)


def _why_idle(transition: NodeTransition, views: list[ShardView]) -> str:
    state, rules = transition.state, transition.rules
    if not any(value > 0 for value in state.fitness.values()):
        if 0 < state.rate < rules.slowest_rate:
            needed = f"the smallest lane needs {rules.slowest_rate:.3g} to be in time"
            return f"this device trains {state.rate:.3g} samples/s and {needed}; standing by"
        return "no device of this node fits the run; it is probed again every few minutes"
    if state.disk_full_since is not None:
        return "the disk is full; free some space"
    if len(state.views) == len(rules.slots) and all(view.epoch >= rules.epochs for view in state.views.values()):
        return "the run is complete; serving its checkpoints"
    if state.watched_shards is not None and not state.watched_shards:
        return "other standbys watch all shards; standing by"
    if state.taken and not views and not state.to_look:
        return "other devices of this node have all shards that are open to it; standing by"
    if state.to_look:
        return f"no free shard found so far; looking at {len(state.to_look)} more"
    if why := _why_not_free_ones(transition):
        return f"{why}; standing by"
    if not views and any(until > transition.now for until in state.avoided_until.values()):
        return "what is open was given up here before and is tried again after a while; standing by"
    what = "every lane of every shard" if rules.team else "every shard"
    if state.watched_shards is not None and len(state.watched_shards) < len(rules.slots):
        what += " that this node watches"
    return f"{what} has a holder; standing by" if views else "no shard is open to this node; standing by"


def _why_not_free_ones(transition: NodeTransition) -> str:
    """Why this node takes none of the slots that are free, in a clause; empty: no slot that it has seen is free."""
    state, rules, now = transition.state, transition.rules, transition.now
    avoided, unfit = list[int](), list[int]()
    for slot, view in state.views.items():  # most are held; keep it fast
        if view.held_until > now and rules.owner not in view.claimants:
            continue
        held = _without_own_claim(transition, view).held_until > now
        if held or slot in state.taken or view.epoch >= rules.epochs or now - state.looked_at.get(slot, 0.0) > 2 * rules.lease:
            continue
        if state.fitness.get(slot, 0) <= 0:
            unfit.append(slot)
        elif state.avoided_until.get(slot, 0.0) > now:
            avoided.append(slot)
    if avoided:
        slot = min(avoided, key=lambda slot: (state.avoided_until[slot], slot))
        again = f"is tried again within {state.avoided_until[slot] - now:.0f} s"
        return f"{slot_name(slot)} is free, was given up here before, and {again}"
    if not unfit:
        return ""
    if rules.team is None or state.rate <= 0:
        return f"{slot_name(min(unfit))} is free, and does not fit this device"
    slot = min(unfit, key=lambda slot: (rules.rate_needed(slot), slot))
    needed = f"{rules.rate_needed(slot):.3g} samples/s to be in time"
    return f"{slot_name(slot)} is free, and needs {needed}; this device trains {state.rate:.3g}"


def _next_look(transition: NodeTransition, views: list[ShardView]) -> float:
    """When the first known claim may have expired; at most one lease from now. Unix seconds."""
    rules, now = transition.rules, transition.now
    spread = 0.02 * rules.heartbeat * rules.jitter("look", int(now))
    expiries = [view.held_until if view.held_until > now else now + rules.lease for view in views]
    expiries += [until for until in transition.state.avoided_until.values() if until > now]
    if transition.state.watched_shards is not None and transition.state.watched_until > now:
        expiries.append(transition.state.watched_until)
    return min([*expiries, now + rules.lease], default=now + rules.lease) + spread


def look_at_due_shards(transition: NodeTransition) -> None:
    """Look at shards whose view may be out of date, WAVE at a time."""
    state, rules, now = transition.state, transition.rules, transition.now
    if not state.online or now < state.look_at:
        return
    due = state.to_look or _looks_due(transition, now, now + rules.heartbeat / 4)
    transition.set(look_at=now + rules.heartbeat)  # the answer changes it; without an answer the node asks again
    if not due:
        _choose(transition)
        return
    if len(due) > WAVE and not state.to_look:
        due = _promising_first(transition, due)
    transition.set(to_look=due[WAVE:])
    transition.do(LookAtShards(due[:WAVE]))


def _promising_first(transition: NodeTransition, shards: Iterable[int]) -> tuple[int, ...]:
    """In the order in which this node would claim them if all were free. The order differs by node, so newcomers spread.

    The lanes above the first follow, those that fit best first. Of those alike it begins at a place of this node's own, a lane of
    every shard after another: looked at from the lowest on, a large run with many lanes would take a newcomer minutes.
    """
    state, rules = transition.state, transition.rules

    def order(shard: int) -> tuple[bool, float, int]:
        return shard not in state.remembered, -state.fitness.get(shard, 0.0), rendezvous(rules.run, shard, 0, rules.owner)

    first = {shard for shard in shards if shard < MOST_SHARDS or shard in state.remembered}
    others, place = defaultdict[float, list[int]](list), rules.jitter("lanes")
    for shard in shards:
        if shard not in first and (fit := state.fitness.get(shard, 0.0)) > 0:
            others[_coarse(fit)].append(shard)
    promising = sorted(first, key=order)
    for fit in sorted(others, reverse=True):
        start = int(place * len(others[fit]))
        promising += others[fit][start:] + others[fit][:start]
    return tuple(promising)


def _looks_due(transition: NodeTransition, now: float, soon: float) -> tuple[int, ...]:
    """Shards whose view may be out of date: not seen within a lease, or with claims that have expired.

    If one is due `now`, return all that are due by `soon`, so that looks are fewer and larger. Otherwise return none.
    """
    state, epochs, owner = transition.state, transition.rules.epochs, transition.rules.owner
    views, looked_at, lease, due, first = state.views, state.looked_at, transition.rules.lease, [], math.inf
    taken = state.taken
    for shard in _watched_shards(transition):  # innermost loop of a standby; keep it fast
        if shard in taken:
            continue
        view, stale = views.get(shard), 0.0
        if view is not None:
            stale = looked_at.get(shard, 0.0) + lease
            if view.epoch < epochs:
                held = view.held_until if owner not in view.claimants else _without_own_claim(transition, view).held_until
                if held < stale:
                    stale = held
        if stale <= soon:
            due.append(shard)
            first = min(first, stale)
    return tuple(due) if first <= now else ()


def continue_claiming(transition: NodeTransition) -> None:
    """Take the claiming step that is due at this time; `_target_seen` takes the steps that wait for a look."""
    state, rules, now = transition.state, transition.rules, transition.now
    if now < state.act_at or state.target is None:
        return
    if not state.online:
        transition.set(target=None, look_at=now)
        transition.enter("idle", "the network was lost while claiming")
        return
    stage: Stage = "check" if state.stage in ("delay", "check") else "decide"
    transition.set(stage=stage, act_at=now + rules.heartbeat)
    transition.do(LookAtShards((state.target,)))


def _target_seen(transition: NodeTransition, view: ShardView) -> None:
    state, rules, now = transition.state, transition.rules, transition.now
    if state.stage == "check":
        if not free_shards([_without_own_claim(transition, view)], rules.epochs, now):
            done = view.epoch >= rules.epochs
            _back_to_idle(
                transition, f"{slot_name(view.shard)} is done" if done else f"another peer claimed {slot_name(view.shard)} first"
            )
            return
        transition.set(stage="settle", act_at=now + rules.propagation, renewed_at=now)
        transition.do(PublishClaim(Claim(view.shard, view.epoch, 0, "claiming")))
    elif state.stage == "decide":
        seen = state.claim_histories.get(view.shard, {})
        owner = current_holder(rules.run, view, seen, rules.tenure, rules.interval, now, reader=rules.owner)
        if owner == rules.owner:
            transition.set(target=None)
            start_sync(transition, view.shard)
        elif owner is None and state.settle_rounds < 3:  # the DHT does not show our claim yet
            transition.set(stage="settle", settle_rounds=state.settle_rounds + 1, act_at=now + rules.propagation)
        else:
            transition.do(PublishClaim(Claim(view.shard, view.epoch, 0, "released")))
            _back_to_idle(transition, f"lost {slot_name(view.shard)} to a simultaneous claim")


def _back_to_idle(transition: NodeTransition, why: str) -> None:
    rules = transition.rules
    transition.set(target=None, look_at=transition.now + rules.propagation * (1 + rules.jitter("again", int(transition.now))))
    transition.enter("idle", why)
