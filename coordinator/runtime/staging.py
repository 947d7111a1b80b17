"""What a restarted coordinator finds of results: those it accepted, and those that nobody has decided on."""

from __future__ import annotations

import shutil

from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.blobs.store import BlobStore


def restored_incoming(folder: RunFolder, blobs: BlobStore, state: RunState) -> BlobStore:
    """The store of undecided results: what was accepted just before a crash is kept, what nobody waits for is removed."""
    incoming = BlobStore(folder.incoming)
    waiting = [candidate.record for shard in state.shards.values() for candidate in shard.candidates.values()]
    for shard in state.shards.values():
        for ref in (shard.acceptance.weights, shard.acceptance.state) if shard.acceptance else ():
            if not blobs.has(ref.digest) and incoming.has(ref.digest):
                blobs.adopt(incoming.path(ref.digest), incoming.table(ref.digest))
    if not waiting:
        shutil.rmtree(folder.incoming)
        return BlobStore(folder.incoming)
    wanted = {ref.digest for record in waiting for ref in (record.weights, record.state, record.trace)}
    for digest in {*incoming.digests(), *incoming.arriving()} - wanted:
        incoming.remove(digest)
    return incoming
