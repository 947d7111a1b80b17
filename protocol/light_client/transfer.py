"""Blobs in transfer to a short-lived process: which chunks are here, on disk, and who fetches which of the others.

Each blob has three files in one folder: `<digest>` with its bytes, `<digest>.table` with the hashes of its chunks and
`<digest>.arrived` with one byte per chunk. What an earlier process left is used, after its chunks were hashed again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import trio

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable, chunk_count
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError, UsageError
from lutetia.system.files import disk_errors, lock_file, make_folder

_BATCH = 8  # chunks asked for at once
_LOOK = 0.2  # seconds between looks at whether all peers have failed
_TABLE, _ARRIVED, _LOCK = ".table", ".arrived", "in-use"


@dataclass(eq=False)
class ChunkBatch:
    """Chunks of one blob that one peer is asked for; they follow one another."""

    ref: BlobRef
    table: ChunkTable
    chunks: list[int]


class _Arriving:
    """One blob on disk."""

    def __init__(self, folder: Path, ref: BlobRef) -> None:
        self.ref, self.path = ref, folder / ref.digest
        self._table_file, self._marks_file = folder / (ref.digest + _TABLE), folder / (ref.digest + _ARRIVED)
        self.table: ChunkTable | None = None
        self.missing: set[int] = set(range(chunk_count(ref.size)))
        self.pending: deque[list[int]] = deque()
        self._data: BinaryIO | None = None
        self._marks: BinaryIO | None = None
        with contextlib.suppress(OSError, IntegrityError):
            self._begin(ChunkTable.checked(ref, self._table_file.read_bytes()))

    @property
    def bytes_here(self) -> int:
        return 0 if self.table is None else self.ref.size - sum(map(self.table.chunk_size, self.missing))

    def set_table(self, table: ChunkTable) -> None:
        if self.table is None:
            self._table_file.write_bytes(table.hashes)
            self._begin(table)

    def write(self, index: int, chunk: bytes) -> bool:
        """Keep a chunk. Returns whether it was missing. Raises IntegrityError."""
        assert self.table
        assert self._data
        assert self._marks
        self.table.verify(index, chunk)
        if index not in self.missing:
            return False
        self._data.seek(index * CHUNK)
        self._data.write(chunk)
        self._marks.seek(index)
        self._marks.write(b"\1")
        self.missing.discard(index)
        return True

    def close(self) -> None:
        for file in (self._data, self._marks):
            if file:
                file.close()

    def _begin(self, table: ChunkTable) -> None:
        for path in (self.path, self._marks_file):
            path.touch()
        self._data, self._marks = self.path.open("r+b", buffering=0), self._marks_file.open("r+b", buffering=0)
        for index, mark in enumerate(self._marks.read()):
            if mark and index in self.missing:
                self._data.seek(index * CHUNK)
                with contextlib.suppress(IntegrityError):
                    table.verify(index, self._data.read(CHUNK)[: table.chunk_size(index)])
                    self.missing.discard(index)
        self.table = table
        self._plan(self.missing)

    def _plan(self, chunks: Iterable[int]) -> None:
        run: list[int] = []
        for index in sorted(chunks):
            if run and (index != run[-1] + 1 or len(run) == _BATCH):
                self.pending.append(run)
                run = []
            run.append(index)
        if run:
            self.pending.append(run)

    def give_back(self, chunks: Iterable[int]) -> None:
        self._plan(index for index in chunks if index in self.missing)


class ArrivingFolder:
    """The folder of one fetch, which one process uses at a time. Use it in a `with` statement.

    Args:
        path: the folder, on the disk of the result. What else is in it is removed: it is of a fetch of something else.
        refs: all blobs of the fetch.

    Raises UsageError while another process uses it, and DiskError.
    """

    def __init__(self, path: Path, refs: Iterable[BlobRef]) -> None:
        self.path, self._wanted = path, {ref.digest for ref in refs}

    def __enter__(self) -> ArrivingFolder:
        with disk_errors(self.path):
            make_folder(self.path)
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            if not lock_file(self._lock):
                os.close(self._lock)
                raise UsageError(f"another process fetches into {self.path.parent}; let it finish or choose another --out")
            for path in self.path.iterdir():
                if path.name.partition(".")[0] not in self._wanted and path.name != _LOCK:
                    path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """What has arrived stays for the next fetch."""
        os.close(self._lock)

    def move_into(self, files: Mapping[Path, BlobRef]) -> None:
        """Give every blob, all of which are here, its place, durably, and remove the folder."""
        with disk_errors(self.path):
            places: dict[str, Path] = {}
            for path, ref in files.items():
                if ref.digest in places:
                    shutil.copyfile(places[ref.digest], path)
                else:
                    with (self.path / ref.digest).open("r+b") as file:
                        os.fsync(file.fileno())
                    os.replace(self.path / ref.digest, path)
                    places[ref.digest] = path
            shutil.rmtree(self.path, ignore_errors=True)


class Transfers:
    """Blobs of one fetch, for which peers are asked at the same time. Raises DiskError."""

    def __init__(self, folder: ArrivingFolder, refs: Iterable[BlobRef], on_bytes: Callable[[int, int], None]) -> None:
        self._folder, self._on_bytes = folder.path, on_bytes
        with disk_errors(self._folder):
            self._blobs = {ref.digest: _Arriving(self._folder, ref) for ref in refs}
        self._changed = trio.Event()
        self._total = sum(blob.ref.size for blob in self._blobs.values())
        self._here = sum(blob.bytes_here for blob in self._blobs.values())
        self._report(0)

    @property
    def done(self) -> bool:
        return all(blob.table is not None and not blob.missing for blob in self._blobs.values())

    def without_table(self, absent: set[str]) -> BlobRef | None:
        """A blob whose table is not here, and which the peer may have. Several peers may be asked for the same one."""
        return next((b.ref for digest, b in self._blobs.items() if b.table is None and digest not in absent), None)

    def set_table(self, ref: BlobRef, table: ChunkTable) -> None:
        with disk_errors(self._folder):
            self._blobs[ref.digest].set_table(table)
        self._notify()

    def take(self, absent: set[str]) -> ChunkBatch | None:
        """Chunks for a peer that lacks the blobs `absent`. None: other peers are fetching all the others."""
        for digest, blob in self._blobs.items():
            if blob.pending and blob.table and digest not in absent:
                return ChunkBatch(blob.ref, blob.table, blob.pending.popleft())
        return None

    def only(self, absent: set[str]) -> bool:
        """Whether all that is missing are blobs in `absent`."""
        return all(digest in absent or (blob.table and not blob.missing) for digest, blob in self._blobs.items())

    def arrived(self, batch: ChunkBatch, index: int, chunk: bytes) -> None:
        """Keep a chunk. Raises IntegrityError or DiskError."""
        with disk_errors(self._folder):
            if self._blobs[batch.ref.digest].write(index, chunk):
                self._report(len(chunk))

    def give_back(self, batch: ChunkBatch) -> None:
        """The batch is over, fetched or not; what is missing of it can be taken again."""
        self._blobs[batch.ref.digest].give_back(batch.chunks)
        self._notify()

    async def change(self) -> None:
        """Wait until a batch or a table has come, or was given back."""
        await self._changed.wait()

    async def finished_or(self, nursery: trio.Nursery) -> None:
        """Return when all is here, or when no task of the nursery runs any more; then cancel the others."""
        while not self.done and nursery.child_tasks:
            with trio.move_on_after(_LOOK):
                await self._changed.wait()
        nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Close all files."""
        for blob in self._blobs.values():
            blob.close()

    def _report(self, more: int) -> None:
        self._here += more
        self._on_bytes(self._here, self._total)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
