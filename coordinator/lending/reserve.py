"""Held-out clips that may be given to strangers: files of a few clips, each for one check and never again.

Whoever has been given held-out clips can train on them. So a run without named checkers lends a file of its reserve with each
check, and the ledger remembers which files are used up before anybody gets one. What is used up scores no other result.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import ConfigError


class Reserve(Frozen):
    """`reserve.json`: for each shard the files of held-out clips, in the order of their use."""

    clips: int = Field(ge=1, description="Held-out clips in each file")
    shards: tuple[tuple[BlobRef, ...], ...] = Field(description="The files of each shard")


def read_reserve(folder: RunFolder) -> Reserve | None:
    """The run's reserve; None where none was drawn. Raises ConfigError when its file is malformed."""
    try:
        return Reserve.model_validate_json(folder.reserve.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{folder.reserve} is malformed: {first_problem(error)}; restore it from a backup") from error


def next_of_reserve(reserve: Reserve, burnt: Mapping[str, str], shard: int, checkpoint: str) -> BlobRef | None:
    """The file to score a result on: the one that it was given before, else the first unused one; None: all are used up."""
    files = reserve.shards[shard]
    own = next((ref for ref in files if burnt.get(ref.digest) == checkpoint), None)
    return own or next((ref for ref in files if ref.digest not in burnt), None)


def files_left(reserve: Reserve, burnt: Mapping[str, str]) -> tuple[int, ...]:
    """How many checks of each shard the reserve is still good for."""
    return tuple(sum(ref.digest not in burnt for ref in files) for files in reserve.shards)
