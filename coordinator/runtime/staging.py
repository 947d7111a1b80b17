"""Cleans up the store of undecided results when the coordinator starts."""

from __future__ import annotations

import shutil

from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.blobs.store import BlobStore


def restored_incoming(folder: RunFolder, blobs: BlobStore, state: RunState) -> BlobStore:
    """The store of undecided results. Blobs accepted just before a crash move to `blobs`; those of no candidate are removed."""
    incoming = BlobStore(folder.incoming)
    undecided = [candidate.record for shard in state.shards.values() for candidate in shard.candidates.values()]
    for shard in state.shards.values():
        accepted = [*([shard.acceptance] if shard.acceptance else []), *(link.acceptance for link in shard.gathered.values())]
        for ref in (ref for given in accepted for ref in (given.weights, given.state)):
            if not blobs.has(ref.digest) and incoming.has(ref.digest):
                blobs.adopt(incoming.path(ref.digest), incoming.table(ref.digest))
    if not undecided:
        shutil.rmtree(folder.incoming)
        return BlobStore(folder.incoming)
    wanted = {ref.digest for record in undecided for ref in (record.weights, record.state, record.trace)}
    for digest in {*incoming.digests(), *incoming.arriving()} - wanted:
        incoming.remove(digest)
    return incoming
