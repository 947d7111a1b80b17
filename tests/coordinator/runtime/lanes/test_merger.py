"""Lanes carried out: real files are checked, gathered, merged, audited and merged again, and whoever dies meanwhile."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from lutetia.coordinator.ledger.events import LaneAccepted
from lutetia.coordinator.worker.messages import MeasureSizes
from lutetia.models.training.lanes.merge import LaneFiles, merge_lanes
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.runtime.lanes.lane_run import LaneRun

NOT_AUDITED = AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.0)


def merged_by_anybody(run: LaneRun, results: list[CheckpointRecord], folder: Path, threads: int) -> tuple[BlobRef, BlobRef]:
    """The merged weights and state, from the published files of its sources alone."""
    batch, store = run.manifest.optimisation.batch, run.folder.root / "copies"
    lanes = [
        LaneFiles(result.lane, run.manifest.lane_steps(result.lane) * batch, *(store / name for name in digests_of(result)))
        for result in results
    ]
    folder.mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merged = merge_lanes(run.manifest, 0, 1, lanes, folder)
    finally:
        torch.set_num_threads(before)
    return merged.weights, merged.state


def digests_of(result: CheckpointRecord) -> tuple[str, str, str]:
    return result.weights.digest, result.state.digest, result.trace.digest


def keep_copies(run: LaneRun, results: list[CheckpointRecord]) -> None:
    (run.folder.root / "copies").mkdir()
    for result in results:
        for digest in digests_of(result):
            (run.folder.root / "copies" / digest).write_bytes(run.incoming.path(digest).read_bytes())


async def stop_worker(run: LaneRun, name: str) -> psutil.Process:
    """A worker process, started and stopped: what it is asked for stays under way."""
    await run.workers[name].ask(MeasureSizes(), limit=300)
    process = psutil.Process(run.workers[name].pid)
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.timeout(600)
async def test_merge_survives_the_death_of_coordinator_and_worker_with_the_same_digest(tmp_path: Path):
    team = TeamSpec(lanes=3, shares=(1.0, 0.5, 1.0), quorum=1.0, deadline=3600.0)
    run = LaneRun.create(tmp_path, team, time.time, audit=NOT_AUDITED)
    run.start()
    await stop_worker(run, "merging")
    results = [run.train(f"node {lane}", lane) for lane in range(3)]
    keep_copies(run, results)
    for result in results:
        await run.offer(result)
    await run.until(lambda: bool(run.judge.state.merging), "the merge")
    assert sorted(run.state.shards[0].gathered) == [0, 1, 2]
    assert not run.incoming.digests(), "accepted results are kept where audits and merges find them"

    await run.stop()  # the coordinator dies within the merge
    half = run.folder.merging / "0" / "weights"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    merging = await stop_worker(run, "merging")
    run.start()
    assert not half.exists()
    await run.until(lambda: bool(run.judge.state.merging), "the merge after the restart")
    merging.kill()  # then the worker
    await run.until(lambda: run.state.shards[0].epoch == 1, "the merged epoch")

    given = run.state.shards[0].acceptance
    assert given
    assert (given.lanes, given.author) == ((0, 1, 2), run.judge.rules.coordinator)
    assert run.published == [given]
    for threads in (1, 3):
        assert merged_by_anybody(run, results, tmp_path / f"{threads}", threads) == (given.weights, given.state)
    held = set(run.blobs.digests())
    assert {given.weights.digest, given.state.digest, *(digest for result in results for digest in digests_of(result))} <= held
    assert not run.incoming.digests()
    assert not any(run.folder.merging.iterdir())
    events = [row.event() for row in run.ledger.rows()]
    assert sorted(event.samples for event in events if isinstance(event, LaneAccepted)) == [4, 8, 8]
    assert run.ledger.has_accepted(given.checkpoint)
    assert held & run.ledger.accepted_blobs(states_only=True) == held & {result.weights.digest for result in results} | {
        each.state.digest for each in (given, *results)
    }
    await run.close()


@pytest.mark.timeout(600)
async def test_audit_replays_the_lane_and_the_epoch_is_merged_without_the_liar(tmp_path: Path):
    run = LaneRun.create(tmp_path, TeamSpec(lanes=3, quorum=1.0, deadline=3600.0), time.time)
    run.start()
    auditing = await stop_worker(run, "auditing")
    results = [run.train("ann", 0), run.train("bob", 1), run.train("liar", 2, trained=3)]
    keep_copies(run, results)
    for result in results:
        await run.offer(result)

    await run.until(lambda: run.state.shards[0].epoch == 1, "the epoch with the liar")
    auditing.send_signal(signal.SIGCONT)

    def settled() -> bool:
        given = run.state.shards[0].acceptance
        return bool(run.state.quarantined) and given is not None and given.lanes == (0, 1) and not run.state.audits

    await run.until(settled, "the epoch without the liar")
    given = run.state.shards[0].acceptance
    assert given
    assert run.state.quarantined.keys() == {Identity.derived("liar").public_key}
    assert (given.weights, given.state) == merged_by_anybody(run, results[:2], tmp_path / "anybody", 1)
    credit = {name: run.state.credit[Identity.derived(name).public_key][0].standing for name in ("ann", "bob", "liar")}
    assert (credit["ann"], credit["bob"], credit["liar"]) == (8, 8, 0)
    await run.until(lambda: not {*digests_of(results[2])} & {*run.blobs.digests()}, "the removal of the liar's files")
    assert {*digests_of(results[0]), *digests_of(results[1])} <= {*run.blobs.digests()}
    await run.close()
