"""The ledger as text, one sentence per event: `coordinator replay`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDone,
    AuditDue,
    AuditReported,
    BaselineMeasured,
    CheckerRefuted,
    CheckpointAccepted,
    CoordinatorStarted,
    CoordinatorStopped,
    CopiesKept,
    Event,
    HoldoutBurnt,
    LaneAccepted,
    LaneDropped,
    LanesMerged,
    LentCheckCounted,
    LineageKept,
    LineageRolledBack,
    LineageSuspected,
    ManifestPublished,
    MergeRefused,
    MixtureStitched,
    PeerPardoned,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    ResultDoubted,
    ResultRefused,
    ResultSeen,
    ResultSuperseded,
    RouterTrained,
    RunCreated,
    RunFinished,
    SampleCostMeasured,
    SnapshotDropped,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.owner.orders import GivenOrder, because


def sentence(event: Event) -> str:
    """What happened."""
    match event:
        case RunCreated():
            return f"run {event.name} ({event.run[:12]}) created: {event.shards} shards of {event.epochs} epochs"
        case ManifestPublished():
            given = "; ".join(map(_order, event.orders))
            return f"manifest version {event.version} published{f': {given}' if given else ''}"
        case CoordinatorStarted():
            return f"coordinator started ({event.software})"
        case CoordinatorStopped():
            return "coordinator stopped"
        case SampleCostMeasured():
            return f"training one sample takes {max(event.flops, default=0):.3g} FLOPs"
        case CopiesKept():
            owners = len({copy.owner for copy in event.copies})
            return f"{owners} {'peer' if owners == 1 else 'peers'} kept copies of accepted checkpoints"
        case BaselineMeasured():
            return f"shard {event.shard}: the initial model's held-out loss is {event.loss:.5f}"
        case ResultSeen(record=record):
            return f"shard {record.shard} epoch {record.epoch}: {record.owner[:8]} offers {record.digest[:12]} ({event.via})"
        case AcceptanceRecovered(acceptance=given):
            return f"shard {given.shard} epoch {given.epoch}: lost acceptance of {given.checkpoint[:12]} recovered from peers"
        case ResetRecovered():
            return f"shard {event.shard}: lost reset to the beginning recovered from peers (term {event.term})"
        case QuarantineRecovered():
            return f"peer {event.owner[:8]} is quarantined: {event.text}"
        case CheckpointAccepted(acceptance=given):
            return (
                f"shard {given.shard} epoch {given.epoch}: {given.checkpoint[:12]} of {given.author[:8]} accepted, "
                f"held-out loss {given.holdout_loss:.5f} after {event.parent_loss:.5f}{f' ({event.note})' if event.note else ''}"
            )
        case LaneAccepted(acceptance=given):
            return (
                f"shard {given.shard} epoch {given.epoch}: {given.checkpoint[:12]} of {given.author[:8]} accepted as lane "
                f"{_list(given.lanes)}, held-out loss {given.holdout_loss:.5f} after {event.parent_loss:.5f}"
            )
        case LanesMerged(acceptance=given):
            return (
                f"shard {given.shard} epoch {given.epoch}: lanes {_list(given.lanes)} merged into {given.checkpoint[:12]}, "
                f"held-out loss {given.holdout_loss:.5f} after {event.parent_loss:.5f}"
            )
        case MergeRefused():
            why = f"fails check {event.check}: {event.text}; the best of them goes on alone"
            return f"shard {event.shard} epoch {event.epoch}: the merge of lanes {_list(event.lanes)} {why}"
        case LineageRolledBack():
            back = f"rolled back to epoch {event.epoch}, {event.dropped} epochs are void (term {event.term})"
            why = f"because {event.checkpoint[:12]} was found invalid" if event.why == "invalid" else "by the run's operator"
            return f"shard {event.shard}: {back}, {why}"
        case PeerPardoned():
            return f"peer {event.owner[:8]} was pardoned and starts without trust"
        case SnapshotDropped():
            return (
                f"the snapshot of the first {event.events} events did not follow from the ledger; all events were added up again"
            )
        case CheckerRefuted():
            return f"peer {event.owner[:8]} is given no more checks: {event.text}"
        case LentCheckCounted():
            who = ", ".join(owner[:8] for owner in event.owners)
            worth = f"{event.samples} samples of credit each"
            return f"shard {event.shard} epoch {event.epoch}: checked ({event.check}) by {who}, {worth}"
        case HoldoutBurnt():
            return (
                f"shard {event.shard}: held-out clips {event.holdout[:12]} given to strangers for {event.checkpoint[:12]} alone"
            )
        case RouterTrained():
            return f"router trained, accuracy {100 * event.accuracy:.1f} %, for epochs {list(event.epochs)}"
        case MixtureStitched():
            made = f"mixture {event.mixture[:12]} stitched from epochs {list(event.epochs)}"
            return f"{made}; it is {'' if event.current else 'not '}current: {event.text}" if event.text else made
        case RunFinished():
            return "run finished: every budget is done and the final mixture is stitched"
        case _:
            return f"shard {event.shard} epoch {event.epoch}: {event.checkpoint[:12]} of {event.owner[:8]} {_verdict(event)}"


def _order(given: GivenOrder) -> str:
    peer = f" peer {given.peer[:8]}" if given.peer else " the run"
    word = {
        "pause": "paused", "resume": "resumed", "ban": "banned", "unban": "lifted the ban of", "hide-name": "hid the name of",
        "show-name": "showed the name again of",
    }.get(given.order, f"ordered {given.order} of")  # fmt: skip
    return f"the owner {word}{peer}{because(given.text)}"


def _list(lanes: tuple[int, ...]) -> str:
    return ", ".join(map(str, lanes))


def _verdict(
    event: ResultRefused
    | ResultDoubted
    | ResultSuperseded
    | AuditDue
    | AuditDone
    | AuditReported
    | PeerQuarantined
    | LineageSuspected
    | LineageKept
    | LaneDropped,
) -> str:
    match event:
        case LaneDropped():
            why = (
                "its author was quarantined" if event.why == "quarantine" else "the coordinator can make no epoch of it any more"
            )
            return f"is left out of lane {event.lane}: {why}"
        case ResultRefused():
            again = "" if event.again_at is None else f"; tried again in {event.again_at - event.time:.0f} s"
            return f"is {event.verdict}, check {event.check}: {event.text}{again}"
        case ResultDoubted():
            return f"fails check {event.check} and is replayed before it is decided: {event.text}"
        case ResultSuperseded():
            return f"is superseded by {event.by[:12]}"
        case AuditDue():
            why = {
                "streak": f"only {event.streak} valid in a row", "lottery": f"drawn by lottery, 1 in {event.streak}",
                "refusals": "results of several authors that were built on it were refused",
                "newcomer": "its author is new", "depth": "many epochs before it were not replayed whole",
                "lineage": "an epoch before it is invalid",
                "proof": "it failed a loss check",
            }  # fmt: skip
            part = "whole" if event.whole else "in part"
            return f"is due for an audit, {part} ({why.get(event.why, 'its author was convicted later')})"
        case AuditDone():
            by = f" by {event.by[:8]}" if event.by else ""
            text = f": {event.text}" if event.text else ""
            again = "" if event.again_at is None else f"; tried again in {event.again_at - event.time:.0f} s"
            again += ", the whole epoch" if event.closer else ""
            return f"audit{by} in {event.seconds:.1f} s: {event.outcome}{text}{again}"
        case AuditReported():
            return f"replayed by {event.by[:8]} in {event.seconds:.1f} s: {event.outcome}, to be verified ({event.text})"
        case LineageSuspected():
            return "is invalid; the epochs after it are audited before the shard is rolled back"
        case LineageKept():
            return f"is invalid, and the epochs after it are kept: {event.text}"
        case PeerQuarantined():
            return f"is invalid, its author is quarantined: {event.text}"
        case _:
            assert_never(event)


def open_ledger(folder: Path) -> Ledger:
    """The verified ledger of a run folder, also while a coordinator serves it. Raises ConfigError or IntegrityError."""
    return Ledger.open(RunFolder(folder).ledger, to_read=True)


def read_events(folder: Path) -> Iterator[Event]:
    """Every event of a run, oldest first."""
    ledger = open_ledger(folder)
    try:
        for row in ledger.rows():
            yield row.event()
    finally:
        ledger.close()


def tell(folder: Path, until: float | None = None) -> Iterator[str]:
    """One line per event up to `until` (Unix seconds), then totals."""
    state = RunState()
    ledger = open_ledger(folder)
    try:
        for row in ledger.rows():
            if until is not None and row.time > until:
                break
            yield f"{_clock(row.time)}  {sentence(row.event())}"
        state = ledger.replay(until)
    finally:
        ledger.close()
    counts = f"{state.accepted} results accepted, {state.rejected} invalid"
    yield f"{state.events} events: {counts}, epochs {list(state.accepted_epochs)}"
    for (check, outcome), spent in state.spent.items():
        each = f"{spent.seconds / spent.count:.2f} s and {spent.size / spent.count:.0f} bytes each"
        yield f"check {check}: {spent.count} {outcome}, {each}"


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")
