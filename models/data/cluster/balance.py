"""Make one shard of all clusters in which each cluster is equally frequent, as for a mixture whose experts train equally long."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from lutetia.models.data.description import DATA_FILE, DataDescription, read_data
from lutetia.models.data.output import output_folder
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.data.parts.writer import ShardWriter, part_bytes, picture_of, text_of
from lutetia.models.data.shard_writer import data_file
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

    with output_folder(out) as part:
        (part / "shards").mkdir()
        files = {}
        splits: tuple[Split, ...] = ("train", "holdout")
        for split in splits:
            path = f"shards/000.{split}.safetensors"
            total = sum(getattr(shard, split).bytes for shard in built.shards)
            writer = ShardWriter(part / path, built.latent, "all", split, part_bytes(total))
            for shard in built.shards:
                data = load_shard(source / getattr(shard, split).path, built.latent)
                rows = _repeated(len(data), most, draw) if split == "train" else range(len(data))
                for row in rows:
                    text = text_of(data.captions[row], data.tokens[row], data.pooled[row])
                    writer.add(data.latents[row], text, data.kinds[row], picture=picture_of(data.pictures, row))
            files[split] = data_file(path, writer.finish())
        shutil.copy(source / "clips.jsonl", part / "clips.jsonl")
        whole = built.shards[0].model_copy(update={"name": "all", **files, "test": None, "prior": 1.0, "keywords": ()})
        description = built.model_copy(update={"shards": (whole,)})
        (part / DATA_FILE).write_bytes(canonical(description))
    return description


def _repeated(have: int, want: int, draw: np.random.Generator) -> list[int]:
    """`want` of `have` rows: every row equally often, except for a random few that occur once more."""
    times, extra = divmod(want, have)
    return sorted([*range(have)] * times + draw.permutation(have)[:extra].tolist())
