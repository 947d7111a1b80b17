"""Chunks on their way to a short-lived process: given out, given back, kept across processes, never mixed up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.light_client.transfer import ArrivingFolder, Transfers
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError, UsageError

DATA = random.Random(3).randbytes(10 * CHUNK + 5)
TABLE = ChunkTable.of_bytes(DATA)
REF = TABLE.ref


def chunk(index: int) -> bytes:
    return DATA[index * CHUNK : (index + 1) * CHUNK]


def begin(folder: ArrivingFolder) -> Transfers:
    transfers = Transfers(folder, [REF], lambda done, total: None)
    if transfers.without_table(set()) is not None:
        transfers.set_table(REF, TABLE)
    return transfers


def test_two_peers_get_different_chunks_and_those_of_a_lost_one_return(tmp_path: Path):
    with ArrivingFolder(tmp_path / "arriving", [REF]) as folder:
        transfers = begin(folder)
        first, second = transfers.take(set()), transfers.take(set())
        assert first
        assert second
        assert sorted(first.chunks + second.chunks) == list(range(11))
        assert transfers.take(set()) is None
        transfers.arrived(first, 0, chunk(0))
        transfers.give_back(first)
        again = transfers.take(set())
        assert again
        assert again.chunks == first.chunks[1:], "what has arrived is not fetched again"
        transfers.close()


def test_next_process_goes_on_and_trusts_no_mark(tmp_path: Path):
    with ArrivingFolder(tmp_path / "arriving", [REF]) as folder:
        transfers = begin(folder)
        batch = transfers.take(set())
        assert batch
        for index in batch.chunks:
            transfers.arrived(batch, index, chunk(index))
        transfers.close()
    with (tmp_path / "arriving" / REF.digest).open("r+b") as file:  # a power loss can keep marks and lose bytes
        file.write(b"lost")
    (tmp_path / "arriving" / ("0" * 64)).touch()
    seen: list[int] = []
    with ArrivingFolder(tmp_path / "arriving", [REF]) as folder:
        transfers = Transfers(folder, [REF], lambda done, total: seen.append(done))
        assert seen == [7 * CHUNK]
        while (batch := transfers.take(set())) is not None:
            assert batch.chunks[0] in (0, 8)
            for index in batch.chunks:
                transfers.arrived(batch, index, chunk(index))
        assert transfers.done
        transfers.close()
        folder.move_into({tmp_path / "one": REF, tmp_path / "two": REF})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == DATA
    assert not (tmp_path / "arriving").exists()


def test_wrong_chunk_is_not_kept(tmp_path: Path):
    with ArrivingFolder(tmp_path / "arriving", [REF]) as folder:
        transfers = begin(folder)
        batch = transfers.take(set())
        assert batch
        with pytest.raises(IntegrityError, match="chunk 0"):
            transfers.arrived(batch, 0, chunk(1))
        transfers.close()


def test_peer_that_lacks_a_blob_is_asked_for_others(tmp_path: Path):
    other = BlobRef(digest="1" * 64, size=5)
    with ArrivingFolder(tmp_path / "arriving", [REF, other]) as folder:
        transfers = Transfers(folder, [REF, other], lambda done, total: None)
        assert transfers.without_table({REF.digest}) == other
        assert not transfers.only({REF.digest})
        assert transfers.only({REF.digest, other.digest})
        transfers.close()


def test_second_process_is_refused_while_the_first_fetches(tmp_path: Path):
    with ArrivingFolder(tmp_path / "arriving", [REF]), pytest.raises(UsageError, match="another process fetches"):
        ArrivingFolder(tmp_path / "arriving", [REF]).__enter__()
