"""A shard's files and blobs: lineage, resuming, publishing, removal. No torch."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lutetia.node.contributions import Contributions
from lutetia.node.runtime.workspace import AcceptedBase, RunPaths, Workspace
from lutetia.node.trainer.checkpoint_folder import (
    CHECKPOINT,
    FILES,
    CheckpointFolder,
    LocalState,
    chain,
    remembered_slots,
    resume_point,
)
from lutetia.protocol.blobs.store import BlobStore
from lutetia.system.errors import IntegrityError
from lutetia.system.files import sweep_parts
from tests.node.checkpoint_files import NOTHING, SlowBlobStore, kept, write_checkpoint
from tests.node.small_disk import make_read_only, small_disk
from tests.node.tiny_run import TinyRun, make_run

FIRST = kept(1, None)
SECOND = kept(2, FIRST.digest)
THIRD = kept(3, SECOND.digest)


def local(epoch: int, parent: str | None) -> LocalState:
    return LocalState(file=f"local-{epoch}-5.safetensors", epoch=epoch, step=5, parent=parent)


def test_chain_follows_parents_without_gaps():
    assert chain(0, None, [THIRD, FIRST, SECOND]) == [FIRST, SECOND, THIRD]
    assert chain(1, FIRST.digest, [FIRST, SECOND, THIRD]) == [SECOND, THIRD]
    assert chain(0, None, [FIRST, THIRD]) == [FIRST]
    assert chain(1, "e" * 64, [FIRST, SECOND]) == [], "another peer's epoch was accepted"


def test_resume_point_is_the_newest_descendant():
    assert resume_point(0, None, [], None).source == "base"
    assert resume_point(0, None, [], local(0, None)).source == "local"
    place = resume_point(0, None, [FIRST, SECOND], local(2, SECOND.digest))
    assert (place.source, place.epoch, place.parent, place.kept) == ("local", 2, SECOND.digest, SECOND)
    place = resume_point(0, None, [FIRST, SECOND], local(1, FIRST.digest))
    assert (place.source, place.epoch) == ("kept", 2), "an older local state is of no use"
    place = resume_point(1, "e" * 64, [FIRST, SECOND], local(1, FIRST.digest))
    assert (place.source, place.epoch, place.parent) == ("base", 1, "e" * 64), "another lineage"


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return make_run(tmp_path / "run")


@pytest.fixture
def workspace(run: TinyRun, tmp_path: Path) -> Workspace:
    paths = RunPaths(tmp_path / "state", run.manifest.run_id)
    return Workspace(paths, run.manifest, BlobStore(paths.blobs))


def test_publishing_shares_the_disk_space_and_is_idempotent(workspace: Workspace):
    item = write_checkpoint(workspace, 1, None)
    for _ in range(2):
        workspace.store_checkpoint(item, ())
    for name, ref in zip(FILES, item.refs, strict=True):
        stored, own = workspace.store.path(ref.digest), workspace.work(0).epoch_folder(1) / f"{name}.safetensors"
        assert stored.read_bytes() == own.read_bytes()
        assert stored.stat().st_ino == own.stat().st_ino
    assert set(workspace.held()) >= {ref.digest for ref in item.refs}


def test_sweep_keeps_files_being_published(workspace: Workspace):
    item = write_checkpoint(workspace, 1, None)
    workspace.store = SlowBlobStore(workspace.paths.blobs, workspace.work(0).sweep)
    workspace.store_checkpoint(item, ())
    assert set(workspace.store.digests()) == {ref.digest for ref in item.refs}
    assert sorted(path.name for path in workspace.work(0).epoch_folder(1).iterdir()) == sorted(
        [CHECKPOINT, *(f"{name}.safetensors" for name in FILES)]
    )


def test_checkpoint_damaged_on_disk_is_not_published(workspace: Workspace):
    item = write_checkpoint(workspace, 1, None)
    (workspace.work(0).epoch_folder(1) / "weights.safetensors").write_bytes(b"flipped")
    with pytest.raises(IntegrityError, match="damaged"):
        workspace.store_checkpoint(item, ())
    assert item.weights.digest not in workspace.store.digests()


def test_gap_in_the_chain_ends_it(workspace: Workspace):
    first = write_checkpoint(workspace, 1, None)
    second = write_checkpoint(workspace, 2, first.digest)
    write_checkpoint(workspace, 3, second.digest)
    (workspace.work(0).epoch_folder(2) / "state.safetensors").unlink()
    assert [item.epoch for item in workspace.pending(0, 0, None)] == [1]
    assert [item.epoch for item in workspace.work(0).kept()] == [1]


def test_acceptance_removes_older_checkpoints_and_the_base(workspace: Workspace):
    weights, state = workspace.store.add_bytes(b"fetched weights"), workspace.store.add_bytes(b"fetched state")
    workspace.work(0).path.mkdir(parents=True)
    workspace.set_base(0, AcceptedBase(epoch=1, checkpoint="c" * 64, weights=weights, state=state))
    second = write_checkpoint(workspace, 2, "c" * 64)
    third = write_checkpoint(workspace, 3, second.digest)
    for item in (second, third):
        workspace.store_checkpoint(item, ())
    workspace.superseded(0, 2)
    assert not workspace.store.has(weights.digest)
    assert workspace.store.has(second.weights.digest), "the accepted one is served"
    workspace.superseded(0, 3)
    assert not workspace.store.has(second.weights.digest)
    assert workspace.store.has(third.weights.digest)
    assert [item.epoch for item in workspace.work(0).kept()] == [3]


def test_discard_keeps_the_accepted_checkpoint_only(workspace: Workspace):
    first = write_checkpoint(workspace, 1, None)
    second = write_checkpoint(workspace, 2, first.digest)
    for item in (first, second):
        workspace.store_checkpoint(item, ())
    workspace.discard(0, 1)
    assert [item.epoch for item in workspace.work(0).kept()] == [1]
    assert not workspace.store.has(second.weights.digest)
    workspace.discard(0, None)
    assert workspace.work(0).kept() == []
    assert workspace.store.digests() == []


def test_discard_all_removes_damaged_fetched_blobs(workspace: Workspace, run: TinyRun):
    ref = run.add_data(0, workspace.store)
    workspace.work(0).path.mkdir(parents=True)
    with workspace.store.path(ref.digest).open("r+b") as file:
        file.write(b"rot")
    workspace.discard(0, None)
    assert not workspace.store.has(ref.digest)


def test_disk_limit_evicts_the_oldest_spare_blobs_only(workspace: Workspace):
    store = BlobStore(workspace.paths.blobs, limit_bytes=10_000)
    workspace.store = store
    refs = [store.add_bytes(bytes([number]) * 3000) for number in range(3)]
    workspace.make_room(2500, {refs[0].digest})
    assert [store.has(ref.digest) for ref in refs] == [True, False, True] or [store.has(ref.digest) for ref in refs] == [
        True,
        True,
        False,
    ]
    workspace.make_room(500, {refs[0].digest})
    assert sum(store.has(ref.digest) for ref in refs) == 2, "there was room"


def test_rollback_to_the_beginning_clears_the_base(workspace: Workspace):
    weights, state = workspace.store.add_bytes(b"fetched weights"), workspace.store.add_bytes(b"fetched state")
    workspace.set_base(0, AcceptedBase(epoch=3, checkpoint="c" * 64, weights=weights, state=state))
    workspace.set_base(0, None)
    assert workspace.known_base(0) is None
    assert not workspace.store.digests()


def test_own_checkpoint_is_not_removed_as_a_fetched_base(workspace: Workspace):
    """The DHT may still show the acceptance before ours."""
    first = write_checkpoint(workspace, 1, None)
    second = write_checkpoint(workspace, 2, first.digest)
    for item in (first, second):
        workspace.store_checkpoint(item, ())
    workspace.superseded(0, 2)
    workspace.set_base(0, AcceptedBase(epoch=1, checkpoint=first.digest, weights=first.weights, state=first.state))
    assert all(workspace.store.has(ref.digest) for ref in second.refs)


def test_base_is_known_from_own_work_or_an_earlier_sync(workspace: Workspace):
    first = write_checkpoint(workspace, 1, None)
    own = workspace.base(0, 1, first.digest, None)
    assert own is not None
    assert own.weights == first.weights
    assert workspace.base(0, 1, "d" * 64, None) is None
    base = AcceptedBase(epoch=4, checkpoint="d" * 64, weights=NOTHING, state=NOTHING)
    workspace.set_base(0, base)
    assert workspace.base(0, 4, "d" * 64, None) == base


def test_remembered_slots_and_garbage(tmp_path: Path):
    run = "ab" * 32
    folder = CheckpointFolder(tmp_path, run, 3)
    folder.path.mkdir(parents=True)
    (tmp_path / "junk").mkdir()
    assert remembered_slots(tmp_path, run) == frozenset()
    (folder.path / "local-0-5.safetensors").write_bytes(b"x")
    folder.set_local(local(0, None))
    assert remembered_slots(tmp_path, run) == {3}
    (folder.path / "local.json").write_text("{")
    assert folder.local() is None


def test_sweep_removes_what_a_killed_trainer_left(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, "ab" * 32, 0)
    (folder.path / "epoch-000001.part").mkdir(parents=True)
    (folder.path / ".local-1-1.safetensors.abc.part").touch()
    (folder.path / "local-1-0.safetensors").touch()
    folder.compiled.mkdir()
    (folder.compiled / "code.so").touch()
    folder.sweep()
    assert [path.name for path in folder.path.iterdir()] == ["local-1-0.safetensors"]


def test_sweep_goes_on_while_epochs_are_removed(tmp_path: Path):
    """The clean-up after an acceptance and the start of a trainer run in two threads."""
    folder, done = CheckpointFolder(tmp_path, "ab" * 32, 0), threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for epoch in range(20):
                folder.epoch_folder(epoch).mkdir(parents=True)
            for epoch in range(20):
                folder.drop_epoch(epoch)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(200):
            folder.sweep()
            sweep_parts(tmp_path)
    finally:
        done.set()
        other.join()


def test_sweeping_a_read_only_disk_leaves_what_is_there(tmp_path: Path):
    with small_disk(tmp_path / "small", "1m") as disk:
        folder = CheckpointFolder(disk, "ab" * 32, 0)
        (folder.path / "epoch-000001.part").mkdir(parents=True)
        (folder.path / ".local-1-1.safetensors.abc.part").touch()
        make_read_only(disk)
        folder.sweep()
        assert len(list(folder.path.iterdir())) == 2


def test_contributions_survive_the_daemon(tmp_path: Path):
    first = Contributions(tmp_path / "contributions.json")
    now = 1_800_000_000.0
    first.count_accepted(now - 3 * 86_400, 1, 1)
    first.count_accepted(now, 1, 2)
    first.count_refused(now, 0, 3, "held-out loss 2 is worse")
    again = Contributions(tmp_path / "contributions.json")
    assert (again.accepted, again.today(now), again.refused, again.last_accepted) == (2, 1, 1, now)
    known = [(verdict.outcome, verdict.shard, verdict.epoch, verdict.text) for verdict in again.verdicts.verdicts]
    assert known == [("accepted", 1, 1, ""), ("accepted", 1, 2, ""), ("refused", 0, 3, "held-out loss 2 is worse")]
    for _ in range(2):  # a result of a lane waits for its merge, and is reported at every offer
        again.count_accepted(now, 4097, 5, "a" * 64)
        again.count_help(now, "audits")
    assert (again.accepted, again.verdicts.verdicts[-1].shard, again.verdicts.verdicts[-1].lane) == (3, 1, 1)
    last = Contributions(tmp_path / "contributions.json")
    assert (last.today(now, "audits"), last.today(now, "checks"), last.today(now + 2 * 86_400, "audits")) == (2, 0, 0)
    (tmp_path / "contributions.json").write_text("torn")
    assert Contributions(tmp_path / "contributions.json").accepted == 0
