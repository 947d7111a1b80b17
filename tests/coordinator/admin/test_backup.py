"""Backup, restore and the ledger's head on real files, without a network."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lutetia.coordinator.admin.backup import INDEX, backup_run, read_index
from lutetia.coordinator.admin.create import CreatedRun
from lutetia.coordinator.admin.restore import restore_run
from lutetia.coordinator.holdouts import withdraw_holdouts
from lutetia.coordinator.ledger.digest import state_bytes, state_digest
from lutetia.coordinator.ledger.events import AcceptanceRecovered, CheckpointAccepted, CoordinatorStarted, ManifestPublished
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.signed_head import HeadFile, check_head, read_head
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.recovery import ahead
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import AuthorisationError, ConfigError, DiskError, IntegrityError, LutetiaError
from tests.coordinator.acceptance.judge_driver import PEERS, START, make_record
from tests.coordinator.test_serve import make_run


def acceptance(run: CreatedRun, folder: RunFolder, epoch: int, parent: str | None, text: bytes) -> CheckpointAccepted:
    """An accepted epoch of shard 0, with its blobs in the run's store."""
    store, manifest = BlobStore(folder.blobs), run.manifest
    weights, state = store.add_bytes(b"weights" + text), store.add_bytes(b"state" + text)
    record = make_record(manifest, PEERS[0], 0, epoch, parent, weights=weights, state=state)
    return accepted(manifest, record.digest, epoch, parent, weights, state)


def accepted(
    manifest: Manifest, digest: str, epoch: int, parent: str | None, weights: BlobRef, state: BlobRef
) -> CheckpointAccepted:
    given = AcceptanceRecord(
        run=manifest.run_id, owner=manifest.coordinators[0], issued=START + epoch, shard=0, epoch=epoch, checkpoint=digest,
        parent=parent, weights=weights, state=state, samples=epoch * manifest.checkpoint_samples, author=PEERS[0].public_key,
        tenure_until=START + 60, holdout_loss=0.5,
    )  # fmt: skip
    return CheckpointAccepted(time=START + epoch, acceptance=given, parent_loss=0.6)


def advance(run: CreatedRun, count: int = 1) -> list[CheckpointAccepted]:
    """Accept `count` more epochs of shard 0."""
    folder, events = RunFolder(run.folder), []
    ledger = Ledger.open(folder.ledger)
    HeadFile(folder.head, ledger, Identity.load(folder.coordinator_key))
    for _ in range(count):
        shard = ledger.state.shards[0]
        events.append(acceptance(run, folder, shard.epoch + 1, shard.accepted, os.urandom(8)))
        ledger.append(events[-1:])
    ledger.close()
    return events


@pytest.fixture
def run(tmp_path: Path) -> CreatedRun:
    made = make_run(tmp_path, shards=1)
    advance(made)
    return made


# --- backup and restore -----------------------------------------------------------------------------------------------------


def test_restored_run_equals_the_run(run: CreatedRun, tmp_path: Path):
    described = RunFolder(run.folder).mixtures
    described.mkdir()
    for name in ("json", "losses"):
        (described / f"{'a' * 64}.{name}").write_text(name)
    seen: list[tuple[int, int]] = []
    done = backup_run(run.folder, tmp_path / "backup", lambda stage, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == done.copied == done.index.bytes
    index = restore_run(tmp_path / "backup", tmp_path / "again")
    assert (index.run, index.accepted) == (run.run, 1)
    old, new = RunFolder(run.folder), RunFolder(tmp_path / "again")
    for name in ("manifest", "ticket", "endpoint", "owner_key", "coordinator_key"):
        assert getattr(new, name).read_bytes() == getattr(old, name).read_bytes()
    for key in (new.owner_key, new.coordinator_key):
        assert key.stat().st_mode & 0o777 == 0o600
    assert BlobStore(new.blobs).digests() == BlobStore(old.blobs).digests()
    held = BlobStore(new.holdouts).digests()
    assert held == BlobStore(old.holdouts).digests(), "still served to nobody"
    assert len(held) > len(run.manifest.shards), "with their parts"
    assert state_of(new) == state_of(old)
    assert sorted(path.read_text() for path in new.mixtures.iterdir()) == ["json", "losses"], "all mixtures stay addressable"
    assert new.restored.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700, "it holds keys"


def test_backup_of_an_earlier_version_restores_and_says_that_holdouts_were_served(
    run: CreatedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Earlier versions kept held-out clips among the served blobs; their signed index has no field for them."""
    folder, digest = RunFolder(run.folder), run.manifest.shards[0].holdout.digest
    served, held = BlobStore(folder.blobs), BlobStore(folder.holdouts)
    secret = held.digests()
    for each in secret:
        served.add_file(held.path(each))
        held.remove(each)
    backup_run(run.folder, tmp_path / "backup")
    assert b'"holdouts":[]' in (tmp_path / "backup" / INDEX).read_bytes()
    (tmp_path / "backup" / INDEX).write_bytes((tmp_path / "backup" / INDEX).read_bytes().replace(b'"holdouts":[],', b""))
    restore_run(tmp_path / "backup", tmp_path / "again")
    again = RunFolder(tmp_path / "again")
    for _ in range(2):
        caplog.clear()
        withdraw_holdouts(again, run.manifest)
        assert "served the held-out clips" in caplog.text, "at every start"
    assert BlobStore(again.holdouts).digests() == secret
    assert not set(BlobStore(again.blobs).digests()) & set(secret)
    BlobStore(again.holdouts).remove(digest)
    with pytest.raises(IntegrityError, match="lacks the held-out clips of shard 0"):
        withdraw_holdouts(again, run.manifest)


def state_of(folder: RunFolder) -> bytes:
    ledger = Ledger.open(folder.ledger)
    ledger.close()
    return state_bytes(ledger.state)


def test_second_backup_copies_only_what_is_new(run: CreatedRun, tmp_path: Path):
    out = tmp_path / "backup"
    backup_run(run.folder, out)
    assert backup_run(run.folder, out).copied == 0
    (later,) = advance(run)
    new = sum(ref.size for ref in (later.acceptance.weights, later.acceptance.state))
    second = backup_run(run.folder, out)
    assert second.copied == new
    assert second.index.accepted == 2
    assert [path.name for path in out.glob("state-*")] == [second.index.folder], "the older state is gone"
    assert restore_run(out, tmp_path / "again").events == second.index.events


def test_backup_while_the_ledger_grows_is_consistent(run: CreatedRun, tmp_path: Path):
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            advance(run)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for number in range(3):
            backup_run(run.folder, tmp_path / "backup")
            index = restore_run(tmp_path / "backup", tmp_path / f"again{number}")
            assert index.accepted == read_index(tmp_path / "backup").index.accepted >= 1
    finally:
        stop.set()
        writer.join()


def test_interrupted_backup_leaves_the_one_before_intact(run: CreatedRun, tmp_path: Path):
    out = tmp_path / "backup"
    first = backup_run(run.folder, out)
    advance(run)

    class Cut(Exception):
        pass

    def cut(stage: str, done: int, total: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        backup_run(run.folder, out, cut)
    assert restore_run(out, tmp_path / "again").events == first.index.events
    assert backup_run(run.folder, out).index.accepted == 2, "and the next one goes through"


def test_backup_and_restore_never_overwrite_something_else(run: CreatedRun, tmp_path: Path):
    out = tmp_path / "backup"
    backup_run(run.folder, out)
    with pytest.raises(ConfigError, match="a run is never overwritten"):
        restore_run(out, run.folder)
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other", shards=1)
    with pytest.raises(ConfigError, match="is a backup of run"):
        backup_run(other.folder, out)
    with pytest.raises(ConfigError, match="holds something else"):
        backup_run(run.folder, tmp_path / "data")
    with pytest.raises(ConfigError, match="holds no backup"):
        restore_run(tmp_path / "data", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def spoil_blob(out: Path) -> None:
    digest = next(blob.digest for blob in read_index(out).index.blobs if blob.size)
    path = out / "blobs" / digest[:2] / digest
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def lose_blob(out: Path) -> None:
    digest = read_index(out).index.blobs[0].digest
    (out / "blobs" / digest[:2] / digest).unlink()


def change_index(out: Path) -> None:
    document = json.loads((out / INDEX).read_bytes())
    document["index"]["events"] += 1
    (out / INDEX).write_text(json.dumps(document))


def change_ledger(out: Path) -> None:
    path = out / read_index(out).index.folder / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def lead_astray(out: Path) -> None:
    document = json.loads((out / INDEX).read_bytes())
    document["index"]["files"]["../../escaped"] = "0" * 64
    (out / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_blob, IntegrityError, "missing or damaged"),
        (lose_blob, IntegrityError, "missing or damaged"),
        (change_index, AuthorisationError, "not signed by a coordinator"),
        (change_ledger, IntegrityError, "has changed since"),
        (lead_astray, IntegrityError, "would leave its folder"),
        (lambda out: (out / INDEX).write_text("{"), IntegrityError, "malformed"),
    ],
)
def test_damaged_backup_restores_nothing(run: CreatedRun, tmp_path: Path, spoil, error: type[LutetiaError], words: str):
    out = tmp_path / "backup"
    backup_run(run.folder, out)
    spoil(out)
    with pytest.raises(error, match=words) as caught:
        restore_run(out, tmp_path / "again")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "again").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_damaged_blob_of_the_run_stops_the_backup(run: CreatedRun, tmp_path: Path):
    digest = run.manifest.shards[0].holdout.digest
    path = run.folder / "holdouts" / digest[:2] / digest
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(IntegrityError, match=f"blob {digest[:12]}"):
        backup_run(run.folder, tmp_path / "backup")
    assert not (tmp_path / "backup" / INDEX).exists()


# --- the ledger's head ------------------------------------------------------------------------------------------------------


def cut_tail(folder: RunFolder, events: int) -> None:
    """Shorten the ledger, as an older copy of the file or an editor would; its hash chain is still valid."""
    with sqlite3.connect(folder.ledger) as connection:
        connection.execute("DROP TRIGGER no_delete")
        connection.execute("DELETE FROM events WHERE id > (SELECT max(id) FROM events) - ?", (events,))
        connection.execute(
            "CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        )
    connection.close()


def test_shortened_ledger_is_refused_by_its_signed_head(run: CreatedRun):
    folder = RunFolder(run.folder)
    (last,) = advance(run)
    cut_tail(folder, 1)
    ledger = Ledger.open(folder.ledger, run.run)
    assert ledger.state.accepted == 1, "nothing inside the file shows that its end is gone"
    with pytest.raises(IntegrityError, match=r"ends at event \d+, but this coordinator has signed event \d+; restore the newest"):
        check_head(folder.head, ledger, run.manifest)
    other = last.acceptance.model_copy(update={"holdout_loss": 0.1})
    ledger.append([last.model_copy(update={"acceptance": other})])
    with pytest.raises(IntegrityError, match="is not the one that this coordinator has signed"):
        check_head(folder.head, ledger, run.manifest)
    ledger.close()


def test_ledger_ahead_of_its_head_passes_and_foreign_heads_fail(run: CreatedRun, tmp_path: Path):
    folder = RunFolder(run.folder)
    ledger = Ledger.open(folder.ledger, run.run)
    check_head(folder.head, ledger, run.manifest)
    ledger.append([CoordinatorStarted(time=START, software="x")])
    check_head(folder.head, ledger, run.manifest)
    head = read_head(folder.head)
    assert head
    assert head.head.events == ledger.head[0] - 1
    assert head.holds(run.run, run.manifest.coordinators)
    forged = HeadFile(tmp_path / "forged.json", ledger, Identity.derived("mallory"))
    forged.write()
    with pytest.raises(IntegrityError, match="not signed by a coordinator"):
        check_head(forged.path, ledger, run.manifest)
    (tmp_path / "torn.json").write_bytes(folder.head.read_bytes()[:40])
    with pytest.raises(IntegrityError, match="is damaged"):
        check_head(tmp_path / "torn.json", ledger, run.manifest)
    check_head(tmp_path / "absent.json", ledger, run.manifest)
    ledger.close()


def test_head_that_cannot_be_written_stops_the_coordinator(run: CreatedRun, tmp_path: Path):
    ledger = Ledger.open(RunFolder(run.folder).ledger, run.run)
    (tmp_path / "file").touch()
    HeadFile(tmp_path / "file" / "head.json", ledger, Identity.load(RunFolder(run.folder).coordinator_key))
    with pytest.raises((DiskError, OSError)):
        ledger.append([CoordinatorStarted(time=START, software="x")], durable=True)
    ledger.close()


# --- one state, byte for byte -----------------------------------------------------------------------------------------------


def test_replays_of_a_ledger_agree_byte_for_byte(run: CreatedRun, tmp_path: Path):
    advance(run, 5)
    ledger = Ledger.open(RunFolder(run.folder).ledger, run.run)
    here = state_bytes(ledger.state)
    assert state_bytes(ledger.replay()) == here
    ledger.copy_to(tmp_path / "copy.sqlite")
    ledger.close()
    copy = Ledger.open(tmp_path / "copy.sqlite", run.run)
    assert state_bytes(copy.state) == here
    copy.close()
    shutil.copytree(run.folder, tmp_path / "run copy")
    digests = [replayed(folder, seed) for folder, seed in ((run.folder, "1"), (run.folder, "2"), (tmp_path / "run copy", "3"))]
    assert digests == [state_digest(ledger.state)] * 3


def replayed(folder: Path, hash_seed: str) -> str:
    """The output of `coordinator replay` in a process with another hash seed."""
    done = subprocess.run(
        [sys.executable, "-m", "lutetia.cli", "coordinator", "replay", str(folder), "--json"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)["digest"]


def test_every_event_changes_the_digest(run: CreatedRun):
    folder = RunFolder(run.folder)
    ledger = Ledger.open(folder.ledger, run.run)
    seen = {state_digest(ledger.state)}
    for event in (
        ManifestPublished(time=START, version=2, digest="0" * 64, expires=START),
        CoordinatorStarted(time=START, software="x"),
        acceptance(run, folder, 2, ledger.state.shards[0].accepted, b"x"),
    ):
        ledger.append([event])
        seen.add(state_digest(ledger.state))
    assert len(seen) == 4
    ledger.close()


# --- lost acceptances -------------------------------------------------------------------------------------------------------


def test_record_ahead_of_the_ledger_is_recovered_once(run: CreatedRun):
    folder = RunFolder(run.folder)
    ledger = Ledger.open(folder.ledger, run.run)
    before = ledger.state
    now = before.shards[0].acceptance
    assert now
    newer = [now.model_copy(update={"epoch": epoch, "checkpoint": f"{epoch:064x}"}) for epoch in (2, 3)]
    assert ahead(before, [now, *newer]) == [newer[1]], "the newest of each shard"
    assert ahead(before, [now]) == []
    ledger.append([AcceptanceRecovered(time=START, acceptance=newer[1])])
    assert ahead(ledger.state, newer) == []
    assert ledger.state.shards[0].epoch == 3
    assert ledger.state.accepted == 3
    with pytest.raises(IntegrityError, match="cannot be recovered"):
        ledger.append([AcceptanceRecovered(time=START, acceptance=newer[0])])
    ledger.append([acceptance(run, folder, 4, newer[1].checkpoint, b"y")])
    assert ledger.state.shards[0].epoch == 4, "the lineage continues from there"
    ledger.close()
