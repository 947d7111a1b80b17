"""A blob in transfer: the chunks that have arrived and been verified, on disk, so that a restart loses none of them."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable, chunk_count
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError
from lutetia.system.files import disk_errors, lock_file

_DATA, _TABLE, _MARKS = "data", "table", "arrived"


class PartialBlob:
    """One transfer in `<store>/partial/<digest>/`: `data` (full size), `table`, and `arrived` (one byte per verified chunk).

    Space for the whole blob is reserved once the table is there, so a full disk shows before the first chunk is sent, and a peer
    cannot fill the disk by naming a size. After a restart the chunks marked as arrived are hashed again, because in a power loss
    marks can outlive their bytes; set `given_up` to end that early. One process at a time holds a transfer, by a lock on
    `arrived`. Methods block on the disk.
    """

    def __init__(self, folder: Path, ref: BlobRef, given_up: threading.Event | None = None) -> None:
        self.folder, self.ref = folder, ref
        self.data_file, self._marks_file, self._table_file = folder / _DATA, folder / _MARKS, folder / _TABLE
        self._table: ChunkTable | None = None
        self._writing = threading.Lock()  # close waits for writes of other threads: the descriptor may be reused
        self._arrived = bytearray(chunk_count(ref.size))
        self._data = -1
        with disk_errors(folder):
            self._marks = self._begin()
        try:
            with disk_errors(folder):
                os.utime(self._marks_file)  # it is in use, so the next sweep keeps it
                self._data = os.open(self.data_file, os.O_RDWR | os.O_CREAT, 0o644)
            self._resume(given_up or threading.Event())
        except BaseException:
            self.close()
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
        """Keep the table, which the caller has checked against the blob's name. Raises DiskError: no space for the blob."""
        with self._writing:
            if self._table is not None or self._marks < 0:
                return
            self._reserve()
            with disk_errors(self._table_file):
                self._table_file.write_bytes(table.hashes)  # a torn table is found after a restart, by the blob's name
            self._table = table

    def missing(self) -> list[int]:
        """The chunks still to fetch, in order."""
        return [index for index, there in enumerate(self._arrived) if not there]

    def write(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Verify and keep a chunk. Raises IntegrityError (wrong bytes) or DiskError; the chunk is then still missing."""
        self.table.verify(index, chunk)
        with self._writing, disk_errors(self.data_file):
            if self._data < 0 or self._arrived[index]:
                return
            _write_at(self._data, chunk, index * CHUNK)
            _write_at(self._marks, b"\1", index)
            self._arrived[index] = 1

    def close(self) -> None:
        """Close the files. What has arrived stays for the next attempt; later writes are ignored. Idempotent."""
        with self._writing:
            if self._marks >= 0 and os.fstat(self._marks).st_size == 0:  # nothing has ever arrived
                _remove(self.folder)
            self._let_go()

    def discard(self) -> None:
        """Remove the transfer from disk. If it is closed already, only unless another process has taken it up."""
        with self._writing:
            if self._marks >= 0:
                _remove(self.folder)
            else:
                discard_unheld(self.folder)
            self._let_go()

    def _let_go(self) -> None:
        for descriptor in (self._data, self._marks):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._marks = -1

    def _begin(self) -> int:
        """Make the folder and return its locked marks."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            with contextlib.suppress(FileNotFoundError):  # the previous process has just removed the folder
                if (marks := _locked(self.folder)) is not None:
                    return marks
                raise IntegrityError(
                    f"another process is fetching blob {self.ref.digest[:12]} into {self.folder.parent}; let it finish or stop it"
                )

    def _reserve(self) -> None:
        with disk_errors(self.data_file):
            if self.ref.size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._data, 0, self.ref.size)
            os.ftruncate(self._data, self.ref.size)

    def _resume(self, given_up: threading.Event) -> None:
        """Take up an earlier transfer: its table if it matches the blob's name, its marked chunks if their hashes match."""
        with contextlib.suppress(OSError, IntegrityError):
            self._table = ChunkTable.checked(self.ref, self._table_file.read_bytes())
        if self._table is None:
            return
        self._reserve()
        marks = os.pread(self._marks, len(self._arrived), 0)
        for index, mark in enumerate(marks):
            if given_up.is_set():
                return
            with contextlib.suppress(IntegrityError):
                if mark:
                    self._table.verify(index, os.pread(self._data, CHUNK, index * CHUNK))
                    self._arrived[index] = 1


def discard_unheld(folder: Path, before: float = float("inf")) -> None:
    """Remove the transfer in `folder`, unless a process uses it or has used it since `before` (Unix seconds)."""
    with contextlib.suppress(OSError):
        if os.stat(folder / _MARKS).st_mtime >= before or (marks := _locked(folder)) is None:
            return
        try:
            if os.fstat(marks).st_mtime < before:  # still
                _remove(folder)
        finally:
            os.close(marks)


def _locked(folder: Path) -> int | None:
    """The marks in `folder`, open and locked; None while another process holds them. Raises FileNotFoundError: no folder."""
    while True:
        marks = os.open(folder / _MARKS, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_file(marks):
                os.close(marks)
                return None
            if os.path.samestat(os.fstat(marks), os.stat(folder / _MARKS)):
                return marks
        except BaseException:
            os.close(marks)
            raise
        os.close(marks)  # the previous process removed the file and another one made a new one


def _remove(folder: Path) -> None:
    """Call it with the marks locked. They are removed last: a process that locks new ones finds nothing of the old transfer."""
    with contextlib.suppress(OSError):
        for name in (_DATA, _TABLE, _MARKS):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
