"""Shards of made-up clips that a tiny expert learns within seconds, written as a data folder from which a run is created."""

from __future__ import annotations

from pathlib import Path

from benchmarks.attacks.lab import clips
from benchmarks.fuzz.examples import LATENT
from lutetia.models.data.cluster.report import ClusterReport
from lutetia.models.data.description import DATA_FILE, DataDescription, DataFile, DataShard
from lutetia.models.data.parts.index import Split
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.canonical import canonical

TRAINING_CLIPS = 32
_NOISE = 0.1


def training_clips(shard: int) -> ShardData:
    """The training clips of a shard, as its file has them."""
    return clips(shard, TRAINING_CLIPS, _NOISE)


def write_toy_data(folder: Path, shards: int, held_out: int) -> None:
    """Write `shards` shards with `held_out` held-out clips each, and their description."""
    (folder / "shards").mkdir(parents=True)
    entries = []
    for index in range(shards):
        files = {}
        splits: tuple[tuple[Split, ShardData], ...] = (
            ("train", training_clips(index)),
            ("holdout", clips(index, held_out, _NOISE)),
        )
        for split, data in splits:
            path = f"shards/{index:03d}.{split}.safetensors"
            written = write_shard(folder / path, data, LATENT, name=f"kind {index}", split=split)
            files[split] = DataFile(path=path, blob=written.blob, clips=written.clips, bytes=written.bytes)
        entries.append(DataShard(index=index, name=f"kind {index}", **files, prior=1 / shards))
    report = ClusterReport(clusters=(), silhouette=0.0, largest_uncapped=1 / shards)
    (folder / DATA_FILE).write_bytes(canonical(DataDescription(latent=LATENT, shards=tuple(entries), clustering=report)))
