"""Decisions on the coordinator's answers to our results."""

from __future__ import annotations

from lutetia.node.machine.lease import discard_work, give_up, leave_out, own_accepted, release, start_sync
from lutetia.node.machine.messages import LookAtShards, OfferAnswered
from lutetia.node.machine.transition import NodeTransition
from lutetia.protocol.claims import slot_name
from lutetia.system.retry import backoff


def offer_answered(transition: NodeTransition, event: OfferAnswered) -> None:
    work, rules = transition.state.work, transition.rules
    if not work or not work.pending or work.pending[0].digest != event.digest:
        return
    head, offers = work.pending[0], work.offers + 1
    ahead = min(rules.max_ahead, len(work.pending) + event.room) if event.verdict == "unreachable" else 0
    transition.set_work(offering=None, offers=offers, ahead=ahead)
    jitter = 1 + rules.jitter("offer", event.digest, offers) / 4
    match event.verdict:
        case "accepted":
            own_accepted(transition, head.epoch, head.digest)
            transition.do(LookAtShards((work.shard,)))
        case "gathered":
            transition.set_work(offer_at=transition.now + rules.lease * jitter, gathered=True, unjudged=0)
            transition.set_work(merge_look_at=transition.now + rules.merge_look * jitter)
            transition.set(rejections={**transition.state.rejections, work.shard: 0}, left_out="")
            if transition.state.phase == "draining" or not work.owned:  # nothing of this node is left to be decided
                transition.set_work(pending=())
        case "invalid":
            _rejected(transition, event.text)
        case "quarantined":
            discard_work(transition, work.epoch)
            _leave_to_others(transition, event.text, save=False)
        case "superseded":
            transition.set_work(offer_at=transition.now + rules.heartbeat * jitter)
            if rules.team:
                leave_out(transition, f"the result of {slot_name(work.shard)} came too late for epoch {head.epoch}")
            transition.do(LookAtShards((work.shard,)))
        case "queued":
            wait = event.retry_after or backoff(offers + 1, first=rules.propagation, longest=rules.heartbeat, factor=1.5)
            transition.set_work(offer_at=transition.now + wait * jitter)
        case "busy":
            transition.set_work(offer_at=transition.now + (event.retry_after or rules.heartbeat) * jitter)
        case "inconclusive" | "unreachable":
            transition.set_work(offer_at=transition.now + (event.retry_after or rules.backoff(offers, "offer", event.digest)))
            if event.verdict == "inconclusive" or offers == 1:
                transition.warn(f"the checkpoint of epoch {head.epoch} was not judged: {event.text}; it is offered again")
            if event.verdict == "inconclusive":
                _not_judged(transition, event.text)


def _not_judged(transition: NodeTransition, text: str) -> None:
    """The coordinator cannot fetch or check our result. After `unjudged_limit` such rounds, leave the shard to other peers.

    Another shard would fail the same way, so avoid all of them for a while. The trained work stays on disk.
    """
    transition.set_work(unjudged=transition.work.unjudged + 1)
    if transition.work.owned and transition.work.unjudged >= transition.rules.unjudged_limit:
        _leave_to_others(transition, f"the coordinator cannot judge its checkpoint ({text})", save=True)


def _leave_to_others(transition: NodeTransition, why: str, *, save: bool) -> None:
    """Release the shard, and take no other for a while."""
    long = 10 * transition.rules.lease
    transition.set(avoided_until=dict.fromkeys(transition.rules.slots, transition.now + long))
    give_up(transition, why, save=save, seconds=long)


def _rejected(transition: NodeTransition, text: str) -> None:
    """Train the epoch again from the accepted state; after `rejection_limit` refusals in a row, give up the shard."""
    work, rules = transition.work, transition.rules
    head, count = work.pending[0], transition.state.rejections.get(work.shard, 0) + 1
    transition.set(rejections={**transition.state.rejections, work.shard: count})
    transition.warn(f"the checkpoint of epoch {head.epoch} of {slot_name(work.shard)} was refused: {text}")
    discard_work(transition, work.epoch)
    if count >= rules.rejection_limit:
        give_up(transition, f"{count} checkpoints in a row were refused, last: {text}", save=False, seconds=10 * rules.lease)
    elif transition.state.phase == "draining" or not work.owned:
        release(transition, save=False)
    else:
        start_sync(transition, work.shard, work.stand)
