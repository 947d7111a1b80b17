"""Clips of a shard as training reads them: float16 on disk, float32 in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lutetia.models.experts.pictures import Pictures
from lutetia.protocol.schema.model.latent_spec import LatentSpec

Rows = Sequence[int] | Tensor
"""Numbers of clips in their shard."""


@dataclass
class ClipRows:
    """Some clips of a shard.

    Attributes:
        latents: [N, C, F, H, W] float32, normalised to about unit variance per channel.
        tokens: text tokens [N, L, D], float32, zero beyond the end of a caption.
        pooled: pooled text vectors [N, P], float32.
        pictures: of each clip the first one, float32; None: the shard holds none.
    """

    latents: Tensor
    tokens: Tensor
    pooled: Tensor
    pictures: Pictures | None = field(default=None, kw_only=True)


class ClipReader(Protocol):
    """The clips of a shard, in memory or on disk."""

    @property
    def null(self) -> tuple[Tensor, Tensor] | None:
        """What the experts are given in place of a dropped text: tokens [L, D] and pooled vector [P]; None: zeros."""
        ...

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clips of each bucket; clips are numbered bucket by bucket."""
        ...

    def take(self, rows: Rows, *, with_tokens: bool = True, captions: Tensor | None = None) -> ClipRows:
        """The clips `rows`, all of one bucket, in that order; without tokens those are [N, 0, D], and there are no pictures.

        `captions` says which of its captions each clip has, as a place in [0, 1) among them, [N]; None: the first.

        Raises IntegrityError or DataError if they cannot be read.
        """
        ...


@dataclass
class ShardData(ClipRows):
    """The clips of a shard, in memory. Each has one caption.

    Attributes:
        captions: N captions.
        kinds: N labels of the user; "" without one.
        null: tokens [L, D] and pooled vector [P] of the null condition; None: zeros.
    """

    captions: list[str]
    kinds: list[str]
    null: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """One bucket."""
        return (len(self),)

    def take(self, rows: Rows, *, with_tokens: bool = True, captions: Tensor | None = None) -> ShardData:
        """The clips `rows`, in that order; copies, not views."""
        picked = torch.as_tensor(rows, dtype=torch.long)
        tokens = self.tokens[picked] if with_tokens else self.tokens[picked, :0]
        texts, kinds = ([words[row] for row in picked.tolist()] for words in (self.captions, self.kinds))
        pictures = self.pictures.each(lambda tensor: tensor[picked]) if self.pictures else None
        return ShardData(self.latents[picked], tokens, self.pooled[picked], texts, kinds, self.null, pictures=pictures)


def shape_problem(data: ShardData, latent: LatentSpec) -> str | None:
    """The first contradiction within `data` or with `latent`, as a clause; None if there is none."""
    count = len(data.captions)
    if count == 0:
        return "it has no clips"
    if len(data.kinds) != count:
        return f"it has {count} captions but {len(data.kinds)} kinds"
    latents = tuple(data.latents.shape)
    if len(latents) == 5 and latents[2] != latent.frames:
        return f"wrong frame count: its latents have {latents[2]} frames instead of {latent.frames}"
    shapes = {
        "latents": (count, *latent.shape),
        "tokens": (count, latent.text_tokens, latent.text_width),
        "pooled": (count, latent.pooled_width),
    }
    for name, shape in shapes.items():
        if tuple(getattr(data, name).shape) != shape:
            return f"wrong shape: {name} are {list(getattr(data, name).shape)} instead of {list(shape)}"
    if (data.pictures is None) != (latent.picture is None):
        return "it has pictures where none belong" if data.pictures else "its pictures are missing"
    return None


def infinite_name(rows: ClipRows) -> str | None:
    """The first field of `rows` that holds a number that is not finite; None if there is none."""
    tensors = {name: getattr(rows, name) for name in ("latents", "tokens", "pooled")}
    if rows.pictures:
        tensors |= {"pictures": rows.pictures.latents}
        tensors |= {} if rows.pictures.vision is None else {"vision": rows.pictures.vision}
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def bucket_of(sizes: Sequence[int], rows: Tensor) -> Tensor:
    """The bucket of each clip of `rows`, int64 [N]."""
    return torch.searchsorted(torch.tensor(sizes).cumsum(0), rows, right=True)
