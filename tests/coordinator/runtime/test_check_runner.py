"""Which blobs the coordinator keeps, and the judge loop with a scripted check runner."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import CheckFailed, Limits, Replayed, Verdict
from lutetia.coordinator.acceptance.loss_bounds import Losses
from lutetia.coordinator.acceptance.messages import Offered, ReplayProcess, StartAudit
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.events import MixtureStitched, RouterTrained
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.mixtures.stitcher import next_step
from lutetia.coordinator.runtime.check_runner import KEPT_STATES, NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord
from tests.coordinator.acceptance.judge_driver import (
    COORDINATOR,
    PEERS,
    START,
    drive_judge,
    first_event,
    limits_of,
    make_manifest,
    make_record,
)


def test_weights_and_traces_are_kept_as_long_as_their_epoch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The history is three epochs here instead of 64."""
    monkeypatch.setattr("lutetia.coordinator.ledger.reducer.HISTORY", 3)
    c, records = drive_judge(epochs=9), []
    runners = []
    for keep_all in (False, True):
        blobs, incoming = BlobStore(tmp_path / f"blobs {keep_all}"), BlobStore(tmp_path / f"incoming {keep_all}")
        runners.append(
            NetworkCheckRunner(
                None, make_manifest(epochs=9), blobs, incoming, None, None, 1.0, None, keep_all_weights=keep_all,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip
    for epoch in range(1, 7):
        refs = [refs_of(runner, epoch) for runner in runners]
        records.append(c.accept(PEERS[0], weights=refs[0][0], state=refs[0][1], trace=refs[0][2]))
        if epoch > 1:
            c.finish_audit("valid")
        for runner in runners:
            runner.keep(records[-1])
            runner.forget(c.state.run)
    kept = [{record.epoch for record in records if record.weights.digest in set(runner.blobs.digests())} for runner in runners]
    traces = {record.epoch for record in records if record.trace.digest in set(runners[0].blobs.digests())}
    assert kept == [{4, 5, 6}, set(range(1, 7))]
    assert traces == {4, 5, 6}
    runners[0].mixture_blobs = lambda: {records[3].weights.digest}
    monkeypatch.setattr("lutetia.coordinator.ledger.reducer.HISTORY", 2)
    records.append(c.accept(PEERS[0], **dict(zip(("weights", "state", "trace"), refs_of(runners[0], 7), strict=True))))
    runners[0].keep(records[-1])
    runners[0].forget(c.state.run)
    held = set(runners[0].blobs.digests())
    weights, traces = ({each.epoch for each in records if ref(each) in held} for ref in (weights_of, trace_of))
    assert (weights, traces) == ({4, 6, 7}, {6, 7}), "a mixture names the weights of epoch 4"


def refs_of(runner: NetworkCheckRunner, epoch: int) -> list[BlobRef]:
    return [runner.incoming.add_bytes(f"{name}{epoch}".encode()) for name in ("weights", "state", "trace")]


def weights_of(record: CheckpointRecord) -> str:
    return record.weights.digest


def trace_of(record: CheckpointRecord) -> str:
    return record.trace.digest


class _Named(WorkerClient):
    """A worker process that fails each job with its own name."""

    async def ask(self, job: object, **_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise WorkerFailed(self._name)


async def test_replays_for_proofs_have_processes_of_their_own(tmp_path: Path):
    blobs, manifest, driver = BlobStore(tmp_path / "blobs"), make_manifest(), drive_judge()
    shard = manifest.shards[0].model_copy(update={"train": blobs.add_bytes(b"clips")})
    manifest = manifest.model_copy(update={"shards": (shard, *manifest.shards[1:])})
    weights, state, trace = (blobs.add_bytes(name.encode()) for name in ("weights", "state", "trace"))
    driver.accept(PEERS[0], weights=weights, state=state, trace=trace)
    names = ("checking", "auditing", "proving", "parents")
    checks, audits, proofs, parents = (_Named(tmp_path, name=name, threads=1, nice=0) for name in names)
    nobody = cast(Any, None)
    runner = NetworkCheckRunner(nobody, manifest, blobs, blobs, checks, audits, 1.0, nobody, set(), 4, proofs, parents)
    processes: tuple[ReplayProcess, ...] = ("audit", "proof", "parent")
    asked = [(await runner.replay(replace(driver.audits[0], process=process))).finding.text for process in processes]
    assert asked == ["auditing", "proving", "parents"]


def test_old_training_states_are_removed_and_weights_kept(tmp_path: Path):
    blobs, incoming = BlobStore(tmp_path / "blobs"), BlobStore(tmp_path / "incoming")
    check_runner = NetworkCheckRunner(None, make_manifest(epochs=9), blobs, incoming, None, None, 1.0, None)  # pyright: ignore[reportArgumentType]
    c, records = drive_judge(epochs=9), []
    for epoch in range(1, 9):
        weights, state, trace = (incoming.add_bytes(f"{name}{epoch}".encode()) for name in ("weights", "state", "trace"))
        records.append(c.accept(PEERS[0], weights=weights, state=state, trace=trace))
        check_runner.keep(records[-1])
        if epoch > 1:
            c.finish_audit("valid" if epoch != 3 else "inconclusive")
        check_runner.forget(c.state.run)
    held = set(blobs.digests())
    assert incoming.digests() == []
    assert all({record.weights.digest, record.trace.digest} <= held for record in records)
    due = {audit.epoch for audit in c.state.run.audits.values()}
    needed = {epoch for audit in due for epoch in (audit - 1, audit)} | set(range(9 - KEPT_STATES, 9))
    assert min(due) < 9 - KEPT_STATES
    assert {record.epoch for record in records if record.state.digest in held} == needed - {0}


@dataclass
class ScriptedCheckIO:
    """Checks whose outcome the test sets; losses by epoch."""

    losses_of: dict[int, float] = field(default_factory=dict)
    raw: dict[int, float] = field(default_factory=dict)
    trouble: dict[str, CheckFailed] = field(default_factory=dict)
    kept: list[CheckpointRecord] = field(default_factory=list)
    dropped: list[CheckpointRecord] = field(default_factory=list)

    async def limits(self) -> Limits:
        return limits_of(2)

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        if record.owner in self.trouble:
            raise self.trouble[record.owner]

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None: ...

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        return [1.0] * 8

    async def losses(self, record: CheckpointRecord) -> Losses:
        return [self.losses_of.get(record.epoch, 0.9)] * 8

    async def replay(self, audit: StartAudit) -> Replayed:
        return Replayed(AuditFinding(outcome="valid"), 0.1)

    def forget(self, run: RunState) -> None: ...

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        return [self.raw.get(record.epoch, 0.95)] * 8

    def still_whole(self, record: CheckpointRecord) -> Verdict | None:
        return None

    def keep(self, record: CheckpointRecord, of_lane: bool = False) -> None:
        self.kept.append(record)

    def discard(self, record: CheckpointRecord, run: RunState) -> None:
        self.dropped.append(record)


async def judged(
    path: Path, check_io: ScriptedCheckIO, offers: list[CheckpointRecord], until: int
) -> tuple[Ledger, list[AcceptanceRecord]]:
    """Run a judge loop until the ledger holds `until` final verdicts."""
    manifest = make_manifest(holdout_tolerance=0.1)
    ledger = Ledger.create(path / "ledger.sqlite", first_event(manifest))
    published: list[AcceptanceRecord] = []
    done = asyncio.Event()

    async def publish(acceptance: AcceptanceRecord | ResetRecord) -> None:
        assert isinstance(acceptance, AcceptanceRecord)
        published.append(acceptance)

    def changed(state: RunState) -> None:
        if state.accepted + state.rejected >= until:
            done.set()

    judge_loop = JudgeLoop(JudgeRules(manifest, COORDINATOR.public_key, b"s"), ledger, check_io, publish, lambda: START, changed)
    running = asyncio.create_task(judge_loop.run())
    for offer in offers:
        await judge_loop.submit(Offered(offer, START))
    await asyncio.wait_for(done.wait(), 120)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return ledger, published


async def test_judge_loop_writes_the_ledger_before_it_publishes(tmp_path: Path):
    manifest = make_manifest(holdout_tolerance=0.1)
    check_io = ScriptedCheckIO(trouble={PEERS[1].public_key: CheckFailed("invalid", "format", "header bomb")})
    bad, good = make_record(manifest, PEERS[1]), make_record(manifest, PEERS[0])
    ledger, published = await judged(tmp_path, check_io, [bad, good], 2)
    assert [(a.checkpoint, a.holdout_loss) for a in published] == [(good.digest, 0.9)]
    assert (check_io.kept, check_io.dropped) == ([good], [bad])
    assert ledger.state.shards[0].baseline == 1.0
    assert ledger.replay() == ledger.state
    ledger.close()


@pytest.mark.parametrize("loss", [1.11, float("nan"), float("inf")])
async def test_worse_or_undefined_loss_is_invalid(tmp_path: Path, loss: float):
    check_io = ScriptedCheckIO(losses_of={1: loss})
    ledger, published = await judged(tmp_path, check_io, [make_record(make_manifest(holdout_tolerance=0.1), PEERS[0])], 1)
    assert published == []
    assert [(refusal.check, refusal.verdict) for refusal in ledger.state.refusals] == [("holdout", "invalid")]
    ledger.close()


@pytest.mark.parametrize("raw", [1.31, float("nan")])
async def test_poisoned_raw_parameters_are_invalid(tmp_path: Path, raw: float):
    check_io = ScriptedCheckIO(raw={1: raw})
    ledger, published = await judged(tmp_path, check_io, [make_record(make_manifest(holdout_tolerance=0.1), PEERS[0])], 1)
    assert published == []
    assert [(refusal.check, refusal.verdict) for refusal in ledger.state.refusals] == [("raw", "invalid")]
    assert [(cost.check, cost.outcome) for cost in ledger.state.refusals[0].costs] == [
        ("transfer", "valid"), ("numbers", "valid"), ("holdout", "valid"), ("holdout", "valid"), ("raw", "invalid"),
    ]  # fmt: skip
    shown = status(ledger.state, make_manifest(), LiveView(), START)
    assert [(spent.check, spent.outcome, spent.count, spent.size) for spent in shown.checks] == [
        ("transfer", "valid", 1, 300), ("numbers", "valid", 1, 300), ("holdout", "valid", 2, 100), ("raw", "invalid", 1, 100),
    ]  # fmt: skip
    ledger.close()


async def test_loss_within_the_tolerance_is_accepted(tmp_path: Path):
    check_io = ScriptedCheckIO(losses_of={1: 1.09})
    ledger, published = await judged(tmp_path, check_io, [make_record(make_manifest(holdout_tolerance=0.1), PEERS[0])], 1)
    assert [acceptance.epoch for acceptance in published] == [1]
    ledger.close()


def test_next_step_of_the_stitcher():
    state = apply(RunState(), first_event(make_manifest(epochs=1)))
    assert next_step(state, when="refresh", rested=True) == "nothing"
    router = RouterTrained(time=START, epochs=(1, 0), router=make_record(make_manifest(), PEERS[0]).weights, accuracy=0.9)
    half = accepted(state, 0)
    assert next_step(half, when="refresh", rested=False) == "router"
    half = apply(half, router)
    assert next_step(half, when="refresh", rested=False) == "nothing"
    assert next_step(half, when="refresh", rested=True) == "mixture"
    assert next_step(half, when="end", rested=True) == "nothing"
    half = apply(half, MixtureStitched(time=START, epochs=(1, 0), mixture="a" * 64))
    assert next_step(half, when="refresh", rested=True) == "nothing"
    whole = accepted(half, 1)
    assert next_step(whole, when="end", rested=False) == "mixture", "the last one waits for nothing"
    whole = apply(whole, MixtureStitched(time=START, epochs=(1, 1), mixture="b" * 64))
    assert next_step(whole, when="end", rested=False) == "finish"


def accepted(state: RunState, shard: int) -> RunState:
    from lutetia.coordinator.ledger.events import CheckpointAccepted

    record = make_record(make_manifest(epochs=1), PEERS[0], shard)
    given = AcceptanceRecord(
        run=record.run, owner=COORDINATOR.public_key, issued=START, shard=shard, epoch=1, checkpoint=record.digest, parent=None,
        weights=record.weights, state=record.state, samples=4, author=record.owner, tenure_until=START, holdout_loss=0.5,
    )  # fmt: skip
    return apply(state, CheckpointAccepted(time=START, acceptance=given, parent_loss=1.0))
