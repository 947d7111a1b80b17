"""`data.json`: what a folder of built data holds. It is all that `run create` reads besides the shard files themselves."""

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
    """A shard file: its path relative to the folder, its blob name, and how many clips it holds."""

    path: str = Field(pattern=r"^shards/[0-9]{3,4}\.(train|holdout|test)\.safetensors$")
    blob: BlobRef
    clips: Count


class DataShard(Frozen):
    """One cluster. `prior` is its share of the natural mixture (training and held-out clips); `test` clips were not clustered."""

    index: int = Field(ge=0, le=4095)
    name: Name
    train: DataFile
    holdout: DataFile
    test: DataFile | None = None
    prior: float = Field(gt=0, le=1)
    keywords: tuple[str, ...] = ()


class DataDescription(Frozen):
    """The whole folder. `settings` are those that determine its content."""

    format: Literal["lutetia-data-1"] = "lutetia-data-1"
    latent: LatentSpec
    shards: tuple[DataShard, ...] = Field(min_length=1, max_length=4096)
    clustering: ClusterReport
    settings: dict[str, Any] = {}
    skipped: int = Field(default=0, ge=0)


def read_data(folder: Path) -> DataDescription:
    """The description of a folder that `lutetia data build` wrote. Raises DataError when it is none, or files are missing."""
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
