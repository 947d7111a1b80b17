"""The part of the state machine that hears what the coordinator says of our results."""

from __future__ import annotations

from lutetia.node.machine.lease import give_up, own_accepted, release, start_sync, void
from lutetia.node.machine.messages import LookAtShards, OfferAnswered
from lutetia.node.machine.transition import NodeTransition
from lutetia.system.retry import backoff


def answered(turn: NodeTransition, event: OfferAnswered) -> None:
    work, rules = turn.state.work, turn.rules
    if not work or not work.pending or work.pending[0].digest != event.digest:
        return
    head, offers = work.pending[0], work.offers + 1
    turn.change(offering=None, offers=offers)
    jitter = 1 + rules.jitter("offer", event.digest, offers) / 4
    match event.verdict:
        case "accepted":
            own_accepted(turn, head.epoch, head.digest)
            turn.do(LookAtShards((work.shard,)))
        case "invalid":
            _rejected(turn, event.text)
        case "quarantined":
            void(turn, work.epoch)
            _leave_to_others(turn, event.text, save=False)
        case "superseded":
            turn.change(offer_at=turn.now + rules.heartbeat * jitter)
            turn.do(LookAtShards((work.shard,)))
        case "queued":
            wait = event.retry_after or backoff(offers + 1, first=rules.propagation, longest=rules.heartbeat, factor=1.5)
            turn.change(offer_at=turn.now + wait * jitter)
        case "busy":
            turn.change(offer_at=turn.now + (event.retry_after or rules.heartbeat) * jitter)
        case "inconclusive" | "unreachable":
            turn.change(offer_at=turn.now + (event.retry_after or rules.backoff(offers, "offer", event.digest)))
            if event.verdict == "inconclusive" or offers == 1:
                turn.warn(f"the checkpoint of epoch {head.epoch} was not judged: {event.text}; offering it again")
            if event.verdict == "inconclusive":
                _unjudged(turn, event.text)


def _unjudged(turn: NodeTransition, text: str) -> None:
    """The coordinator cannot fetch or check our result: after some rounds of that, somebody with a better line may try.

    Another shard would fare no better, so it is left to others, too, for a while. What was trained stays on disk.
    """
    turn.change(unjudged=turn.work.unjudged + 1)
    if turn.work.owned and turn.work.unjudged >= turn.rules.unjudged_limit:
        _leave_to_others(turn, f"the coordinator cannot judge its checkpoint ({text})", save=True)


def _leave_to_others(turn: NodeTransition, why: str, *, save: bool) -> None:
    """Give the shard up, and take no other for a while."""
    long = 10 * turn.rules.lease
    turn.set(shunned=dict.fromkeys(range(turn.rules.shards), turn.now + long))
    give_up(turn, why, save=save, seconds=long)


def _rejected(turn: NodeTransition, text: str) -> None:
    """Train the epoch again from the accepted state; a second refusal in a row means that we cannot do this shard."""
    work, rules = turn.work, turn.rules
    head, count = work.pending[0], turn.state.rejections.get(work.shard, 0) + 1
    turn.set(rejections={**turn.state.rejections, work.shard: count})
    turn.warn(f"the checkpoint of epoch {head.epoch} of shard {work.shard} was refused: {text}")
    void(turn, work.epoch)
    if count >= rules.rejection_limit:
        give_up(turn, f"{count} checkpoints in a row were refused, last: {text}", save=False, seconds=10 * rules.lease)
    elif turn.state.phase == "draining" or not work.owned:
        release(turn, save=False)
    else:
        start_sync(turn, work.shard, work.stand)
