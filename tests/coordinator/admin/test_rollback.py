"""`coordinator rollback`: on a stopped run at once, on a served one by a note; what is impossible is said in one sentence."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lutetia.coordinator.acceptance.messages import DiscardCandidate, LedgerFacts, PublishReset
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.admin.rollback import NotedRollback, noted_rollbacks, roll_back, rolled_back
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import CheckpointAccepted, LineageRolledBack
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.runtime.operator_notes import OperatorNotes
from lutetia.coordinator.settings import RunSettings
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import ConfigError, UsageError
from tests.coordinator.acceptance.judge_driver import PEERS, START, JudgeDriver, drive_judge, make_record
from tests.coordinator.runtime.test_check_runner import ScriptedCheckIO
from tests.coordinator.tiny_data import build_tiny


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with four accepted epochs of shard 0; the training states of the first two are no longer kept."""
    created = create_run(build_tiny(tmp_path / "data"), tmp_path / "run", RunSettings(preset="tiny"))
    folder = RunFolder(created.folder)
    ledger, blobs = Ledger.open(folder.ledger), BlobStore(folder.blobs)
    for epoch in range(1, 5):
        ref = BlobRef(digest=f"{epoch}" * 64, size=100)
        if epoch > 2:
            content = f"state {epoch}".encode()
            ref = BlobRef(digest=blobs.add_bytes(content).digest, size=len(content))
        ledger.append([_accepted(ledger, epoch, ref)])
    ledger.close()
    return folder


def _accepted(ledger: Ledger, epoch: int, state: BlobRef) -> CheckpointAccepted:
    run, shard = ledger.state, ledger.state.shards[0]
    given = AcceptanceRecord(
        run=run.run, owner=run.coordinator, issued=1.0, shard=0, epoch=epoch, checkpoint=f"{epoch:064x}", parent=shard.accepted,
        weights=state, state=state, samples=epoch, author=PEERS[0].public_key, tenure_until=2.0, holdout_loss=0.4,
    )  # fmt: skip
    return CheckpointAccepted(time=1.0, acceptance=given, parent_loss=0.5)


def test_rollback_of_a_stopped_run_is_written_at_once(folder):
    assert roll_back(folder.root, 0, 3) == (1, True)
    ledger = Ledger.open(folder.ledger)
    shard, last = ledger.state.shards[0], list(ledger.rows())[-1].event()
    ledger.close()
    assert (shard.epoch, shard.term, ledger.state.shards[1].term) == (3, 1, 0)
    assert isinstance(last, LineageRolledBack)
    assert (last.why, last.dropped) == ("operator", 1)
    assert sentence(last) == "shard 0: rolled back to epoch 3, 1 epochs are void (term 1), by the run's operator"
    assert not ledger.state.quarantined


def test_rollback_of_a_served_run_leaves_a_note(folder):
    with folder.locked():
        assert roll_back(folder.root, 0, 0) == (4, False)
    assert noted_rollbacks(folder) == [NotedRollback(0, 0, 0)]
    (folder.root / "rollbacks" / "not a note").write_bytes(b"")
    assert noted_rollbacks(folder) == [NotedRollback(0, 0, 0)]


@pytest.mark.parametrize(
    ("shard", "epoch", "text"),
    [
        (7, 0, "the run has no shard 7; its shards are 0 to 1"),
        (0, 4, "shard 0 is at epoch 4 and cannot go back to epoch 4; name an epoch from 0 to 3"),
        (0, -1, "cannot go back to epoch -1; name an epoch from 0 to 3"),
        (1, 0, "shard 1 is at epoch 0 and cannot go back to epoch 0; there is nothing to take back"),
        (0, 2, "is not kept any more; it can go back to epochs 0, 3"),
    ],
)
def test_impossible_rollback_says_what_is_possible(folder, shard, epoch, text):
    with pytest.raises(UsageError) as refused:
        roll_back(folder.root, shard, epoch)
    assert text in str(refused.value)
    assert not noted_rollbacks(folder)


def test_rollback_without_a_run_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        roll_back(tmp_path, 0, 0)


def _grown() -> JudgeDriver:
    driver = drive_judge(epochs=9)
    for _ in range(3):
        driver.accept(PEERS[0])
    return driver


def test_noted_rollback_takes_what_is_under_check_along():
    driver = _grown()
    event = rolled_back(driver.state.run, NotedRollback(0, 0, 1), driver.now)
    assert event
    late = driver.accept(PEERS[1])
    waiting = make_record(driver.manifest, PEERS[2], 0, 5, late.digest)
    driver.offer(waiting)
    actions = driver.send(LedgerFacts((event,), driver.now))
    shard = driver.state.run.shards[0]
    assert (shard.epoch, shard.term, dict(shard.candidates), driver.state.pending) == (1, 1, {}, frozenset())
    assert [action.record for action in actions if isinstance(action, DiscardCandidate)] == [waiting]
    assert [action.record for action in actions if isinstance(action, PublishReset)] == [shard.acceptance]
    assert [event.dropped for event in driver.events if isinstance(event, LineageRolledBack)] == [3], "epoch 4 is counted, too"
    assert driver.offer(make_record(driver.manifest, PEERS[3], 0, 2, shard.accepted)).verdict == "queued"


@pytest.mark.parametrize("note", [NotedRollback(0, 1, 1), NotedRollback(0, 0, 3), NotedRollback(9, 0, 0)])
def test_note_that_no_longer_applies_makes_no_event(note):
    assert rolled_back(_grown().state.run, note, 1.0) is None


def test_late_rollback_event_is_ignored():
    driver = _grown()
    event = rolled_back(driver.state.run, NotedRollback(0, 0, 1), driver.now)
    assert event
    driver.send(LedgerFacts((event,), driver.now))
    assert driver.send(LedgerFacts((event,), driver.now)) == ()


async def test_serving_coordinator_follows_the_note_and_removes_it(folder):
    with folder.locked():
        roll_back(folder.root, 0, 3)
    published: list[object] = []
    ledger, driver = Ledger.open(folder.ledger), drive_judge()
    judge_loop = JudgeLoop(driver.rules, ledger, ScriptedCheckIO(), _into(published), lambda: START)
    judging = asyncio.create_task(judge_loop.run())
    notes = OperatorNotes(folder, judge_loop, _into([], None))
    await notes.follow()
    shard = judge_loop.state.run.shards[0]
    assert (shard.epoch, shard.term) == (3, 1)
    assert noted_rollbacks(folder) == []
    await notes.follow()
    assert judge_loop.state.run.shards[0].term == 1
    assert published == [shard.acceptance], "peers learn of it as of any rollback"
    judging.cancel()
    await asyncio.gather(judging, return_exceptions=True)
    ledger.close()


def _into(published: list[object], *record: object) -> Any:
    async def publish(*records: object) -> None:
        published.extend(records or record)

    return publish
