"""Which parts a batch needs is known before they are here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lutetia.models.data.parts.batch_order import batches_of_lane
from lutetia.models.data.parts.index import IndexDocument, PartSpec, ShardIndex, part_path
from lutetia.models.data.parts.order import next_uses, parts_used, to_fetch
from lutetia.models.data.parts.reader import PartedShard, open_shard
from lutetia.models.data.parts.writer import part_bytes, write_shard
from lutetia.models.training.batches import Batches
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.system.errors import DataError
from tests.models.tiny_experts import LATENT, tiny_data, tiny_manifest

MANIFEST = tiny_manifest(1)
TEAM = tiny_manifest(1, team=TeamSpec(lanes=3, shares=(1.0, 0.5)), needs=(LANES,))
BATCH, STEPS = MANIFEST.optimisation.batch, MANIFEST.steps_per_epoch


def large_index(total: int, clip: int) -> ShardIndex:
    """An index as `data build` makes it for a shard of `total` bytes and clips of `clip` bytes, each with a text of its own."""
    size, clips = part_bytes(total), total // clip
    each = size // clip
    counts = [each] * (clips // each) + ([clips % each] if clips % each else [])
    parts = tuple(PartSpec(blob=BlobRef(digest=f"{n:064x}", size=c * clip), clips=c, texts=c) for n, c in enumerate(counts))
    return ShardIndex(IndexDocument(latent=LATENT, parts=parts), np.arange(clips, dtype=np.int32))


@pytest.mark.parametrize(("batch", "share"), [(16, 0.02), (64, 0.07)])
def test_first_batch_of_a_large_shard_needs_few_of_its_bytes(batch: int, share: float) -> None:
    """4 GB of clips of 33 frames at 256 px with 60 tokens of 4,096 numbers: below a tenth before the first step."""
    index = large_index(4 << 30, 295_000 + 60 * 8192)
    used = parts_used(MANIFEST, 0, index, 0, batch)
    assert sum(index.parts[number].blob.size for number in used) < share * index.bytes


@pytest.mark.parametrize(("first", "lane"), [(0, None), (4, None), (8, None), (24, None), (100, None), (4, 0), (24, 1), (8, 2)])
def test_the_parts_used_are_those_that_batches_read(tmp_path: Path, first: int, lane: int | None) -> None:
    manifest = MANIFEST if lane is None else TEAM
    path = tmp_path / "s.safetensors"
    write_shard(path, tiny_data(10), LATENT, size=3000)
    shard = open_shard(path, LATENT)
    assert isinstance(shard, PartedShard)
    place = divmod(first // BATCH, STEPS)
    needed = parts_used(manifest, 0, shard.index, first, BATCH, lane or 0)
    assert 1 < len(needed) < len(shard.index.parts)
    for number, part in enumerate(shard.index.parts):
        if number not in needed:
            part_path(path, number, part.blob).unlink()
    Batches(manifest, 0, shard, lane or 0).at(*place)
    part_path(path, needed[-1], shard.index.parts[needed[-1]].blob).unlink()
    with pytest.raises(DataError, match=f"{needed[-1]:04d}.safetensors does not exist"):
        Batches(manifest, 0, open_shard(path, LATENT), lane or 0).at(*place)


def test_every_part_has_a_next_use_and_the_missing_ones_come_in_that_order() -> None:
    index = large_index(40 << 20, 1 << 20)
    for first in (0, 17, 39, 40):
        uses = next_uses(MANIFEST, 0, index, first)
        assert uses.min() == 0
        assert uses.max() < 2 * len(index)
    uses, here = np.array([5, 0, 9, 0]), np.array([False, True, False, False])
    assert to_fetch(uses, here) == [3, 0, 2]


def test_lane_takes_every_third_batch_and_skips_what_its_share_leaves_out() -> None:
    assert batches_of_lane(MANIFEST, 0, 7, 3).tolist() == [7, 8, 9]
    assert STEPS == 6
    assert batches_of_lane(TEAM, 1, 1, 5).tolist() == [3 * step + 1 for step in (1, 2, 6, 7, 8)]
    assert batches_of_lane(TEAM, 1, 3, 2).tolist() == [3 * step + 1 for step in (6, 7)], "its part of the epoch is done"
