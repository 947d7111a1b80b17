"""What does not go on in a run: what holds it up, since when, and what to do. Pure; two sentences for each.

Each rule looks at facts that the coordinator has itself seen. A stranger's refused result makes no shard red: only results of the
shard's holder, of a peer with accepted work, or of two peers say something about the shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lutetia.coordinator.acceptance.intake.newcomer_holds import Hold, hold
from lutetia.coordinator.ledger.events import ResultRefused
from lutetia.coordinator.ledger.run_state import HISTORY, LOSS_CHECKS, RunState, ShardLedger, WaitingResult
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import StallStatus
from lutetia.protocol.schema.verdicts import CheckName

STALLED_AUDIT_TRIES = 2
"""An audit that ended so often without a verdict counts as stalled."""
STALLED_AUDIT_TENURES = 6
"""An audit that has been due for so many tenures counts as stalled."""
SHARDS_EXPLAINED, LINEAGES_EXPLAINED, MERGES_EXPLAINED, AUDITS_EXPLAINED, NODES_EXPLAINED = 24, 8, 2, 8, 16
"""The document has room for so many of each."""
_REMEDIES: dict[CheckName, str] = {
    "transfer": "Its author's uploads do not arrive: see the log on both sides, or let another node take the shard.",
    "format": "Compare the versions of Lutetia in `lutetia swarm status`, and update the older side.",
    "numbers": "Compare the versions of Lutetia in `lutetia swarm status`; training that diverges needs a new run with a lower "
    "learning rate.",
}


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What the status document knows of a shard besides the ledger. Times are Unix seconds.

    `holder`: who holds it. `due`: when its next acceptance is due. `free_since`: since when nobody claims it. `standbys`: nodes
    that are online and hold nothing. `lent`: what a check that is lent to nodes waits for; empty: none does. `merge_due`: from
    when its gathered results are merged; None: it has none.
    """

    holder: str | None
    due: float | None
    free_since: float | None
    standbys: int
    lent: str = ""
    merge_due: float | None = None


def is_quiet(manifest: Manifest, now: float) -> bool:
    """Whether no shard counts as stalled: the run is paused, or was resumed less than a lease ago."""
    orders = manifest.orders
    return orders.paused is not None or (orders.resumed is not None and 0 <= now - orders.resumed < manifest.timing.lease)


def shard_stall(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    """What holds the shard up; None while it goes on, or once its budget is done."""
    shard = state.shards[index]
    if shard.epoch >= state.epochs:
        return None
    rules = (_doubted, _refused, _behind_audits, _held, _waiting, _unmerged, _unheld, _overdue)
    return next((stall for rule in rules if (stall := rule(state, manifest, index, facts, now))), None)


def _doubted(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    shard = state.shards[index]
    doubts = [candidate.doubt for candidate in shard.candidates.values() if candidate.doubt]
    if not doubts:
        return None
    doubt = min(doubts, key=lambda event: event.time)
    if now - doubt.time <= manifest.timing.lease:
        return None  # short proofs are part of the work
    if shard.accepted in state.audits:
        doing = f"The coordinator replays epoch {shard.epoch} and then the result built on it"
    else:
        doing = "The coordinator replays a result"
    why = f"{doing}, which fails the check {doubt.check}: {doubt.text}."
    remedy = f"Nothing: it is accepted if the replay confirms it. {_looser(doubt.check)}"
    return StallStatus(kind="shard", shard=index, since=doubt.time, why=why, remedy=remedy)


def _refused(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    shard = state.shards[index]
    refusals = [verdict for verdict in shard.judged.values() if isinstance(verdict, ResultRefused) and _says_something(verdict)]
    owners = {verdict.owner for verdict in refusals}
    known = any(owner == facts.holder or state.peer(owner).accepted for owner in owners)
    if not refusals or not (known or len(owners) > 1) or _under_check(shard) or shard.gathered:
        return None
    last, peers = refusals[-1], "peer" if len(owners) == 1 else f"{len(owners)} peers"
    results = f"{len(refusals)} result{'s' if len(refusals) > 1 else ''} of {'a ' if len(owners) == 1 else ''}{peers}"
    why = f"{results} for epoch {shard.epoch + 1} did not pass, last at the check {last.check}: {last.text}."
    return StallStatus(kind="shard", shard=index, since=refusals[0].time, why=why, remedy=_remedy(index, shard, last.check))


def _says_something(verdict: ResultRefused) -> bool:
    """Refusals before anything is fetched, and those of quarantined peers, concern their author alone."""
    return verdict.again_at is None and verdict.check in ("transfer", "format", "numbers", "holdout", "raw")


def _under_check(shard: ShardLedger) -> bool:
    return any(not candidate.attempts for candidate in shard.candidates.values())


def _remedy(index: int, shard: ShardLedger, check: CheckName) -> str:
    if check not in LOSS_CHECKS:
        return _REMEDIES.get(check, "See the coordinator's log.")
    again = "The same result, made again, is replayed and accepted if the replay confirms it."
    back = f" Or go back an epoch: `lutetia coordinator rollback RUN {index} {shard.epoch - 1}`." if shard.epoch else ""
    return f"{again} {_looser(check)}{back}"


def _looser(check: CheckName) -> str:
    field = "raw_tolerance" if check == "raw" else "holdout_tolerance"
    return f"To accept more at once, loosen the check: `lutetia run upgrade RUN --set {field}=…`."


def _behind_audits(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    audits = [audit for audit in state.audits.values() if audit.shard == index]
    oldest = min(audits, key=lambda audit: audit.epoch, default=None)
    if oldest is None or state.shards[index].epoch + 1 - oldest.epoch <= HISTORY - 2:
        return None
    why = f"The audit of epoch {oldest.epoch} is {HISTORY - 2} epochs behind, and results wait until it is done."
    remedy = "Let more nodes stand by, which take audits, or give the coordinator a faster machine."
    return StallStatus(kind="shard", shard=index, since=oldest.since, why=why, remedy=remedy)


def _held(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    """A result that waits for the replay of an unproved epoch below it (`newcomer_holds`)."""
    waiting = [candidate for candidate in state.shards[index].candidates.values() if not candidate.doubt]
    holds = [(one, hold(state, manifest, one)) for one in sorted(waiting, key=lambda candidate: candidate.seen)]
    oldest, held = next(((one, found) for one, found in holds if found and now < found.until), (None, None))
    if oldest is None or held is None or now - oldest.seen <= manifest.timing.lease:
        return None
    if held.why == "convictions":
        return _on_probation(index, oldest, held, now)
    whose = "a newcomer, " if held.why == "newcomer" else ""
    doing = "is still to be replayed" if held.why == "newcomer" else "was found invalid, and it is not decided what follows"
    result = f"A result for epoch {oldest.record.epoch} by {_peer(oldest.record.owner)} waits"
    why = f"{result}: epoch {held.epoch} by {whose}{_peer(held.author)} {doing}, and {held.built} epochs of others stand on it."
    remedy = (
        f"Nothing: if the checks pass, it is accepted once the replay ends, in {held.until - now:.0f} s at the latest. "
        "More standbys, or a faster coordinator, replay sooner."
    )
    return StallStatus(kind="shard", shard=index, since=oldest.seen, why=why, remedy=remedy)


def _on_probation(index: int, waiting: WaitingResult, held: Hold, now: float) -> StallStatus:
    lately = f"{held.built} author{' was' if held.built == 1 else 's were'} convicted on this shard lately"
    why = f"A result for epoch {held.epoch} by {_peer(held.author)}, whose work is not proved yet, waits: {lately}."
    remedy = f"Nothing: a result of an author with proved work goes first, else it is accepted in {held.until - now:.0f} s."
    return StallStatus(kind="shard", shard=index, since=waiting.seen, why=why, remedy=remedy)


def _waiting(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    """A result whose checks take a lease longer than checks took so far."""
    waiting = [candidate for candidate in state.shards[index].candidates.values() if not candidate.doubt]
    oldest = min(waiting, key=lambda candidate: candidate.seen, default=None)
    if oldest is None or now - oldest.seen <= _patience(state, manifest):
        return None
    tried = f" after {oldest.attempts} tries without a verdict" if oldest.attempts else ""
    why = f"A result for epoch {oldest.record.epoch} by {_peer(oldest.record.owner)} still waits for its checks{tried}."
    last = next((r.text for r in reversed(state.refusals) if r.checkpoint == oldest.record.digest), "")
    remedy = f"See the coordinator's log{f' ({last[:600]})' if last else ''}; if the checks are slow, raise checks_at_once."
    remedy = _more_checkers(facts) or remedy
    return StallStatus(kind="shard", shard=index, since=oldest.seen, why=why, remedy=remedy)


def _patience(state: RunState, manifest: Manifest) -> float:
    """Seconds that checks may take: a lease longer than three times what those of a result took so far."""
    usual = sum(cost.seconds for (check, _), cost in state.spent.items() if check != "audit") / max(1, state.accepted)
    return manifest.timing.lease + 3 * usual


def _more_checkers(facts: ShardFacts) -> str:
    """Empty where no lent check waits."""
    return f"Let more nodes stand by whose devices run its expert: {facts.lent}." if facts.lent else ""


def _unmerged(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    """Gathered results of lanes whose merge is due, and is not made or not checked."""
    if facts.merge_due is None or now - facts.merge_due <= _patience(state, manifest):
        return None
    shard = state.shards[index]
    why = f"The merge of the {len(shard.gathered)} accepted lanes of epoch {shard.epoch + 1} is due, and has not ended."
    remedy = _more_checkers(facts) or "The coordinator's log says what it waits for; if it says nothing, use a faster disk."
    return StallStatus(kind="shard", shard=index, since=facts.merge_due, why=why, remedy=remedy)


def _unheld(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    if facts.free_since is None or now - facts.free_since <= manifest.timing.lease:
        return None
    if facts.standbys:
        why = f"No node holds it, although {facts.standbys} stand{'s' if facts.standbys == 1 else ''} by."
        remedy = "Ask those nodes why: `lutetia status` says whether the shard fits them, or they avoid it after refusals."
    else:
        why, remedy = "No node holds it, and none stands by.", "Find more volunteers: `lutetia join TICKET` on another machine."
    return StallStatus(kind="shard", shard=index, since=facts.free_since, why=why, remedy=remedy)


def _overdue(state: RunState, manifest: Manifest, index: int, facts: ShardFacts, now: float) -> StallStatus | None:
    if facts.holder is None or facts.due is None or now <= facts.due:
        return None
    why = f"{_peer(facts.holder)} holds it, and no result of it was accepted in the time that its epochs took so far."
    remedy = "Look at `lutetia status` on that node; once its claim protects it no more, a standby takes the shard."
    return StallStatus(kind="shard", shard=index, since=facts.due, why=why, remedy=remedy)


def node_stall(state: RunState, owner: str, health: str, shard: int | None, due: float | None) -> StallStatus | None:
    """Why the node's work does not count, for a node that is overdue or quarantined. `due`: since when it is overdue."""
    if health == "quarantined":
        event = state.quarantined[owner]
        remedy = "If its operator explains it, `lutetia coordinator pardon RUN PEER` lifts the quarantine."
        return StallStatus(kind="node", owner=owner, since=event.time, why=f"It is quarantined: {event.text}.", remedy=remedy)
    if health != "overdue" or shard is None or due is None:
        return None
    last = next((refusal for refusal in reversed(state.refusals) if refusal.owner == owner and refusal.shard == shard), None)
    if last:
        why = f"Its last result for shard {shard} did not pass the check {last.check}: {last.text}."
        remedy = f"`lutetia run why RUN {shard}` says what holds the shard up."
    else:
        why, remedy = f"It holds shard {shard}, and offers no result.", "Look at `lutetia status` and the log on that node."
    return StallStatus(kind="node", shard=shard, owner=owner, since=due, why=why, remedy=remedy)


def audit_stalls(state: RunState, manifest: Manifest, now: float) -> Iterator[StallStatus]:
    """The audits that do not end."""
    patience = STALLED_AUDIT_TENURES * manifest.timing.tenure
    for audit in state.audits.values():
        if audit.attempts < STALLED_AUDIT_TRIES and now - audit.since <= patience:
            continue
        part = "whole epoch" if audit.whole else "first steps"
        if audit.attempts:
            why = f"{audit.attempts} replays of the {part} ended without a verdict."
        else:
            why = f"The replay of the {part} has not been done for {STALLED_AUDIT_TENURES} tenures."
        remedy = "The coordinator's log says why; more standbys, or a faster coordinator, replay more."
        yield StallStatus(kind="audit", shard=audit.shard, epoch=audit.epoch, since=audit.since, why=why, remedy=remedy)


def dropped_snapshot(state: RunState) -> Iterator[StallStatus]:
    """The snapshot that this coordinator had started from, if it was found to be wrong. Red until the next start."""
    if event := state.dropped_snapshot:
        why = f"The coordinator had started from a snapshot of {event.events} events that does not follow from its ledger."
        remedy = (
            "All events were added up again, and a new snapshot was made. Somebody may have the coordinator's key, or the "
            "machine's memory is faulty: look at both, then start the coordinator again."
        )
        yield StallStatus(kind="ledger", since=event.time, why=why, remedy=remedy)


def suspected_lineages(state: RunState) -> Iterator[StallStatus]:
    """The oldest accepted epoch of each shard that an audit found invalid, while it is not decided what becomes of it."""
    for index, shard in state.shards.items():
        if not shard.suspects:
            continue
        link = next((link for link in shard.lineage if link.acceptance.checkpoint in shard.suspects), None)
        if link is None:
            continue
        given, due = link.acceptance, sum(audit.shard == index and audit.whole for audit in state.audits.values())
        author = state.quarantined.get(given.author)
        why = (
            f"An audit found epoch {given.epoch} of {_peer(given.author)} invalid, and {shard.epoch - given.epoch} epochs stand "
            f"on it. They are kept if replays prove them good; {due} are due."
        )
        remedy = f"Nothing: if the replays do not prove them good, the shard goes back to epoch {given.epoch - 1} by itself."
        since = author.time if author else link.at
        yield StallStatus(kind="lineage", shard=index, epoch=given.epoch, owner=given.author, since=since, why=why, remedy=remedy)


def explained(
    ledger: Iterable[StallStatus], shards: Iterable[StallStatus], lineages: Iterable[StallStatus],
    merges: Iterable[StallStatus], audits: Iterable[StallStatus], nodes: Iterable[StallStatus],
) -> list[StallStatus]:  # fmt: skip
    """Those that the document has room for: the oldest of each kind."""
    kinds = (
        (ledger, 1), (shards, SHARDS_EXPLAINED), (lineages, LINEAGES_EXPLAINED),
        (merges, MERGES_EXPLAINED), (audits, AUDITS_EXPLAINED),
        (nodes, NODES_EXPLAINED),
    )  # fmt: skip
    return [stall for stalls, most in kinds for stall in sorted(stalls, key=lambda stall: stall.since)[:most]]


def _peer(owner: str) -> str:
    return f"node …{peer_id_of(owner)[-8:]}"
