"""The parts of shards' data in a node's store: which there are, and which the trainer uses next."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lutetia.models.data.parts.index import MAX_INDEX_BYTES, ShardIndex, read_index
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import ShardSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import DataError, IntegrityError

log = logging.getLogger(__name__)


class DataParts:
    """Indexes that were read, and the next use of each part of held slots' data. Methods that take a store block on the disk."""

    def __init__(self) -> None:
        self._indexes: dict[str, ShardIndex] = {}
        self._next_use: dict[int, dict[str, int]] = {}
        """By slot."""

    def index(self, store: BlobStore, shard: ShardSpec) -> ShardIndex | None:
        """The index of a shard's data; None while it is not here or cannot be read, or if the data are one blob."""
        digest = shard.train.digest
        if shard.data_bytes is None or not store.has(digest):
            return None
        if digest not in self._indexes:
            try:
                self._indexes[digest] = read_index(store.path(digest))
            except (IntegrityError, DataError) as error:
                log.warning("%s", error)
                return None
        return self._indexes[digest]

    def refs(self, store: BlobStore, shard: ShardSpec) -> list[BlobRef]:
        """The parts of a shard's data; none while their index is not here."""
        index = self.index(store, shard)
        return [part.blob for part in index.parts] if index else []

    def set_next_use(
        self, slot: int, index: ShardIndex, uses: Sequence[int] | NDArray[np.int64], others: Collection[int] = ()
    ) -> None:
        """Remember how many samples are trained before each part of a held slot's data is used (`order.next_uses`).

        What was remembered of slots other than it and `others`, which the node holds too, is forgotten.
        """
        self._next_use = {other: known for other, known in self._next_use.items() if other in others}
        self._next_use[slot] = {part.blob.digest: int(use) for part, use in zip(index.parts, uses, strict=True)}

    def next_use(self, digest: str) -> float:
        """How many samples are trained before a blob is used; infinite if it is no part of the data of a held slot."""
        return min((known.get(digest, math.inf) for known in self._next_use.values()), default=math.inf)

    def used_within(self, store: BlobStore, shard: ShardSpec, slot: int, samples: int) -> list[BlobRef]:
        """The parts that the next `samples` samples of a slot of the shard need; all while the order of use is not known."""
        known = self._next_use.get(slot, {})
        return [ref for ref in self.refs(store, shard) if known.get(ref.digest, 0) < samples]

    def unannounced(self, store: BlobStore, shard: ShardSpec) -> set[str]:
        """Blobs without provider records: parts are asked of peers that announce the index, so that is only for whole copies."""
        digests = {ref.digest for ref in self.refs(store, shard)}
        return digests if all(map(store.has, digests)) else {*digests, shard.train.digest}


def check_index_size(shard: ShardSpec) -> None:
    """Raises IntegrityError if a manifest names a larger index than any may be, before it is fetched."""
    if shard.data_bytes is not None and shard.train.size > MAX_INDEX_BYTES:
        raise IntegrityError(
            f"the index of shard {shard.index} has {shard.train.size} bytes, more than {MAX_INDEX_BYTES}; refused"
        )


def check_index(store: BlobStore, shard: ShardSpec) -> None:
    """Raises IntegrityError when a fetched index cannot be read; one that was damaged on disk is removed."""
    digest = shard.train.digest
    try:
        store.verify(digest)
    except IntegrityError:
        store.remove(digest)
        raise
    read_index(store.path(digest))
