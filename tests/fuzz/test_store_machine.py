"""The blob store beside a dictionary: add, adopt, fetch in part, die in between, remove, fill up. They never disagree."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.system.errors import DiskError, IntegrityError

LIMIT = 3 * CHUNK
contents = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 5).map(lambda seed: bytes([seed]) * (CHUNK + seed)),
    st.integers(0, 3).map(lambda seed: bytes([seed]) * (2 * CHUNK)),
)


class Store(RuleBasedStateMachine):
    """`whole` is what must be there; `coming` which chunks of which blobs have been kept."""

    data = Bundle("data")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name) / "blobs"
        self.store = BlobStore(self.root, LIMIT)
        self.whole: dict[str, bytes] = {}
        self.coming: dict[str, tuple[bytes, set[int]]] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def used(self) -> int:
        return sum(map(len, self.whole.values()))

    @rule(target=data, content=contents)
    def some_bytes(self, content: bytes) -> bytes:
        return content

    @rule(content=data, as_file=st.booleans(), move=st.booleans())
    def add(self, content: bytes, as_file: bool, move: bool) -> None:
        table, path = ChunkTable.of_bytes(content), self.root.parent / "source"
        path.write_bytes(content)
        known = table.ref.digest in self.whole
        try:
            ref = self.store.add_file(path, move=move) if as_file else self.store.add_bytes(content)
        except DiskError:
            assert self.used() + len(content) > LIMIT
            return
        assert ref == table.ref
        assert known or self.used() + len(content) <= LIMIT
        assert path.exists() == (not (as_file and move))
        self.whole[ref.digest] = content

    @rule(content=data, parts=st.sets(st.integers(0, 2)), restart=st.booleans(), lie=st.booleans())
    def fetch_in_part(self, content: bytes, parts: set[int], restart: bool, lie: bool) -> None:
        """A transfer that keeps some chunks and ends; the next one goes on from them."""
        table = ChunkTable.of_bytes(content)
        if table.ref.digest in self.whole:
            return
        try:
            partial = self.store.partial(table.ref)
        except DiskError:
            assert self.used() + len(content) > LIMIT
            return
        try:
            there = self.coming.get(table.ref.digest, (content, set()))[1]
            assert set(range(table.count)) - set(partial.missing()) == there
            if not partial.has_table:
                partial.set_table(table)
            for index in sorted(parts & set(range(table.count))):
                chunk = content[index * CHUNK : (index + 1) * CHUNK]
                if lie:
                    with pytest.raises(IntegrityError):
                        partial.write(index, chunk[:-1] + bytes([chunk[-1] ^ 1]))
                else:
                    partial.write(index, chunk)
                    there.add(index)
            self.coming[table.ref.digest] = content, there
            if partial.complete:
                assert self.store.finish(partial).read_bytes() == content
                del self.coming[table.ref.digest]
                self.whole[table.ref.digest] = content
            else:
                with pytest.raises(IntegrityError):
                    self.store.finish(partial)
        finally:
            partial.close()
        if restart:
            self.store = BlobStore(self.root, LIMIT)

    @rule(content=data)
    def an_adoption_cut_short(self, content: bytes) -> None:
        """The power fails after the table was written and before the bytes had their name: the blob is not there."""
        table = ChunkTable.of_bytes(content)
        if table.ref.digest not in self.whole:
            place = self.root / table.ref.digest[:2]
            place.mkdir(exist_ok=True)
            (place / f"{table.ref.digest}.table").write_bytes(table.hashes)

    @rule(content=consumes(data))
    def remove(self, content: bytes) -> None:
        digest = ChunkTable.of_bytes(content).ref.digest
        self.store.remove(digest)
        self.whole.pop(digest, None)
        self.coming.pop(digest, None)

    @rule()
    def another_process_opens_it(self) -> None:
        self.store = BlobStore(self.root, LIMIT)

    @rule(content=data)
    def read(self, content: bytes) -> None:
        ref = ChunkTable.of_bytes(content).ref
        if ref.digest in self.whole:
            assert self.store.path(ref.digest).read_bytes() == content
            assert self.store.table(ref.digest).ref == ref
            self.store.verify(ref.digest)
        else:
            with pytest.raises(BlobMissing):
                self.store.path(ref.digest)

    @invariant()
    def store_and_dictionary_agree(self) -> None:
        if hasattr(self, "store"):
            assert self.store.digests() == sorted(self.whole)
            assert self.store.used_bytes() == self.used() <= LIMIT
            kept = {digest for digest, (_, there) in self.coming.items() if there}
            left = {path.name for path in self.store.partial_folder.iterdir()}
            assert kept - {*self.whole} <= left <= kept, "a transfer of which nothing arrived leaves nothing"


Store.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestStore = Store.TestCase
