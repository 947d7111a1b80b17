"""After a power loss at any moment blobs are whole, transfers resume, and small files are old or new."""

from __future__ import annotations

from pathlib import Path

from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.schema.manifest import SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.model.blob_ref import BlobRef
from tests.protocol.example_documents import NOW, OWNER, manifest
from tests.protocol.power_loss import every_power_loss, needs_strace, record

BIG = bytes(range(256)) * (CHUNK // 256) + b"the second chunk"
BIG_REF = ChunkTable.of_bytes(BIG).ref

STORE = """
import sys
from pathlib import Path
from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.store import BlobStore
root = Path(sys.argv[1])
store = BlobStore(root / "blobs")
print("@", store.add_bytes(b"small").digest, flush=True)
(root / "file").write_bytes(b"taken")
print("@", store.add_file(root / "file", move=True).digest, flush=True)
big = bytes(range(256)) * (CHUNK // 256) + b"the second chunk"
table = ChunkTable.of_bytes(big)
partial = store.partial(table.ref)
partial.set_table(table)
partial.write(1, big[CHUNK:])
partial.close()
partial = store.partial(table.ref)
assert partial.missing() == [0]
partial.write(0, big[:CHUNK])
store.finish(partial)
print("@", table.ref.digest, flush=True)
store.add_bytes(b"small")
store.remove(ChunkTable.of_bytes(b"taken").ref.digest)
"""


def check_store(folder: Path, marks: list[str]) -> None:
    """Every blob of the store is whole, every acknowledged one is there, and the others can be added again."""
    store = BlobStore(folder / "blobs")
    for digest in store.digests():
        store.verify(digest)
    taken = ChunkTable.of_bytes(b"taken").ref.digest
    for mark in marks:
        assert store.has(mark) or (mark == taken and BIG_REF.digest in marks), f"acknowledged {mark[:8]} is lost"
    fetch_again(store, BIG_REF, BIG)
    assert store.path(store.add_bytes(b"small").digest).read_bytes() == b"small"


def fetch_again(store: BlobStore, ref: BlobRef, data: bytes) -> None:
    """An interrupted transfer is verified chunk by chunk and continues."""
    if store.has(ref.digest):
        return
    partial = store.partial(ref)
    if not partial.has_table:
        partial.set_table(ChunkTable.of_bytes(data))
    for index in partial.missing():
        partial.write(index, data[index * CHUNK : (index + 1) * CHUNK])
    store.finish(partial)
    store.verify(ref.digest)


@needs_strace
def test_the_blob_store_survives_a_power_loss(tmp_path: Path):
    calls = record(STORE, tmp_path / "root")
    assert every_power_loss(calls, tmp_path / "root", tmp_path / "disks", check_store) > 60


FILES = """
import sys
from pathlib import Path
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.peerstore import Peerstore
root, first, second, now = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
from lutetia.system.files import write_atomic
write_atomic(root / "deep" / "manifest.json", first.encode())
print("@manifest 1", flush=True)
live = LiveManifest(SignedManifest.model_validate_json(first), root / "deep" / "manifest.json")
assert live.adopt(second.encode(), now)
print("@manifest 2", flush=True)
cache = Peerstore(root / "peers.json")
for number in (1, 2):
    cache.remember([f"/ip4/127.0.0.1/tcp/{number}/p2p/peer{number}"])
    print("@peers", number, flush=True)
"""


@needs_strace
def test_a_small_file_is_old_or_new_after_a_power_loss(tmp_path: Path):
    first = SignedManifest.sign(manifest(), OWNER)
    second = SignedManifest.sign(next_version(first.manifest, {"holdout_tolerance": 0.5}, NOW), OWNER)
    words = [signed.to_bytes().decode() for signed in (first, second)]

    def check(folder: Path, marks: list[str]) -> None:
        marked = dict(mark.split() for mark in marks)
        path = folder / "deep" / "manifest.json"
        version = open_manifest(path.read_bytes(), now=NOW, owner=OWNER.public_key).manifest.version if path.exists() else 0
        assert version >= int(marked.get("manifest", 0)), "an adopted version is lost, so peers could be rolled back"
        peers = Peerstore(folder / "peers.json").load()
        assert len(peers) >= int(marked.get("peers", 0))

    calls = record(FILES, tmp_path / "root", *words, str(NOW))
    assert every_power_loss(calls, tmp_path / "root", tmp_path / "disks", check) > 20
