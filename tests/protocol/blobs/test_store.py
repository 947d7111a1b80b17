"""The blob store: whole or absent, durable in the right order, bounded, and resumable after a restart."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.partial import PartialBlob
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import DiskError, IntegrityError

DATA = os.urandom(2 * CHUNK + 12345)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def chunks_of(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]


def test_bytes_and_files_of_equal_content_have_one_name(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    ref = store.add_bytes(DATA)
    assert store.add_file(source) == ref == ChunkTable.of_bytes(DATA).ref
    assert source.exists()
    assert store.digests() == [ref.digest]
    assert store.path(ref.digest).read_bytes() == DATA
    assert store.table(ref.digest) == ChunkTable.of_bytes(DATA)
    assert store.used_bytes() == len(DATA)


def test_a_moved_file_is_taken(store: BlobStore, tmp_path: Path) -> None:
    for _ in range(2):
        source = tmp_path / "source"
        source.write_bytes(DATA)
        ref = store.add_file(source, move=True)
        assert not source.exists()
        assert store.path(ref.digest).read_bytes() == DATA


def test_the_empty_blob(store: BlobStore) -> None:
    ref = store.add_bytes(b"")
    assert ref.size == 0
    assert store.path(ref.digest).read_bytes() == b""


def test_an_absent_or_removed_blob_is_reported(store: BlobStore) -> None:
    ref = store.add_bytes(DATA)
    store.remove(ref.digest)
    store.remove(ref.digest)
    assert not store.has(ref.digest)
    with pytest.raises(BlobMissing, match="fetch it first"):
        store.path(ref.digest)


def test_the_damaged_chunk_is_named(store: BlobStore) -> None:
    ref = store.add_bytes(DATA)
    file = store.path(ref.digest)
    file.write_bytes(DATA[:CHUNK] + b"x" + DATA[CHUNK + 1 :])
    with pytest.raises(IntegrityError, match="chunk 1"):
        store.verify(ref.digest)
    file.with_name(ref.digest + ".table").write_bytes(b"short")
    with pytest.raises(IntegrityError, match="table"):
        store.table(ref.digest)


def test_the_limit_refuses_before_anything_is_written(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", limit_bytes=3 * CHUNK)
    store.add_bytes(DATA)
    with pytest.raises(DiskError, match="raise the limit"):
        store.add_bytes(DATA[1:])
    with pytest.raises(DiskError):
        store.partial(ChunkTable.of_bytes(DATA[2:]).ref)
    assert len(store.digests()) == 1
    assert list(store.partial_folder.iterdir()) == []


def test_bytes_are_durable_before_they_get_their_name(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the data, then the rename, then fsync of the folder; the table before all of it."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "data")
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        calls.append("name table" if str(target).endswith(".table") else "name blob")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    store.add_bytes(DATA)
    assert calls == ["folder", "data", "name table", "folder", "data", "name blob", "folder"], "a new folder's own name first"


def test_a_failed_write_leaves_nothing(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="no space left"):
        store.add_bytes(DATA)
    assert store.digests() == []
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_files_of_a_killed_process_are_removed(store: BlobStore) -> None:
    old, fresh = store.partial_folder / "incoming-dead", store.partial_folder / "incoming-live"
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    BlobStore(store.root)
    assert not old.exists()
    assert fresh.exists()


def test_a_transfer_survives_a_restart(store: BlobStore) -> None:
    table, chunks = ChunkTable.of_bytes(DATA), chunks_of(DATA)
    first = store.partial(table.ref)
    first.set_table(table)
    first.write(0, chunks[0])
    first.write(2, chunks[2])
    first.close()
    second = BlobStore(store.root).partial(table.ref)
    assert second.has_table
    assert second.missing() == [1]
    assert second.arrived_bytes == len(chunks[0]) + len(chunks[2])
    second.write(1, chunks[1])
    assert store.finish(second).read_bytes() == DATA
    assert list(store.partial_folder.iterdir()) == []


def test_marks_without_their_bytes_are_ignored(store: BlobStore) -> None:
    table, chunks = ChunkTable.of_bytes(DATA), chunks_of(DATA)
    first = store.partial(table.ref)
    first.set_table(table)
    for index, chunk in enumerate(chunks):
        first.write(index, chunk)
    first.close()
    with first.data_file.open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(b"lost")
    second = store.partial(table.ref)
    assert second.missing() == [1]
    with pytest.raises(IntegrityError, match="still lacks"):
        store.finish(second)


def test_a_wrong_chunk_never_counts(store: BlobStore) -> None:
    table = ChunkTable.of_bytes(DATA)
    partial = store.partial(table.ref)
    with pytest.raises(IntegrityError, match="table"):
        partial.write(0, DATA[:CHUNK])
    partial.set_table(table)
    with pytest.raises(IntegrityError, match="chunk 0"):
        partial.write(0, DATA[1 : CHUNK + 1])
    assert partial.missing() == [0, 1, 2]


def test_two_processes_cannot_fetch_one_blob_into_one_store(store: BlobStore) -> None:
    ref = ChunkTable.of_bytes(DATA).ref
    held = store.partial(ref)
    with pytest.raises(IntegrityError, match="another process"):
        store.partial(ref)
    held.discard()
    store.partial(ref).discard()


def allocated(folder: Path) -> int:
    """Bytes on disk of the files below `folder`."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def interrupted(store: BlobStore, data: bytes = DATA) -> BlobRef:
    """A transfer of `data` that ended after its first chunk."""
    table = ChunkTable.of_bytes(data)
    partial = store.partial(table.ref)
    partial.set_table(table)
    partial.write(0, data[:CHUNK])
    partial.close()
    return table.ref


def transfers(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.partial_folder.iterdir())


def test_disk_space_is_reserved_with_the_table(store: BlobStore) -> None:
    """A peer that only names the size of a blob must not fill the disk."""
    table = ChunkTable.of_bytes(DATA)
    partial = store.partial(table.ref)
    assert allocated(store.partial_folder) == 0
    partial.set_table(table)
    assert allocated(store.partial_folder) >= len(DATA)
    partial.close()


@pytest.mark.parametrize("with_table", [False, True])
def test_a_transfer_without_any_chunk_leaves_nothing(store: BlobStore, with_table: bool) -> None:
    table = ChunkTable.of_bytes(DATA)
    partial = store.partial(table.ref)
    if with_table:
        partial.set_table(table)
    partial.close()
    assert transfers(store) == []
    partial.set_table(table)  # by a worker that was still running
    assert transfers(store) == []


def test_arrived_chunks_survive_failed_attempts(store: BlobStore) -> None:
    ref = interrupted(store)
    table_file = store.partial_folder / ref.digest / "table"
    table_file.write_bytes(b"torn by a power loss")
    store.partial(ref).close()
    partial = store.partial(ref)
    partial.set_table(ChunkTable.of_bytes(DATA))
    partial.close()
    assert store.partial(ref).missing() == [1, 2]


def test_removing_a_blob_removes_its_transfer(store: BlobStore) -> None:
    ref = interrupted(store)
    store.remove(ref.digest)
    assert transfers(store) == []
    running = store.partial(ref)
    running.set_table(ChunkTable.of_bytes(DATA))
    running.write(1, DATA[CHUNK : 2 * CHUNK])
    store.remove(ref.digest)
    assert running.missing() == [0, 2], "another process holds it"
    for index in running.missing():
        running.write(index, DATA[index * CHUNK : (index + 1) * CHUNK])
    assert store.finish(running).read_bytes() == DATA


def age(store: BlobStore, *refs: BlobRef) -> None:
    long_ago = time.time() - 8 * 86400
    for ref in refs:
        for path in (store.partial_folder / ref.digest).iterdir():
            os.utime(path, (long_ago, long_ago))


def test_a_transfer_unused_for_a_week_is_removed(store: BlobStore) -> None:
    old, held, retried, fresh = (interrupted(store, bytes([n]) + DATA) for n in range(4))
    holder = store.partial(held)
    age(store, old, held, retried)
    store.partial(retried).close()  # no provider could serve it, but it was used
    assert transfers(store) == sorted(ref.digest for ref in (held, retried, fresh)), "swept while the process runs"
    holder.close()
    age(store, fresh)
    BlobStore(store.root)
    assert transfers(store) == [retried.digest], "swept at a start"


def test_a_transfer_has_one_process_at_a_time(store: BlobStore) -> None:
    """Locks belong to open files, so threads compete here as processes would."""
    table, owners, most = ChunkTable.of_bytes(b"tiny"), 0, 0
    problems: list[Exception] = []

    def come_and_go(number: int) -> None:
        nonlocal owners, most
        for turn in range(200):
            try:
                if number == 0:
                    store.remove(table.ref.digest)
                    continue
                partial = PartialBlob(store.partial_folder / table.ref.digest, table.ref)
            except IntegrityError:
                continue
            except OSError as error:
                problems.append(error)
                return
            owners += 1
            most = max(most, owners)
            partial.set_table(table)
            if turn % 2:
                partial.write(0, b"tiny")
            problems.extend([] if partial.data_file.exists() else [FileNotFoundError(f"{number} lost its files")])
            owners -= 1
            (partial.discard if turn % 3 == 0 else partial.close)()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert most == 1
