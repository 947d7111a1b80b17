"""`data.json`: the description of a folder of built data. `run create` reads it and the shard files, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lutetia.models.data.cluster.report import ClusterReport
from lutetia.models.data.parts.index import part_path, read_index
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Count, Name, added
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError

DATA_FILE = "data.json"
OLD_FORMAT = "lutetia-data-1"


class DataFile(Frozen):
    """The index of a shard's clips of one split; their parts lie in the folder of the same name without suffix."""

    path: str = Field(
        pattern=r"^shards/[0-9]{3,4}\.(train|holdout|test)\.safetensors$", description="path of the index relative to the folder"
    )
    blob: BlobRef = Field(description="digest and size of the index")
    clips: Count = Field(description="number of clips")
    bytes: Count = Field(description="bytes of index and parts")
    captions: Count = added(1, "captions of the clip that has most of them")


class DataShard(Frozen):
    """The shard of one cluster."""

    index: int = Field(ge=0, le=4095, description="number of the shard")
    name: Name = Field(description="name of the cluster")
    train: DataFile = Field(description="clips to train on")
    holdout: DataFile = Field(description="clips held out for acceptance checks")
    test: DataFile | None = Field(
        default=None, description="test clips, which took no part in the clustering; none: no such clips"
    )
    prior: float = Field(gt=0, le=1, description="share of its training and held-out clips in all shards, 0 to 1")
    keywords: tuple[str, ...] = Field(default=(), description="most distinctive words of its captions")


class DataDescription(Frozen):
    """The content of `data.json`."""

    format: Literal["lutetia-data-2"] = Field(default="lutetia-data-2", description="version of this format")
    latent: LatentSpec = Field(description="shapes of latents and texts, and their encoders")
    shards: tuple[DataShard, ...] = Field(min_length=1, max_length=4096, description="one per cluster")
    clustering: ClusterReport = Field(description="report on the clusters")
    settings: dict[str, Any] = Field(default={}, description="settings of the build that determine its content")
    skipped: int = Field(default=0, ge=0, description="clips that were left out because they could not be used")


def read_data(folder: Path) -> DataDescription:
    """Read the description of a folder that `lutetia data build` wrote.

    Raises DataError if it holds none, lacks files, or was written by release 0.1, or IntegrityError if an index is malformed.
    """
    path = folder / DATA_FILE
    try:
        text = path.read_bytes()
        _refuse_old(folder, text)
        description = DataDescription.model_validate_json(text)
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no {DATA_FILE}; name a folder that `lutetia data build` wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path} cannot be read ({reason}); build the data again") from error
    for shard in description.shards:
        for file in filter(None, (shard.train, shard.holdout, shard.test)):
            for part, blob in files_of(folder / file.path, file.blob):
                if not part.is_file():
                    raise DataError(f"{part} is missing; build the data again")
                if part.stat().st_size != blob.size:
                    raise DataError(f"{part} is not the file that {DATA_FILE} describes; build the data again")
    return description


def files_of(index: Path, blob: BlobRef) -> Iterator[tuple[Path, BlobRef]]:
    """The index and its parts, each with the blob that it must be. Raises as `read_index`, after the index has been given."""
    yield index, blob
    for number, part in enumerate(read_index(index).parts):
        yield part_path(index, number, part.blob), part.blob


def _refuse_old(folder: Path, text: bytes) -> None:
    """Raises DataError for data of release 0.1, and ValueError if `text` is no JSON object."""
    document = json.loads(text)
    if isinstance(document, dict) and document.get("format") == OLD_FORMAT:
        raise DataError(f"{folder} was built by release 0.1; convert it: lutetia data convert {folder} NEW_FOLDER")
