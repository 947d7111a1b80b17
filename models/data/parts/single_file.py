"""Shards in one file, as release 0.1 wrote them, with one caption a clip: runs that were created then still train on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lutetia.models.data.shards import ClipRows, Rows, ShardData, infinite_name
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, IntegrityError

_NAMES = ["latents", "pooled", "tokens"]


class ShardMetadata(Frozen):
    """The metadata of a shard file."""

    format: Literal["lutetia-shard-1"] = Field(default="lutetia-shard-1", description="version of this format")
    latent: LatentSpec = Field(description="shapes of latents and texts, and their encoders")
    name: str = Field(default="", description="name of the cluster")
    split: Literal["train", "holdout", "test"] = Field(default="train", description="use of the clips")
    captions: tuple[str, ...] = Field(default=(), description="caption of each clip")
    kinds: tuple[str, ...] = Field(default=(), description="label of each clip by the user, empty without one")
    sources: tuple[str, ...] = Field(default=(), description="SHA-256 (hex) of the file of each clip; empty: not from files")


class SingleFileShard:
    """A shard in one file. Only the rows that are read are loaded.

    Args:
        path: the file.

    Raises IntegrityError: it is no shard, or its tensors do not fit its metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.metadata = _metadata(path, file.metadata())
            self.latent: LatentSpec = self.metadata.latent
            if problem := self._problem(file):
                raise IntegrityError(f"shard {path.name}: {problem}; build the data or fetch the blob again")

    def __len__(self) -> int:
        return len(self.metadata.captions)

    @property
    def null(self) -> None:
        """The null condition of such shards is zeros."""
        return None

    @property
    def sizes(self) -> tuple[int, ...]:
        """One bucket."""
        return (len(self),)

    def take(self, rows: Rows, *, with_tokens: bool = True, captions: Tensor | None = None) -> ClipRows:
        picked = torch.as_tensor(rows, dtype=torch.long).tolist()
        with self._open() as file:  # each time, so that the pages that were read are given back
            views = {name: file.get_slice(name) for name in _NAMES}
            tensors = {name: [view[row] for row in picked] for name, view in views.items() if with_tokens or name != "tokens"}
            found = {name: torch.stack(each).float() for name, each in tensors.items() if picked}
        empty = {name: torch.zeros(len(picked), *shape) for name, shape in self._shapes(with_tokens).items()}
        tensors = {**empty, **found}
        data = ClipRows(tensors["latents"], tensors["tokens"], tensors["pooled"])
        if name := infinite_name(data):
            raise IntegrityError(f"shard {self.path.name}: {name} hold numbers that are not finite; build the data again")
        return data

    def load(self) -> ShardData:
        """All clips."""
        rows = self.take(range(len(self)))
        return ShardData(rows.latents, rows.tokens, rows.pooled, list(self.metadata.captions), list(self.metadata.kinds))

    def texts(self) -> Iterator[tuple[int, Sequence[str], Tensor]]:
        """As of a shard in parts: here every clip has a text of its own."""
        with self._open() as file:
            yield 0, self.metadata.captions, file.get_tensor("pooled")

    def clip_with(self, text: int) -> int:
        """The clip with this text."""
        return text

    def _shapes(self, with_tokens: bool) -> dict[str, tuple[int, ...]]:
        latent = self.latent
        tokens = (latent.text_tokens if with_tokens else 0, latent.text_width)
        return {"latents": latent.shape, "tokens": tokens, "pooled": (latent.pooled_width,)}

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except FileNotFoundError as error:
            raise DataError(f"shard {self.path} does not exist; fetch or build it again") from error
        except SafetensorError as error:
            raise IntegrityError(
                f"shard {self.path} is not a complete safetensors file ({error}); fetch or build it again"
            ) from error

    def _problem(self, file: Any) -> str | None:
        names, count = sorted(file.keys()), len(self.metadata.captions)
        if names != _NAMES:
            return f"it holds the tensors {names} instead of latents, pooled, tokens"
        if count == 0:
            return "it has no clips"
        if self.latent.picture:
            return "it cannot hold the pictures that its metadata name"
        if len(self.metadata.kinds) != count:
            return f"it has {count} captions but {len(self.metadata.kinds)} kinds"
        for name, shape in self._shapes(True).items():
            if (found := file.get_slice(name).get_shape()) != [count, *shape]:
                return f"wrong shape: {name} are {found} instead of {[count, *shape]}"
        return None


def _metadata(path: Path, header: dict[str, str] | None) -> ShardMetadata:
    text = (header or {}).get("lutetia")
    if text is None:
        raise IntegrityError(f"{path} is a safetensors file but not a shard; name one that `lutetia data build` wrote")
    try:
        return ShardMetadata.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(f"the metadata of shard {path.name} are malformed ({reason}); build the data again") from error
