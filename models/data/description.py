"""`data.json`: the description of a folder of built data. `run create` reads it and the shard files, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lutetia.models.data.cluster.report import ClusterReport
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import BlobRef, Count, LatentSpec, Name, first_problem
from lutetia.system.errors import DataError

DATA_FILE = "data.json"


class DataFile(Frozen):
    """A shard file."""

    path: str = Field(
        pattern=r"^shards/[0-9]{3,4}\.(train|holdout|test)\.safetensors$", description="path relative to the folder"
    )
    blob: BlobRef = Field(description="digest and size of the file")
    clips: Count = Field(description="number of clips")


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

    format: Literal["lutetia-data-1"] = Field(default="lutetia-data-1", description="version of this format")
    latent: LatentSpec = Field(description="shapes of latents and texts, and their encoders")
    shards: tuple[DataShard, ...] = Field(min_length=1, max_length=4096, description="one per cluster")
    clustering: ClusterReport = Field(description="report on the clusters")
    settings: dict[str, Any] = Field(default={}, description="settings of the build that determine its content")
    skipped: int = Field(default=0, ge=0, description="clips that were left out because they could not be used")


def read_data(folder: Path) -> DataDescription:
    """Read the description of a folder that `lutetia data build` wrote. Raises DataError if it holds none, or lacks files."""
    path = folder / DATA_FILE
    try:
        description = DataDescription.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no {DATA_FILE}; name a folder that `lutetia data build` wrote") from error
    except (OSError, ValidationError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path} cannot be read ({reason}); build the data again") from error
    for shard in description.shards:
        for file in filter(None, (shard.train, shard.holdout, shard.test)):
            if not (folder / file.path).is_file():
                raise DataError(f"{folder / file.path} is missing; build the data again")
            if (folder / file.path).stat().st_size != file.blob.size:
                raise DataError(f"{folder / file.path} is not the file that {DATA_FILE} describes; build the data again")
    return description
