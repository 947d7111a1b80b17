"""A blob on its way: the chunks that have arrived and been verified, on disk, so that a restart loses none of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from pathlib import Path

from ..system.errors import IntegrityError
from ..system.files import disk_errors
from .blobs import CHUNK, ChunkTable, chunk_count
from .manifest import BlobRef


class PartialBlob:
    """One transfer in `<store>/partial/<digest>/`: `data` (full size), `table`, and `arrived` (one byte per verified chunk).

    Room for the whole blob is reserved at the start, so that a full disk shows before the first byte travels. After a restart
    the chunks marked as arrived are hashed again: marks can outlive their bytes in a power loss. One process at a time;
    methods block on the disk.
    """

    def __init__(self, folder: Path, ref: BlobRef) -> None:
        self.folder, self.ref = folder, ref
        self.data_file, self._marks_file, self._table_file = folder / "data", folder / "arrived", folder / "table"
        self._table: ChunkTable | None = None
        self._writing = threading.Lock()  # closing waits for a write in another thread: its descriptor may be reused at once
        self._arrived = bytearray(chunk_count(ref.size))
        self._data = self._marks = -1
        fresh = not self.data_file.exists()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._data = os.open(self.data_file, os.O_RDWR | os.O_CREAT, 0o644)
            self._marks = os.open(self._marks_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._reserve()
            if not fresh:
                self._resume()
        except BaseException:
            self.close()
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    @property
    def table(self) -> ChunkTable:
        """Raises IntegrityError before `set_table`."""
        if self._table is None:
            raise IntegrityError(f"the chunk table of blob {self.ref.digest[:12]} has not arrived yet")
        return self._table

    @property
    def has_table(self) -> bool:
        return self._table is not None

    @property
    def complete(self) -> bool:
        return self._table is not None and all(self._arrived)

    @property
    def arrived_bytes(self) -> int:
        table = self._table
        return sum(table.chunk_size(i) for i, there in enumerate(self._arrived) if there) if table else 0

    def set_table(self, table: ChunkTable) -> None:
        """Keep the table, which the caller has checked against the blob's name."""
        with disk_errors(self._table_file):
            self._table_file.write_bytes(table.hashes)  # a torn one is noticed after a restart: it is checked by name again
        self._table = table

    def missing(self) -> list[int]:
        """The chunks still to fetch, in order."""
        return [index for index, there in enumerate(self._arrived) if not there]

    def write(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Verify a chunk and keep it. Raises IntegrityError (wrong bytes) or DiskError; then nothing counts as arrived."""
        self.table.verify(index, chunk)
        with self._writing, disk_errors(self.data_file):
            if self._data < 0 or self._arrived[index]:
                return
            _write_at(self._data, chunk, index * CHUNK)
            _write_at(self._marks, b"\1", index)
            self._arrived[index] = 1

    def close(self) -> None:
        """Let go of the files; what has arrived stays for the next attempt, later writes are dropped. Idempotent."""
        with self._writing:
            for descriptor in (self._data, self._marks):
                if descriptor >= 0:
                    os.close(descriptor)
            self._data = self._marks = -1

    def discard(self) -> None:
        """Remove the transfer from disk."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IntegrityError(
                f"another process is fetching blob {self.ref.digest[:12]} into {self.folder.parent}; let it finish or stop it"
            ) from error

    def _reserve(self) -> None:
        with disk_errors(self.data_file):
            if self.ref.size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._data, 0, self.ref.size)
            os.ftruncate(self._data, self.ref.size)

    def _resume(self) -> None:
        """Believe the table only if the blob's name says so, and a mark only if its chunk hashes right."""
        with contextlib.suppress(OSError, IntegrityError):
            self._table = ChunkTable.checked(self.ref, self._table_file.read_bytes())
        if self._table is None:
            return
        marks = os.pread(self._marks, len(self._arrived), 0)
        for index, mark in enumerate(marks):
            with contextlib.suppress(IntegrityError):
                if mark:
                    self._table.verify(index, os.pread(self._data, CHUNK, index * CHUNK))
                    self._arrived[index] = 1


def _write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
