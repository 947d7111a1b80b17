"""A blob is named by the SHA-256 over the table of its 1 MiB chunk hashes, so that every chunk can be verified on arrival."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError

CHUNK = 1 << 20
HASH = 32
MAX_CHUNKS = 1 << 20


@dataclass(frozen=True)
class ChunkTable:
    """The chunk hashes of one blob of `size` bytes, HASH bytes each."""

    size: int
    hashes: bytes

    @property
    def ref(self) -> BlobRef:
        header = b"lutetia-blob-1" + self.size.to_bytes(8, "big")
        return BlobRef(digest=hashlib.sha256(header + self.hashes).hexdigest(), size=self.size)

    @property
    def count(self) -> int:
        return len(self.hashes) // HASH

    def chunk_size(self, index: int) -> int:
        return min(CHUNK, self.size - index * CHUNK)

    def verify(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Raises IntegrityError when `chunk` is not chunk `index` of the blob."""
        expected = self.hashes[index * HASH : (index + 1) * HASH]
        if len(chunk) != self.chunk_size(index) or hashlib.sha256(chunk).digest() != expected:
            raise IntegrityError(f"chunk {index} of blob {self.ref.digest[:12]} does not match its hash; ask another peer")

    @classmethod
    def checked(cls, ref: BlobRef, hashes: bytes) -> ChunkTable:
        """The table with `hashes` that a peer sent. Raises IntegrityError when it is not the table of `ref`."""
        table = cls(ref.size, hashes)
        if len(hashes) != HASH * chunk_count(ref.size) or table.ref != ref:
            raise IntegrityError(f"the chunk table for blob {ref.digest[:12]} does not match its name; ask another peer")
        return table

    @classmethod
    def of_chunks(cls, chunks: Iterable[bytes]) -> ChunkTable:
        size, hashes = 0, bytearray()
        for chunk in chunks:
            size += len(chunk)
            hashes += hashlib.sha256(chunk).digest()
        return cls(size, bytes(hashes))

    @classmethod
    def of_file(cls, path: Path) -> ChunkTable:
        return cls.of_chunks(read_chunks(path))

    @classmethod
    def of_bytes(cls, data: bytes) -> ChunkTable:
        return cls.of_chunks(data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


def chunk_count(size: int) -> int:
    return -(-size // CHUNK)


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
