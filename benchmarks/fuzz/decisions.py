"""Fuzz targets that go through the decisions: any record to the judge, any records of a swarm to its status, any audit report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

from pydantic import TypeAdapter, ValidationError

from benchmarks.fuzz import examples
from benchmarks.fuzz.contract import Target, check_sentence
from benchmarks.fuzz.views import describe_event, show_everywhere
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, compare
from lutetia.coordinator.acceptance.checks import SizeLimits, Verdict
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    AuditDelivered,
    Audited,
    AuditWanted,
    CheckDone,
    FetchDone,
    JudgeTick,
    LendAudit,
    LimitsKnown,
    Offered,
    Proved,
    Publish,
    StartAudit,
    StartCheck,
    StartFetch,
    StartProof,
    Stimulus,
    Write,
)
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.digest import state_digest
from lutetia.coordinator.ledger.events import read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.lending.agreement import settle
from lutetia.coordinator.lending.loans import LendingDesk, take_report
from lutetia.coordinator.lending.reports import well_formed
from lutetia.coordinator.runtime.audit_service import job_of, relatives
from lutetia.coordinator.runtime.swarm_monitor import observed, sighted
from lutetia.node.services.standby_policy import assign_shards, free_rate, is_standby
from lutetia.protocol.claims import ShardView, latest_acceptance
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditReport, AuditRequest, open_request, sign_report
from lutetia.protocol.rpc.check_request import (
    KINDS,
    CheckJob,
    CheckReport,
    CheckRequest,
    open_check_request,
    sign_check_report,
)
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical, read_json
from lutetia.protocol.schema.model.blob_ref import BlobRef

MOST_LINES = 20
AUDITOR = examples.OWNER.public_key
_LONG = "a reason without end " * 200 + "\x1b[2J\u202e"
VERDICTS = (
    Verdict("valid", "holdout", "", 0.4, 0.5),
    Verdict("valid", "holdout", "", -1e38, 1e38),
    Verdict("invalid", "raw", _LONG, 3e38, 0.5),
    Verdict("inconclusive", "transfer", _LONG),
)
FINDINGS = (
    AuditFinding(outcome="valid", text=_LONG),
    AuditFinding(outcome="invalid", text=_LONG),
    AuditFinding(outcome="inconclusive", text=_LONG, closer=True, doubt=True),
)
_RECORD: TypeAdapter[r.Record] = TypeAdapter(r.Record)


@cache
def rules() -> JudgeRules:
    return JudgeRules(examples.manifest(), examples.COORDINATOR.public_key, b"a secret")


@cache
def ready() -> JudgeState:
    """A judge of a new run that knows its limits."""
    run = RunState()
    for event in examples.all_events()[:3]:
        run = apply(run, event)
    most = SizeLimits(1 << 41, 1 << 41, 1 << 41)
    return decide(JudgeState.restored(run), LimitsKnown({0: most, 1: most}, examples.NOW))[0]


def decide(state: JudgeState, stimulus: Stimulus) -> tuple[JudgeState, tuple[Action, ...]]:
    """One decision, and what it leads to: replies are read, events are written and described, acceptances are published."""
    state, actions = judge(rules(), state, stimulus)
    for action in actions:
        match action:
            case Answer(reply=reply):
                assert OfferReply.model_validate_json(canonical(reply), strict=True) == reply
                check_sentence(reply.text or "none")
            case Write(event=event):
                assert read_event(canonical(event)) == event
                describe_event(event)
            case Publish(acceptance=acceptance):
                assert len(r.seal(acceptance, examples.COORDINATOR, examples.NOW + 5)) <= r.MAX_RECORD_BYTES
            case LendAudit(audit=audit) if audit:
                answer = AuditAnswer(job=job_of(audit, examples.NOW + 5, examples.manifest()))
                assert AuditAnswer.model_validate_json(canonical(answer), strict=True) == answer
            case _:
                pass
    return state, actions


def judge_record(record: r.CheckpointRecord) -> None:
    """Offer `record` as it is, and with the place and lineage of a result that may be accepted; follow every way of both."""
    fields = {"run": examples.manifest().run_id, "shard": 0, "epoch": 1, "parent": None, "samples": 24}
    for offered in (record, record.model_copy(update=fields)):
        for via in ("offer", "poll"):
            follow(*decide(ready(), Offered(offered, examples.NOW, via)), examples.NOW + 1)
    asked, _ = decide(ready(), AuditWanted(AUDITOR, examples.NOW))
    follow(*decide(asked, Offered(record.model_copy(update=fields), examples.NOW)), examples.NOW + 1)


def follow(state: JudgeState, actions: Sequence[Action], now: float) -> None:
    """Do what `actions` ask for, once with each outcome that it may have, and so on until nothing is left to do."""
    ways = [outcome for action in actions for outcome in outcomes(action, now)]
    for outcome in ways:
        follow(*decide(state, outcome), now + 1)
    if not ways and state.run is not ready().run:
        _lend(state, now + 30)
        restart(state.run)


def outcomes(action: Action, now: float) -> Iterator[Stimulus]:
    """What may come of an action that takes time."""
    match action:
        case StartFetch(record=record):
            yield FetchDone(record, Verdict("valid", "transfer"), now)
            yield FetchDone(record, VERDICTS[-1], now)
        case StartCheck(record=record):
            yield from (CheckDone(record, verdict, now) for verdict in VERDICTS)
        case StartAudit(audit=audit):
            yield from (Audited(audit.checkpoint, finding, now, 1e9) for finding in FINDINGS)
        case StartProof(record=record):
            yield from (Proved(record, finding, now, 1e9) for finding in FINDINGS)
        case _:
            return


def _lend(state: JudgeState, now: float) -> None:
    """Lend a due audit to a peer, and take each report that it may send."""
    state, _ = decide(state, AuditWanted(AUDITOR, now))
    for checkpoint in state.lent:
        for finding in FINDINGS:
            decide(state, AuditDelivered(AUDITOR, checkpoint, finding, 1e7, now + 1))


def restart(run: RunState) -> None:
    """A coordinator that starts from `run`, as events have made it: its judge, its status and its digest."""
    decide(JudgeState.restored(run), JudgeTick(examples.NOW))
    state_digest(run)
    show_everywhere(status(run, examples.manifest(), LiveView(), examples.NOW))


def results(data: bytes) -> None:
    """Lines of records, each sealed by a peer as its own, whatever it holds."""
    for line in islice(data.splitlines(), MOST_LINES):
        try:
            record = r.CheckpointRecord.model_validate_json(canonical(read_json(line)), strict=True)
        except ValidationError:
            continue
        owned = {"owner": examples.PEER.public_key, "peer_id": examples.PEER.peer_id, "issued": examples.NOW}
        sealed = r.seal(record.model_copy(update=owned), examples.PEER, examples.NOW + 5)
        if len(sealed) <= r.MAX_RECORD_BYTES:
            opened = r.open_record(
                sealed, key=None, subkey=examples.PEER.public_key, expires=examples.NOW + 5, now=examples.NOW,
                limits=r.RecordLimits(2.0),
            )  # fmt: skip
            assert isinstance(opened, r.CheckpointRecord)
            judge_record(opened)


def swarm(data: bytes) -> None:
    """Lines of records as the DHT may hold them: what a coordinator shows of them, and what a node concludes."""
    found = [record for line in islice(data.splitlines(), MOST_LINES) for record in _parsed(line)]
    show_swarm(found)


def show_swarm(found: Sequence[r.Record]) -> None:
    now, shards = examples.NOW, range(len(examples.manifest().shards))
    nodes = [record for record in found if isinstance(record, r.NodeRecord)]
    claims = [record for record in found if isinstance(record, r.ClaimRecord)]
    view, _ = sighted([(node, now + 5) for node in nodes], [(claim, now + 5) for claim in claims], {}, now)
    histories = observed({}, view.claims, map(ShardView, shards), now, 60.0)
    live = LiveView(view.nodes, view.claims, histories=histories)
    show_everywhere(status(examples.run_state(), examples.manifest(), live, now, software="0.1"))
    latest_acceptance(record for record in found if isinstance(record, r.AcceptanceRecord | r.ResetRecord))
    standbys = {node.owner: free_rate(node) for node in nodes if is_standby(node)}
    assign_shards(examples.manifest().run_id, standbys, {shard: float(shard) for shard in range(len(shards))}, 1)
    for node in nodes:
        assert node.owner in relatives(node.owner, nodes)


def _parsed(line: bytes) -> Iterator[r.Record]:
    try:
        yield _RECORD.validate_json(canonical(read_json(line)), strict=True)
    except ValidationError:
        return


def audit_request(data: bytes) -> None:
    """A request for an audit; a report in it is compared with what its author published."""
    report = open_request(data, examples.PEER.peer_id).report
    if report is not None:
        judge_report(report)


def judge_report(report: AuditReport) -> None:
    losses = [float("nan") if loss is None else loss for loss in report.losses]
    finding = compare([0.5] * len(losses), losses, report.drift, report.made, report.made)
    state, _ = decide(ready(), AuditDelivered(report.owner, report.checkpoint, finding, report.seconds, examples.NOW))
    assert state == ready(), "nothing was lent"


def check_request(data: bytes) -> None:
    """A request for a lent check; a report in it is looked at, taken and compared with itself."""
    report = open_check_request(data, examples.PEER.peer_id).report
    if report is None:
        return
    assert take_report(LendingDesk(), report, examples.NOW) == (LendingDesk(), None, None), "nothing was lent"
    if not well_formed(CheckJob(id="1" * 64, kind="router", shard=0, until=0.0), report, 1):
        settle([report, report])


def _lines(keep: Callable[[r.Record], bool]) -> list[bytes]:
    found = [canonical(record) for record in examples.all_records() if keep(record)]
    return [*found, b"\n".join(found)]


def _requests() -> list[bytes]:
    report = AuditReport(
        run=examples.manifest().run_id, owner=examples.PEER.public_key, checkpoint="1" * 64, losses=(0.5, None, 0.25), drift=0.1,
        made=r.TrainedWith(software="0.1"), seconds=1.0,
    )  # fmt: skip
    return [canonical(sign_report(report, examples.PEER)), canonical(AuditRequest(owner=examples.PEER.public_key))]


def _check_requests() -> list[bytes]:
    asked = CheckRequest(owner=examples.PEER.public_key, kinds=KINDS, shards=(0, 1))
    report = CheckReport(
        run=examples.manifest().run_id, owner=examples.PEER.public_key, id="1" * 64, outcome="done", parent=(0.5, None),
        averages=(0.5, 0.25), raw=(0.5, 0.25), losses=(0.5, None), drift=0.1, made=r.TrainedWith(software="0.1"),
        router=BlobRef(digest="2" * 64, size=1), accuracy=0.5, seconds=1.0,
    )  # fmt: skip
    return [canonical(asked), canonical(sign_check_report(report, examples.PEER))]


DECISIONS = (
    Target("results", results, lambda: _lines(lambda record: record.kind == "checkpoint")),
    Target("swarm-records", swarm, lambda: _lines(lambda record: True)),
    Target("audit-request", audit_request, _requests),
    Target("check-request", check_request, _check_requests),
)
