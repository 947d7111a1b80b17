"""Make one shard of all clusters in which each cluster is equally frequent, as for a mixture whose experts train equally long."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lutetia.models.data.description import DATA_FILE, DataDescription, DataFile, read_data
from lutetia.models.data.output import output_folder
from lutetia.models.data.shards import ShardData, ShardMetadata, load_shard, write_shard
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import canonical

Split = Literal["train", "holdout"]


def balance(source: Path, out: Path, seed: int = 0) -> DataDescription:
    """Write data of one shard into `out`, made from the clusters of `source`.

    Training clips of smaller clusters are repeated, as evenly as possible, until there are as many as in the largest. Held-out
    clips are not repeated.

    Args:
        source: folder that `build_data` wrote.
        out: new folder.
        seed: of the choice of clips that are repeated once more than others.

    Raises DataError (`source` holds no built data, or `out` is not empty) or DiskError.
    """
    built = read_data(source)
    most = max(shard.train.clips for shard in built.shards)
    draw = np.random.default_rng(seed)

    def joined(split: Split) -> ShardData:
        parts = []
        for shard in built.shards:
            data = load_shard(source / getattr(shard, split).path, built.latent)
            parts.append(data.take(_repeated(len(data), most, draw)) if split == "train" else data)
        return _concatenated(parts)

    with output_folder(out) as part:
        (part / "shards").mkdir()
        files = {}
        splits: tuple[Split, ...] = ("train", "holdout")
        for split in splits:
            path = f"shards/000.{split}.safetensors"
            data = joined(split)
            write_shard(part / path, data, ShardMetadata(latent=built.latent, name="all", split=split))
            files[split] = DataFile(path=path, blob=ChunkTable.of_file(part / path).ref, clips=len(data))
        shutil.copy(source / "clips.jsonl", part / "clips.jsonl")
        whole = built.shards[0].model_copy(update={"name": "all", **files, "test": None, "prior": 1.0, "keywords": ()})
        description = built.model_copy(update={"shards": (whole,)})
        (part / DATA_FILE).write_bytes(canonical(description))
    return description


def _repeated(have: int, want: int, draw: np.random.Generator) -> list[int]:
    """`want` of `have` rows: every row equally often, except for a random few that occur once more."""
    times, extra = divmod(want, have)
    return sorted([*range(have)] * times + draw.permutation(have)[:extra].tolist())


def _concatenated(parts: list[ShardData]) -> ShardData:
    latents, tokens, pooled = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "tokens", "pooled"))
    captions, kinds = ([word for part in parts for word in getattr(part, name)] for name in ("captions", "kinds"))
    return ShardData(latents, tokens, pooled, captions, kinds)
