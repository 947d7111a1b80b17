"""Lanes: accepted results wait by lane and are merged into the shard's next epoch. Pure.

Each lane's result passes the checks and audits of any result, on the accepted parent. It is then *gathered*. The gathered results
of a shard are merged as soon as

- no lane at which a node works is missing, or
- the manifest's quorum of lanes is there, or
- the first of them has waited for the manifest's deadline.

Equal nodes end an epoch some seconds apart, and what comes after the merge is lost. So at the quorum the merge waits a little
longer, GRACE of the epoch's time so far, for lanes at work that were in the merge before, and in one epoch of ALL_EVERY for all
lanes at work, so that a node that fell out comes in again. For who never delivers nothing waits in between.

So nothing waits for a slow node longer than the owner wants. A result that comes later is superseded, one that was accepted while
the merge was made is left out, and both keep their authors' records: whatever was accepted counts as accepted and credited.

The merged epoch passes the checks of any result. If it fails one, or cannot be made at several tries, the gathered result of the
lowest held-out loss goes on alone. If that cannot be read any more either, it is dropped, and the others are merged.

A gathered result whose author is quarantined is dropped. If an audit finds a result invalid that was merged, the shard goes back
to the epoch before the merge (`rollback`), the other results of that merge are gathered again, and are merged without it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from lutetia.coordinator.acceptance.audit_policy import build_of, consider_audit
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import note_success
from lutetia.coordinator.acceptance.intake.owner_orders import is_paused
from lutetia.coordinator.acceptance.messages import DiscardCandidate, KeepResult, Merged, Publish, StartMerge
from lutetia.coordinator.acceptance.transition import JudgeTransition, RunningMerge, acceptance_of
from lutetia.coordinator.ledger.events import LaneAccepted, LaneDropped, LanesMerged, MergeRefused, ResultSuperseded
from lutetia.coordinator.ledger.run_state import LOSS_CHECKS, AcceptedEpoch, ShardLedger
from lutetia.protocol.claims import slot_of
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import AUTHOR_MARK, MOST_AUTHORS, MOST_MORE_AUTHORS, CheckpointRecord

GRACE = 1 / 8
"""Of an epoch's time up to its quorum: so much longer the merge waits for lanes that are likely to come."""
ALL_EVERY = 4
"""In one epoch of so many it waits for all lanes at work."""


def quorum_of(team: TeamSpec) -> int:
    """Accepted results that are enough for a merge."""
    return math.ceil(team.quorum * team.lanes)


def merge_due(ledger: ShardLedger, team: TeamSpec, at_work: Collection[int] | None) -> float:
    """Unix seconds from when the gathered results of a shard are merged; infinite while there are none.

    `at_work`: the lanes at which nodes work, as their claims say; None: not known.
    """
    if not ledger.gathered:
        return math.inf
    times = sorted([link.at for link in ledger.gathered.values()])
    first = times[0]
    if ledger.term and any(link.acceptance.term < ledger.term for link in ledger.gathered.values()):
        return first  # they were merged before, with a result that proved invalid
    missing = None if at_work is None else {*at_work} - ledger.gathered.keys()
    if missing is not None and not missing:
        return first
    needed = quorum_of(team)
    if len(times) < needed:
        return first + team.deadline
    return min(times[needed - 1] + _grace(ledger, missing or (), times[needed - 1]), first + team.deadline)


def _grace(ledger: ShardLedger, missing: Collection[int], quorum_at: float) -> float:
    """Seconds that the merge waits after its quorum, which was there at `quorum_at`, for these lanes at work."""
    if ledger.acceptance is None or ledger.accepted_at is None:
        return 0.0  # nodes begin a first epoch at any time
    expected = (ledger.epoch + 1) % ALL_EVERY == 0 or not {*ledger.acceptance.lanes}.isdisjoint(missing)
    return GRACE * max(0.0, quorum_at - ledger.accepted_at) if missing and expected else 0.0


def gather(transition: JudgeTransition, record: CheckpointRecord, verdict: Verdict) -> None:
    """The result of a lane has passed its checks."""
    shard, manifest = transition.run.shards[record.shard], transition.rules.manifest
    assert verdict.loss is not None
    assert verdict.parent_loss is not None
    acceptance = acceptance_of(transition.rules, record, shard.term, verdict.loss, transition.now, (record.lane,))
    note_success(transition, record)
    transition.write(
        LaneAccepted(
            time=transition.now, acceptance=acceptance, parent_loss=verdict.parent_loss, note=verdict.text, costs=verdict.costs,
            build=build_of(record, manifest), samples=manifest.lane_steps(record.lane) * manifest.optimisation.batch,
        )
    )  # fmt: skip
    if not verdict.text:
        consider_audit(transition, record)
    transition.actions.append(KeepResult(record))
    supersede(transition, record.shard, record.digest, record.lane)


def supersede(transition: JudgeTransition, shard: int, by: str, lane: int | None = None) -> None:
    """Another result was accepted in the place of all candidates of a shard, or of one of its lanes."""
    for other in tuple(transition.run.shards[shard].candidates.values()):
        late = other.record
        if lane in (None, late.lane):
            transition.write(
                ResultSuperseded(
                    time=transition.now, shard=shard, epoch=late.epoch, owner=late.owner, checkpoint=late.digest, by=by
                )
            )
            transition.actions.append(DiscardCandidate(late))
            checking = transition.state.checking
            if checking.get(slot := slot_of(shard, late.lane)) == (late.owner, late.digest):
                transition.set(checking={other: held for other, held in checking.items() if other != slot})
    transition.tidy(shard)


def start_merges(transition: JudgeTransition) -> None:
    """Start every merge that is due and not under way."""
    team = transition.rules.manifest.team
    if team is None:
        return
    at_work = transition.state.at_work
    for index, ledger in transition.run.shards.items():
        if not ledger.gathered:
            continue
        merging = transition.state.merging.get(index, RunningMerge(()))
        if merging.sources or transition.now < merging.again_at:
            continue
        if transition.now >= merge_due(ledger, team, None if at_work is None else at_work.get(index, frozenset())):
            sources = tuple(_chosen(ledger, merging.alone))
            names = tuple(source.acceptance.checkpoint for source in sources)
            transition.set(merging={**transition.state.merging, index: merging._replace(sources=names)})
            transition.actions.append(StartMerge(index, ledger.epoch + 1, ledger.acceptance, sources))


def _chosen(ledger: ShardLedger, alone: bool) -> Iterator[AcceptedEpoch]:
    """The gathered results that are merged, by lane."""
    if alone:
        yield min(ledger.gathered.values(), key=lambda link: (link.acceptance.holdout_loss, link.lane))
    else:
        for lane in sorted(ledger.gathered):
            yield ledger.gathered[lane]


def receive_merge(transition: JudgeTransition, done: Merged) -> None:
    """Accept the merged epoch, try again, or let the best of its sources go on alone."""
    merging, ledger = transition.state.merging.get(done.shard), transition.run.shards[done.shard]
    gathered = {link.acceptance.checkpoint for link in ledger.gathered.values()}
    if merging is None or merging.sources != done.sources or not gathered.issuperset(done.sources):
        if merging is not None and merging.sources == done.sources:  # one of them was dropped meanwhile
            forget_merge(transition, done.shard)
        if done.record is not None:
            transition.actions.append(DiscardCandidate(done.record))
        return
    if is_paused(transition.rules):  # nothing is accepted now: it is merged again when the run goes on
        forget_merge(transition, done.shard)
        if done.record is not None:
            transition.actions.append(DiscardCandidate(done.record))
        return
    verdict, record = done.verdict, done.record
    passes_alone = len(done.sources) == 1 and verdict.outcome == "invalid" and verdict.check in LOSS_CHECKS
    if record is not None and verdict.loss is not None and (verdict.outcome == "valid" or passes_alone):
        _accept_merged(transition, record, verdict, done.sources)
        return
    if record is not None:
        transition.actions.append(DiscardCandidate(record))
    if verdict.outcome == "invalid":
        lanes = tuple(sorted(lane for lane, link in ledger.gathered.items() if link.acceptance.checkpoint in done.sources))
        transition.write(
            MergeRefused(
                time=transition.now, shard=done.shard, epoch=ledger.epoch + 1, lanes=lanes, check=verdict.check,
                text=verdict.text[:1000], costs=verdict.costs,
            )
        )  # fmt: skip
    if verdict.outcome == "inconclusive" and merging.attempts + 1 < transition.rules.attempts:
        again_at = transition.now + transition.rules.retry_after(merging.attempts)
        later = merging._replace(sources=(), attempts=merging.attempts + 1, again_at=again_at)
    elif merging.alone:
        _drop(transition, done.shard, done.sources[0])
        later = RunningMerge(())
    else:
        later = RunningMerge((), alone=True)
    transition.set(merging={**transition.state.merging, done.shard: later})


def _drop(transition: JudgeTransition, shard: int, checkpoint: str) -> None:
    """A gathered result that passed its checks, and of which no epoch can be made now: its files were damaged or lost here."""
    link = next(one for one in transition.run.shards[shard].gathered.values() if one.acceptance.checkpoint == checkpoint)
    given = link.acceptance
    transition.write(
        LaneDropped(
            time=transition.now, shard=shard, epoch=given.epoch, owner=given.author, checkpoint=checkpoint, lane=link.lane,
            why="unreadable",
        )
    )  # fmt: skip


def _accept_merged(transition: JudgeTransition, record: CheckpointRecord, verdict: Verdict, sources: tuple[str, ...]) -> None:
    ledger = transition.run.shards[record.shard]
    lanes = tuple(sorted(lane for lane, link in ledger.gathered.items() if link.acceptance.checkpoint in sources))
    assert verdict.loss is not None
    assert verdict.parent_loss is not None
    acceptance = acceptance_of(transition.rules, record, ledger.term, verdict.loss, transition.now, lanes)
    authors = tuple(ledger.gathered[lane].acceptance.author for lane in lanes)
    more = "".join(author[:AUTHOR_MARK] for author in authors[MOST_AUTHORS : MOST_AUTHORS + MOST_MORE_AUTHORS])
    acceptance = acceptance.model_copy(update={"authors": authors[:MOST_AUTHORS], "more_authors": more})
    transition.write(
        LanesMerged(
            time=transition.now, acceptance=acceptance, trace=record.trace, sources=sources, parent_loss=verdict.parent_loss,
            costs=verdict.costs,
        )
    )  # fmt: skip
    forget_merge(transition, record.shard)
    transition.actions.append(Publish(acceptance, record))
    supersede(transition, record.shard, record.digest)


def forget_merge(transition: JudgeTransition, shard: int) -> None:
    """What is being merged is out of date: its outcome will not count."""
    transition.set(merging={index: merging for index, merging in transition.state.merging.items() if index != shard})
