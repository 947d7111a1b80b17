"""Blob names cover every byte and the length, and every chunk can be checked alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.blobs.chunk_table import CHUNK, HASH, ChunkTable, chunk_count, read_chunks
from lutetia.system.errors import IntegrityError

DATA = bytes(range(256)) * 4096 * 2 + b"tail"


def test_a_file_and_its_bytes_have_one_name(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    assert ChunkTable.of_file(path) == ChunkTable.of_bytes(DATA)
    assert b"".join(read_chunks(path)) == DATA


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (5 * CHUNK, 5)])
def test_chunks_cover_the_size_exactly(size: int, count: int) -> None:
    table = ChunkTable.of_bytes(bytes(size))
    assert table.count == chunk_count(size) == count
    assert sum(table.chunk_size(index) for index in range(count)) == size


def test_names_differ_by_length_alone() -> None:
    names = {ChunkTable.of_bytes(bytes(size)).ref.digest for size in (0, 1, 2, CHUNK, CHUNK + 1)}
    assert len(names) == 5


@given(st.integers(min_value=0, max_value=len(DATA) - 1), st.integers(min_value=1, max_value=255))
def test_a_flipped_byte_is_found_and_changes_the_name(place: int, flip: int) -> None:
    table = ChunkTable.of_bytes(DATA)
    index = place // CHUNK
    chunk = bytearray(DATA[index * CHUNK : (index + 1) * CHUNK])
    table.verify(index, chunk)
    chunk[place % CHUNK] ^= flip
    with pytest.raises(IntegrityError, match=f"chunk {index}"):
        table.verify(index, chunk)


@given(st.binary(max_size=4 * HASH))
def test_a_table_that_does_not_match_the_name_is_refused(hashes: bytes) -> None:
    ref = ChunkTable.of_bytes(DATA).ref
    with pytest.raises(IntegrityError, match="chunk table"):
        ChunkTable.checked(ref, hashes)


def test_a_chunk_of_wrong_length_or_place_is_refused() -> None:
    table = ChunkTable.of_bytes(DATA)
    for index, chunk in ((0, DATA[: CHUNK - 1]), (0, DATA[: CHUNK + 1]), (2, DATA[:CHUNK])):
        with pytest.raises(IntegrityError):
            table.verify(index, chunk)
