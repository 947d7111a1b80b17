"""What the owner's orders mean for results: a paused run accepts and loses none; those of a banned peer are refused. Pure."""

from __future__ import annotations

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import DiscardCandidate
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition, refusal
from lutetia.protocol.claims import slot_of
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.owner.orders import because


def is_paused(rules: JudgeRules) -> bool:
    """Whether nothing may be accepted now."""
    return rules.manifest.orders.paused is not None


def paused_reply(rules: JudgeRules) -> OfferReply | None:
    """The reply to a new result while the run is paused: its author keeps it, and offers it again. None: the run goes on."""
    pause = rules.manifest.orders.paused
    if pause is None:
        return None
    text = f"the run is paused by its owner{because(pause.text)}; keep the result, it is checked once the run goes on"
    return OfferReply(verdict="busy", text=text, retry_after=rules.manifest.timing.lease)


def dismiss_banned(transition: JudgeTransition) -> None:
    """Refuse the undecided results of peers that the owner has banned since they arrived."""
    orders = transition.rules.manifest.orders
    if not orders.banned or not transition.state.pending:
        return
    banned = {ban.peer for ban in orders.banned}
    for index in sorted(transition.state.pending):
        candidates = transition.run.shards[index].candidates.values()
        for record in [candidate.record for candidate in candidates if candidate.record.owner in banned]:
            verdict = Verdict("invalid", "quarantine", orders.refusal_of(record.owner))
            transition.write(refusal(record, verdict, transition.now))
            slot = slot_of(index, record.lane)
            if transition.state.checking.get(slot) == (record.owner, record.digest):
                transition.set(checking={other: key for other, key in transition.state.checking.items() if other != slot})
            transition.actions.append(DiscardCandidate(record))
        transition.tidy(index)
