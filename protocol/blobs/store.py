"""The blobs of one machine: files named by their digest, each whole and verified, or absent.

Layout: `<root>/<digest[:2]>/<digest>` holds the bytes and `<digest>.table` the chunk hashes. The table is durable before the
bytes get their name, so a blob that exists can always be served. Transfers in progress are in `<root>/partial`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lutetia.protocol.blobs.chunk_table import CHUNK, HASH, ChunkTable, read_chunks
from lutetia.protocol.blobs.partial import PartialBlob, discard_unheld
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import DiskError, IntegrityError
from lutetia.system.files import disk_errors, fsync_folder, lock_file, make_folder, write_atomic

_TABLE = ".table"
_SWEEP_AGE = 60.0  # seconds
_UNWANTED_AGE = 7 * 86400.0
"""Seconds after which an unused transfer is removed. Long enough for a node that is off for some days."""


class BlobMissing(IntegrityError):
    """The store does not hold this blob."""


class BlobStore:
    """Content-addressed files below `root`, which several processes may share. Methods block on the disk.

    `limit_bytes` bounds all whole blobs together. Adding beyond it raises DiskError before anything is written.
    """

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.partial_folder = root / "partial"
        with disk_errors(root):
            make_folder(self.partial_folder)
        self._sweep()

    def has(self, digest: str) -> bool:
        return self._file(digest).is_file() and self._table_file(digest).is_file()

    def path(self, digest: str) -> Path:
        """The file of a whole blob. Raises BlobMissing."""
        if not self.has(digest):
            raise BlobMissing(f"blob {digest[:12]} is not in the store {self.root}; fetch it first")
        return self._file(digest)

    def table(self, digest: str) -> ChunkTable:
        """The chunk hashes of a whole blob. Raises BlobMissing, or IntegrityError when the table on disk was damaged."""
        size, hashes = self.path(digest).stat().st_size, self._table_file(digest).read_bytes()
        table = ChunkTable(size, hashes)
        if len(hashes) % HASH or table.ref.digest != digest:
            raise IntegrityError(f"the table of blob {digest[:12]} in {self.root} is damaged; remove the blob and fetch it again")
        return table

    def add_file(self, path: Path, move: bool = False) -> BlobRef:
        """Hash and store a file. With `move` the file itself is taken, without a copy on the same file system. Idempotent."""
        if move:
            table = ChunkTable.of_file(path)
            if not self.has(table.ref.digest):
                self.adopt(path, table)
            path.unlink(missing_ok=True)
            return table.ref
        return self._add_chunks(read_chunks(path), path.stat().st_size)

    def add_bytes(self, data: bytes) -> BlobRef:
        return self._add_chunks((data[i : i + CHUNK] for i in range(0, len(data), CHUNK)), len(data))

    def remove(self, digest: str) -> None:
        """Remove a blob and any transfer of it, unless it is being fetched. An unknown digest is no error."""
        discard_unheld(self.partial_folder / digest)
        self._file(digest).unlink(missing_ok=True)
        self._table_file(digest).unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """The digests of all whole blobs, sorted."""
        return sorted(f.name for f in self.root.glob("[0-9a-f][0-9a-f]/*") if len(f.name) == 64 and self.has(f.name))

    def arriving(self) -> list[str]:
        """The digests of all blobs in transfer, running or interrupted."""
        return [folder.name for folder in self._transfers()]

    def used_bytes(self) -> int:
        total = 0
        for digest in self.digests():
            with contextlib.suppress(FileNotFoundError):  # another process may remove it meanwhile
                total += self._file(digest).stat().st_size
        return total

    def read_chunk(self, digest: str, index: int) -> bytes:
        """Chunk `index` of a whole blob, not verified (the receiver does that). Raises BlobMissing."""
        with self.path(digest).open("rb") as file:
            return os.pread(file.fileno(), CHUNK, index * CHUNK)

    def verify(self, digest: str) -> None:
        """Read a whole blob and check every chunk. Raises IntegrityError naming the first damaged one."""
        table = self.table(digest)
        for index, chunk in enumerate(read_chunks(self.path(digest))):
            table.verify(index, chunk)

    def partial(self, ref: BlobRef, given_up: threading.Event | None = None) -> PartialBlob:
        """Begin or continue a transfer of `ref`. Set `given_up` to end the hashing of what has arrived before.

        Raises DiskError (no space) or IntegrityError (another process fetches it).
        """
        self.check_room(ref.size)
        partial = PartialBlob(self.partial_folder / ref.digest, ref, given_up)
        self._sweep()
        return partial

    def finish(self, partial: PartialBlob) -> Path:
        """Turn a complete transfer into a blob. Raises IntegrityError when a chunk is missing."""
        if not partial.complete:
            raise IntegrityError(f"blob {partial.ref.digest[:12]} still lacks chunks; fetch them first")
        self.adopt(partial.data_file, partial.table)
        partial.discard()
        return self.path(partial.ref.digest)

    def adopt(self, path: Path, table: ChunkTable) -> None:
        """Take over `path`, whose content matches `table`. Table, bytes and name are made durable in this order."""
        digest = table.ref.digest
        self.check_room(table.size)
        target = self._file(digest)
        write_atomic(self._table_file(digest), table.hashes)
        with disk_errors(target):
            if path.stat().st_dev != self.root.stat().st_dev:
                self._add_chunks(read_chunks(path), table.size)
                return
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
            fsync_folder(target.parent)

    def check_room(self, size: int) -> None:
        """Raises DiskError when `size` more bytes would exceed the limit of this store."""
        if self.limit_bytes is not None and size + (used := self.used_bytes()) > self.limit_bytes:
            raise DiskError(
                f"the store {self.root} holds {used} bytes and may hold {self.limit_bytes}, too little for a blob of {size}; "
                "raise the limit or remove old blobs"
            )

    def _add_chunks(self, chunks: Iterable[bytes], size: int) -> BlobRef:
        self.check_room(size)
        hashes, written = bytearray(), 0
        with self._incoming() as (path, file):
            for chunk in chunks:
                hashes += hashlib.sha256(chunk).digest()
                written += len(chunk)
                file.write(chunk)
            file.flush()
            table = ChunkTable(written, bytes(hashes))
            if not self.has(table.ref.digest):
                self.adopt(path, table)
        return table.ref

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A locked temporary file on the store's file system, removed unless it was adopted."""
        path = self.partial_folder / f"incoming-{secrets.token_hex(8)}"
        with disk_errors(path):
            try:
                with path.open("xb") as file:
                    lock_file(file.fileno())
                    yield path, file
            finally:
                path.unlink(missing_ok=True)

    def _transfers(self) -> list[Path]:
        return [path for path in self.partial_folder.iterdir() if len(path.name) == 64]

    def _sweep(self) -> None:
        """Remove transfers that are not used any more and files that a killed process left half-written.

        Files that a live process writes are locked (or seconds old) and stay.
        """
        for folder in self._transfers():
            discard_unheld(folder, time.time() - _UNWANTED_AGE)
        for path in self.partial_folder.glob("incoming-*"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                if time.time() - path.stat().st_mtime > _SWEEP_AGE and lock_file(file.fileno()):
                    path.unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _table_file(self, digest: str) -> Path:
        return self.root / digest[:2] / (digest + _TABLE)
