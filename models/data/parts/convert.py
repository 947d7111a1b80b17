"""Convert data that release 0.1 built: shards in one file become an index and parts. Clips and their order stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lutetia.models.data.description import DATA_FILE, OLD_FORMAT, DataDescription, DataFile, DataShard
from lutetia.models.data.output import output_folder
from lutetia.models.data.parts.index import Split
from lutetia.models.data.parts.single_file import SingleFileShard
from lutetia.models.data.parts.writer import ShardWriter, part_bytes, text_of
from lutetia.models.data.shard_writer import data_file
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import first_problem
from lutetia.system.errors import DataError, IntegrityError

SPLITS: tuple[Split, ...] = ("train", "holdout", "test")


def convert(source: Path, out: Path, on_progress: Callable[[str, int, int], None] | None = None) -> DataDescription:
    """Write the data in `source` to the new folder `out` in today's format; `source` stays.

    A run on the converted data has the same batches as one on the old data with the same run id.

    Args:
        source: folder that `lutetia data build` of release 0.1 wrote.
        out: new folder.
        on_progress: called with "shards", done and total.

    Raises DataError (`source` holds no such data, or `out` is not empty), IntegrityError (a shard was damaged) or DiskError.
    """
    document = _read_old(source)
    shards: list[DataShard] = []
    with output_folder(out) as part:
        try:
            for done, old in enumerate(document["shards"], 1):
                files = {split: _converted(source, part, split, old[split]) for split in SPLITS if old.get(split)}
                shards.append(DataShard.model_validate({**old, **files}))
                if on_progress:
                    on_progress("shards", done, len(document["shards"]))
            description = DataDescription.model_validate({**document, "format": "lutetia-data-2", "shards": shards})
        except (ValidationError, KeyError, TypeError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else f"{error} is missing"
            raise DataError(f"{source / DATA_FILE} cannot be read ({reason}); build the data again") from error
        for name in ("clips.jsonl", "sheets"):
            if (source / name).is_dir():
                shutil.copytree(source / name, part / name)
            elif (source / name).is_file():
                shutil.copy(source / name, part / name)
        (part / DATA_FILE).write_bytes(canonical(description))
    return description


def _read_old(source: Path) -> dict[str, Any]:
    try:
        document = json.loads((source / DATA_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} holds no readable {DATA_FILE}; name a folder that `lutetia data build` wrote") from error
    if not isinstance(document, dict) or document.get("format") != OLD_FORMAT:
        raise DataError(f"{source} was not built by release 0.1, so it needs no conversion; name it in `lutetia run create`")
    return document


def _converted(source: Path, part: Path, split: Split, old: dict[str, Any]) -> DataFile:
    file = DataFile.model_validate({**old, "bytes": 1})  # also checks that the path stays inside the folder
    path = source / file.path
    shard = SingleFileShard(path)
    if ChunkTable.of_file(path).ref != file.blob:
        raise IntegrityError(f"{path} has changed since it was built; build the data again")
    metadata = shard.metadata
    writer = ShardWriter(part / file.path, shard.latent, metadata.name, split, part_bytes(file.blob.size))
    for row, (caption, kind) in enumerate(zip(metadata.captions, metadata.kinds, strict=True)):
        clip = shard.take([row])
        source_digest = metadata.sources[row] if row < len(metadata.sources) else ""
        writer.add(clip.latents[0], text_of(caption, clip.tokens[0], clip.pooled[0]), kind, source_digest)
    return data_file(file.path, writer.finish())
