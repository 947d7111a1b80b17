"""A run with lanes whose coordinator lends its checks: nodes check lanes, merged epochs and replays; it merges itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.lending.agreement import Settled
from lutetia.coordinator.lending.loans import LentCheck
from lutetia.coordinator.lending.runner import LentCheckRunner, NoWorker
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.worker.messages import MeasureSizes, SizesMeasured
from lutetia.models.data.parts.index import parts_of
from lutetia.node.trainer.checking.answers import answer_check
from lutetia.node.trainer.checking.questions import CheckQuestion
from lutetia.node.trainer.messages import CheckFinished, ReplayFinished, ReplayQuestion
from lutetia.node.trainer.replay import answer_replay
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer, RateLimit
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.check_request import (
    KINDS,
    CheckJob,
    CheckReport,
    CheckRequest,
    ReplayCheck,
    ResultCheck,
    ask_check,
    sign_check_report,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.transport.base import Transport
from tests.coordinator.runtime.lanes.lane_run import ArrivedCheckRunner, LaneRun
from tests.memory_transport.network import MemoryNetwork

ANN, LIAR = Identity.derived("ann"), Identity.derived("liar")
CHECKERS = tuple(Identity.derived(f"checker {number}") for number in range(2))
NAMED = (ANN, LIAR, *CHECKERS)


@dataclass
class RecordedLender(CheckLender):
    """A lender that remembers what it lent, and to whom it would not."""

    lent: list[tuple[CheckJob, frozenset[str]]] = field(default_factory=list)

    async def ask(self, check: LentCheck, job: CheckJob, lends: Mapping[str, BlobStore]) -> Settled:
        self.lent.append((job, check.excluded))
        return await super().ask(check, job, lends)


class LentLaneRun(LaneRun):
    """The coordinator starts no process but the one that merges."""

    transport: Transport
    sizes: SizesMeasured
    lender: RecordedLender
    computing: asyncio.Lock

    def make_runner(self, holdouts: Holdouts) -> NetworkCheckRunner:
        self.lender = RecordedLender(
            self.transport, lambda: self.manifest, lambda: self.state, list, lambda: None, lambda event: self.judge.append(event),
            frozenset(identity.public_key for identity in NAMED),
        )  # fmt: skip
        none = cast(Any, NoWorker())
        return ArrivedLentRunner(
            self.transport, self.manifest, self.blobs, self.incoming, none, none, 65536.0, holdouts, lender=self.lender,
            sizes=self.sizes,
        )  # fmt: skip


class ArrivedLentRunner(ArrivedCheckRunner, LentCheckRunner):
    """Every result has arrived, and nodes check it."""


@dataclass
class Checker:
    """A node that carries out checks with the trainer's own code."""

    run: LentLaneRun
    identity: Identity
    transport: Transport
    store: BlobStore
    done: list[CheckJob] = field(default_factory=list)

    async def work(self) -> None:
        request = CheckRequest(owner=self.identity.public_key, kinds=KINDS, shards=(0,))
        while True:
            answer = await ask_check(self.transport, self.run.transport.peer_id, request)
            if answer.job is None:
                await asyncio.sleep(0.6)
                continue
            self.done.append(answer.job)
            found = await (self.check(answer.job) if answer.job.result else self.replay(answer.job.replay))
            report = CheckReport(
                run=self.run.manifest.run_id,
                owner=self.identity.public_key,
                id=answer.job.id,
                outcome="done",
                seconds=1.0,
                **found,
            )
            await ask_check(self.transport, self.run.transport.peer_id, sign_check_report(report, self.identity))

    async def fetched(self, ref: BlobRef | None) -> Path | None:
        if ref is None:
            return None
        return await fetch_blob(self.transport, self.store, ref, [Provider(self.run.transport.peer_id, ())])

    async def data(self, ref: BlobRef) -> Path:
        path = await self.fetched(ref)
        assert path
        for part in parts_of(path):
            await self.fetched(part.blob)
        return path

    async def computed(self, answer: Callable[[Any], Any], question: Any) -> Any:
        """One at a time: real nodes have a process each, and here torch's generator would be everybody's."""
        async with self.run.computing:
            return await asyncio.to_thread(answer, question)

    async def check(self, job: CheckJob) -> dict[str, Any]:
        asked = job.result
        assert isinstance(asked, ResultCheck)
        files = {name: await self.fetched(getattr(asked, name)) for name in ("weights", "state", "trace", "parent")}
        question = CheckQuestion.model_validate(
            {
                **asked.model_dump(include={"draw", "rows", "fewest", "seconds"}), **files, "manifest": self.run.folder.manifest,
                "shard": 0, "epoch": job.epoch, "lanes": asked.lanes or (0,), "holdout": await self.data(asked.holdout),
                "device": "cpu", "threads": 1,
            }
        )  # fmt: skip
        answer = await self.computed(answer_check, question)
        assert isinstance(answer, CheckFinished), answer
        return answer.findings.model_dump(include={"parent", "averages", "raw"})

    async def replay(self, asked: ReplayCheck | None) -> dict[str, Any]:
        assert asked
        job, manifest = asked.audit, self.run.manifest
        files = {name: await self.fetched(getattr(job, name)) for name in ("weights", "state", "end_weights", "end_state")}
        question = ReplayQuestion.model_validate(
            {
                **job.model_dump(include={"shard", "lane", "epochs", "steps", "precision"}), **files,
                "manifest": self.run.folder.manifest, "epoch": job.epoch - 1, "data": await self.data(manifest.shards[0].train),
                "device": "cpu", "threads": 1, "doubt": (asked.near, asked.far, asked.coarse),
            }
        )  # fmt: skip
        answer = await self.computed(answer_replay, question)
        assert isinstance(answer, ReplayFinished), answer
        return answer.model_dump(include={"losses", "drift", "noise", "made"})


def is_of(job: CheckJob, asked: CheckJob) -> bool:
    """Whether the job is a loan of the check that was asked for."""
    return (job.result, job.replay) == (asked.result, asked.replay)


@pytest.mark.timeout(600)
async def test_lent_checks_of_lanes_find_the_liar_and_nobody_checks_own_work(tmp_path: Path) -> None:
    audit = AuditPolicy(streak=10, replay_steps=2, whole_epoch=0.0)
    run = cast(LentLaneRun, LentLaneRun.create(tmp_path, TeamSpec(lanes=2, quorum=1.0, deadline=3600.0), time.time, audit=audit))
    network = MemoryNetwork(latency=0.001)
    rules = record_check(run.manifest, network.now)
    run.transport = network.peer(Identity.load(run.folder.coordinator_key), rules)
    run.computing = asyncio.Lock()
    run.sizes = await run.workers["merging"].ask(MeasureSizes(), limit=300)
    run.start()
    run.judge.at_work = lambda: {0: frozenset({0} if run.state.quarantined else {0, 1})}  # a convicted peer's claim is void
    await run.lender.serve()
    await run.transport.serve(BLOB, BlobServer(run.blobs, RateLimit(None), run.lender.lent_store).answer)
    checkers = [
        Checker(run, identity, network.peer(identity, rules), BlobStore(tmp_path / f"of {number}"))
        for number, identity in enumerate(NAMED)
    ]
    results = [run.train("ann", 0), run.train("liar", 1, trained=3)]
    for result in results:
        await run.offer(result)
    working = [asyncio.create_task(checker.work()) for checker in checkers]

    def settled() -> bool:
        given = run.state.shards[0].acceptance
        done = bool(run.state.quarantined) and given is not None and given.lanes == (0,) and not run.state.audits
        return done or any(task.done() for task in working)

    await run.until(settled, "the epoch without the liar")
    assert not any(task.done() for task in working), [task.exception() for task in working if task.done()]
    assert run.state.quarantined.keys() == {LIAR.public_key}
    ann, liar, coordinator = {ANN.public_key}, {LIAR.public_key}, {run.judge.rules.coordinator}
    of_results = {job.result.lanes: barred - coordinator for job, barred in run.lender.lent if job.result}
    assert of_results == {(): ann, (1,): liar, (0, 1): ann | liar, (0,): ann}, "two lanes, their merge, and that without the liar"
    of_replays = {job.replay.audit.lane: barred for job, barred in run.lender.lent if job.replay}
    assert of_replays == {0: ann, 1: liar}
    for checker in checkers:
        own = checker.identity.public_key
        barred = {job.id for job in checker.done for kind, keys in run.lender.lent if own in keys and is_of(job, kind)}
        assert not barred, "nobody checks or replays what it gains by"
    of_merges = {checker.identity for checker in checkers for job in checker.done if job.result and len(job.result.lanes) == 2}
    assert of_merges == {*CHECKERS}
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    await run.close()
