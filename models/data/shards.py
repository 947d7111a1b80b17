"""Shards: latents and text embeddings of one cluster in one safetensors file, float16 on disk, float32 in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import LatentSpec, first_problem
from lutetia.system.errors import DataError, IntegrityError
from lutetia.system.files import atomic_path

FORMAT = "lutetia-shard-1"
MAX_METADATA_BYTES = 64 << 20  # safetensors itself refuses headers above 100 MB


@dataclass
class ShardData:
    """The clips of a shard, in memory.

    Attributes:
        latents: [N, C, F, H, W] float32, normalised to about unit variance per channel.
        tokens: text tokens [N, L, D], float32.
        pooled: pooled text vectors [N, P], float32.
        captions: N captions.
        kinds: N labels of the user; "" without one.
    """

    latents: Tensor
    tokens: Tensor
    pooled: Tensor
    captions: list[str]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int]) -> ShardData:
        """The clips `rows`, in that order."""
        picked = torch.as_tensor(rows, dtype=torch.long)
        captions, kinds = [self.captions[row] for row in rows], [self.kinds[row] for row in rows]
        return ShardData(self.latents[picked], self.tokens[picked], self.pooled[picked], captions, kinds)

    def lean(self) -> ShardData:
        """What the training of a router needs: no tokens, and latents in float16, as on disk."""
        return ShardData(self.latents.half(), self.tokens[:, :0].clone(), self.pooled, self.captions, self.kinds)


class ShardMetadata(Frozen):
    """The metadata of a shard file."""

    format: Literal["lutetia-shard-1"] = Field(default=FORMAT, description="version of this format")
    latent: LatentSpec = Field(description="shapes of latents and texts, and their encoders")
    name: str = Field(default="", description="name of the cluster")
    split: Literal["train", "holdout", "test"] = Field(default="train", description="use of the clips")
    captions: tuple[str, ...] = Field(default=(), description="caption of each clip")
    kinds: tuple[str, ...] = Field(default=(), description="label of each clip by the user, empty without one")
    sources: tuple[str, ...] = Field(default=(), description="SHA-256 (hex) of the file of each clip; empty: not from files")


def write_shard(path: Path, data: ShardData, metadata: ShardMetadata) -> None:
    """Write a shard atomically. The same data give the same bytes.

    Args:
        path: the file.
        data: the clips; their captions and kinds replace those of `metadata`.
        metadata: the rest of the metadata.

    Raises DataError if the data do not have the shapes of `metadata.latent`, are not finite in float16, or have no clips.
    """
    tensors = {"latents": data.latents, "tokens": data.tokens, "pooled": data.pooled}
    problem = _problem(tensors, data.captions, data.kinds, metadata.latent)
    if problem:
        raise DataError(f"cannot write shard {path.name}: {problem}; build the data again")
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    for name, half in halves.items():
        if not torch.isfinite(half).all():
            raise DataError(f"cannot write shard {path.name}: {name} are not finite in half precision; normalise them")
    complete = metadata.model_copy(update={"captions": tuple(data.captions), "kinds": tuple(data.kinds)})
    text = canonical(complete).decode()
    if len(text) > MAX_METADATA_BYTES:
        raise DataError(
            f"cannot write shard {path.name}: its captions take {len(text) >> 20} MiB; split the data into more experts"
        )
    with atomic_path(path) as temporary:
        # one key only: safetensors writes several keys in random order, and equal data must have equal digests
        temporary.write_bytes(save(halves, metadata={"lutetia": text}))  # the writer of safetensors hides a full disk


def read_shard_metadata(path: Path) -> ShardMetadata:
    """Read the metadata without the tensors. Raises DataError (no such file) or IntegrityError (not a shard)."""
    try:
        with safe_open(path, framework="pt") as file:
            return _metadata(path, file.metadata())
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist; fetch or build it again") from error
    except SafetensorError as error:
        raise IntegrityError(f"shard {path} is not a complete safetensors file ({error}); fetch or build it again") from error


def load_shard(path: Path, latent: LatentSpec, batch: int | None = None) -> ShardData:
    """Read a shard and check it.

    Args:
        path: the file.
        latent: the spec of the run; that of the shard must be equal in every field.
        batch: the fewest clips that the shard must have.

    Raises DataError (no such file, or fewer clips than a batch) or IntegrityError (anything that does not match).
    """
    metadata = read_shard_metadata(path)
    for field in LatentSpec.model_fields:
        built, expected = getattr(metadata.latent, field), getattr(latent, field)
        if built != expected:
            raise IntegrityError(
                f"shard {path.name} was built with {field} {built}, but the run has {expected}; build the data again"
            )
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != {"latents", "tokens", "pooled"}:
            raise IntegrityError(
                f"shard {path.name} holds the tensors {sorted(names)} instead of latents, pooled, tokens; build it again"
            )
        tensors = {name: file.get_tensor(name).float() for name in names}
    captions, kinds = list(metadata.captions), list(metadata.kinds)
    problem = _problem(tensors, captions, kinds, latent)
    if problem:
        raise IntegrityError(f"shard {path.name}: {problem}; build the data or fetch the blob again")
    if batch is not None and len(captions) < batch:
        raise DataError(
            f"shard {path.name} has {len(captions)} clips, fewer than a batch of {batch}; use a smaller batch or fewer experts"
        )
    return ShardData(**tensors, captions=captions, kinds=kinds)


def _metadata(path: Path, header: dict[str, str] | None) -> ShardMetadata:
    text = (header or {}).get("lutetia")
    if text is None:
        raise IntegrityError(f"{path} is a safetensors file but not a shard; name one that `lutetia data build` wrote")
    try:
        return ShardMetadata.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(f"the metadata of shard {path.name} are malformed ({reason}); build the data again") from error


def _problem(tensors: dict[str, Tensor], captions: list[str], kinds: list[str], latent: LatentSpec) -> str | None:
    """The first contradiction within the content or with `latent`, as a clause; None if there is none."""
    count = len(captions)
    if count == 0:
        return "it has no clips"
    if len(kinds) != count:
        return f"it has {count} captions but {len(kinds)} kinds"
    latents = tuple(tensors["latents"].shape)
    if len(latents) == 5 and latents[2] != latent.frames:
        return f"wrong frame count: its latents have {latents[2]} frames instead of {latent.frames}"
    shapes = {
        "latents": (count, *latent.shape),
        "tokens": (count, latent.text_tokens, latent.text_width),
        "pooled": (count, latent.pooled_width),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            return f"wrong shape: {name} are {list(tensors[name].shape)} instead of {list(shape)}"
        if not torch.isfinite(tensors[name]).all():
            return f"{name} hold numbers that are not finite"
    return None
