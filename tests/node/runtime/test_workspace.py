"""A shard's files and blobs: lineage, resuming, publishing, housekeeping. No torch."""

from __future__ import annotations

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
    remembered_shards,
    resume_point,
)
from lutetia.protocol.blobs.store import BlobStore
from lutetia.system.errors import IntegrityError
from tests.node.checkpoint_files import NOTHING, Meanwhile, kept, write_checkpoint
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
    assert chain(1, "e" * 64, [FIRST, SECOND]) == [], "somebody else's epoch was accepted"


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
def material(run: TinyRun, tmp_path: Path) -> Workspace:
    places = RunPaths(tmp_path / "state", run.manifest.run_id)
    return Workspace(places, run.manifest, BlobStore(places.blobs))


def test_publishing_shares_the_disk_space_and_is_idempotent(material: Workspace):
    item = write_checkpoint(material, 1, None)
    for _ in range(2):
        material.into_store(item, ())
    for name, ref in zip(FILES, item.refs, strict=True):
        stored, own = material.store.path(ref.digest), material.work(0).epoch_folder(1) / f"{name}.safetensors"
        assert stored.read_bytes() == own.read_bytes()
        assert stored.stat().st_ino == own.stat().st_ino
    assert set(material.held()) >= {ref.digest for ref in item.refs}


def test_sweep_keeps_files_being_published(material: Workspace):
    item = write_checkpoint(material, 1, None)
    material.store = Meanwhile(material.places.blobs, material.work(0).sweep)
    material.into_store(item, ())
    assert set(material.store.digests()) == {ref.digest for ref in item.refs}
    assert sorted(path.name for path in material.work(0).epoch_folder(1).iterdir()) == sorted(
        [CHECKPOINT, *(f"{name}.safetensors" for name in FILES)]
    )


def test_checkpoint_damaged_on_disk_is_not_published(material: Workspace):
    item = write_checkpoint(material, 1, None)
    (material.work(0).epoch_folder(1) / "weights.safetensors").write_bytes(b"flipped")
    with pytest.raises(IntegrityError, match="damaged"):
        material.into_store(item, ())
    assert item.weights.digest not in material.store.digests()


def test_gap_in_the_chain_ends_it(material: Workspace):
    first = write_checkpoint(material, 1, None)
    second = write_checkpoint(material, 2, first.digest)
    write_checkpoint(material, 3, second.digest)
    (material.work(0).epoch_folder(2) / "state.safetensors").unlink()
    assert [item.epoch for item in material.pending(0, 0, None)] == [1]
    assert [item.epoch for item in material.work(0).kept()] == [1]


def test_acceptance_removes_older_checkpoints_and_the_base(material: Workspace):
    weights, state = material.store.add_bytes(b"fetched weights"), material.store.add_bytes(b"fetched state")
    material.work(0).path.mkdir(parents=True)
    material.set_base(0, AcceptedBase(epoch=1, checkpoint="c" * 64, weights=weights, state=state))
    second = write_checkpoint(material, 2, "c" * 64)
    third = write_checkpoint(material, 3, second.digest)
    for item in (second, third):
        material.into_store(item, ())
    material.superseded(0, 2)
    assert not material.store.has(weights.digest)
    assert material.store.has(second.weights.digest), "the accepted one is served"
    material.superseded(0, 3)
    assert not material.store.has(second.weights.digest)
    assert material.store.has(third.weights.digest)
    assert [item.epoch for item in material.work(0).kept()] == [3]


def test_discard_keeps_the_accepted_checkpoint_only(material: Workspace):
    first = write_checkpoint(material, 1, None)
    second = write_checkpoint(material, 2, first.digest)
    for item in (first, second):
        material.into_store(item, ())
    material.discard(0, 1)
    assert [item.epoch for item in material.work(0).kept()] == [1]
    assert not material.store.has(second.weights.digest)
    material.discard(0, None)
    assert material.work(0).kept() == []
    assert material.store.digests() == []


def test_discard_all_removes_damaged_fetched_blobs(material: Workspace, run: TinyRun):
    ref = material.store.add_file(run.data(0))
    material.work(0).path.mkdir(parents=True)
    with material.store.path(ref.digest).open("r+b") as file:
        file.write(b"rot")
    material.discard(0, None)
    assert not material.store.has(ref.digest)


def test_disk_limit_evicts_the_oldest_spare_blobs_only(material: Workspace):
    store = BlobStore(material.places.blobs, limit_bytes=10_000)
    material.store = store
    refs = [store.add_bytes(bytes([number]) * 3000) for number in range(3)]
    material.make_room(2500, {refs[0].digest})
    assert [store.has(ref.digest) for ref in refs] == [True, False, True] or [store.has(ref.digest) for ref in refs] == [
        True,
        True,
        False,
    ]
    material.make_room(500, {refs[0].digest})
    assert sum(store.has(ref.digest) for ref in refs) == 2, "there was room"


def test_rollback_to_the_beginning_clears_the_base(material: Workspace):
    weights, state = material.store.add_bytes(b"fetched weights"), material.store.add_bytes(b"fetched state")
    material.set_base(0, AcceptedBase(epoch=3, checkpoint="c" * 64, weights=weights, state=state))
    material.set_base(0, None)
    assert material.known_base(0) is None
    assert not material.store.digests()


def test_own_checkpoint_is_not_removed_as_a_fetched_base(material: Workspace):
    """The DHT may show our last acceptance late."""
    first = write_checkpoint(material, 1, None)
    second = write_checkpoint(material, 2, first.digest)
    for item in (first, second):
        material.into_store(item, ())
    material.superseded(0, 2)
    material.set_base(0, AcceptedBase(epoch=1, checkpoint=first.digest, weights=first.weights, state=first.state))
    assert all(material.store.has(ref.digest) for ref in second.refs)


def test_base_is_known_from_own_work_or_an_earlier_sync(material: Workspace):
    first = write_checkpoint(material, 1, None)
    own = material.base(0, 1, first.digest, None)
    assert own is not None
    assert own.weights == first.weights
    assert material.base(0, 1, "d" * 64, None) is None
    base = AcceptedBase(epoch=4, checkpoint="d" * 64, weights=NOTHING, state=NOTHING)
    material.set_base(0, base)
    assert material.base(0, 4, "d" * 64, None) == base


def test_remembered_shards_and_garbage(tmp_path: Path):
    run = "ab" * 32
    folder = CheckpointFolder(tmp_path, run, 3)
    folder.path.mkdir(parents=True)
    (tmp_path / "junk").mkdir()
    assert remembered_shards(tmp_path, run) == frozenset()
    (folder.path / "local-0-5.safetensors").write_bytes(b"x")
    folder.set_local(local(0, None))
    assert remembered_shards(tmp_path, run) == {3}
    (folder.path / "local.json").write_text("{")
    assert folder.local() is None


def test_sweep_removes_what_a_killed_trainer_left(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, "ab" * 32, 0)
    (folder.path / "epoch-000001.part").mkdir(parents=True)
    (folder.path / ".local-1-1.safetensors.abc.part").touch()
    (folder.path / "local-1-0.safetensors").touch()
    folder.sweep()
    assert [path.name for path in folder.path.iterdir()] == ["local-1-0.safetensors"]


def test_sweeping_a_read_only_disk_leaves_what_is_there(tmp_path: Path):
    with small_disk(tmp_path / "small", "1m") as disk:
        folder = CheckpointFolder(disk, "ab" * 32, 0)
        (folder.path / "epoch-000001.part").mkdir(parents=True)
        (folder.path / ".local-1-1.safetensors.abc.part").touch()
        make_read_only(disk)
        folder.sweep()
        assert len(list(folder.path.iterdir())) == 2


def test_contributions_survive_the_daemon(tmp_path: Path):
    book = Contributions(tmp_path / "contributions.json")
    now = 1_800_000_000.0
    book.count_accepted(now - 3 * 86_400)
    book.count_accepted(now)
    book.count_refused()
    again = Contributions(tmp_path / "contributions.json")
    assert (again.accepted, again.today(now), again.refused, again.last_accepted) == (2, 1, 1, now)
    (tmp_path / "contributions.json").write_text("torn")
    assert Contributions(tmp_path / "contributions.json").accepted == 0
