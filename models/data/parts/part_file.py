"""One part of a shard: a safetensors file with clips and with the texts that no earlier part holds.

latents  float16 [clips, C, F, H, W]
tokens   float16 [rows, D]: the tokens of all its texts, one text after another, each at its true length
lengths  int32 [texts]: rows of each text
pooled   float16 [texts, P]
pictures float16 [clips, C, f, H, W], vision float16 [clips, T, D]: of first pictures, where `LatentSpec.picture` says so

The metadata hold the captions of its texts, and the kinds and source digests of its clips.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lutetia.models.data.parts.index import METADATA, PartSpec
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, IntegrityError
from lutetia.system.files import atomic_path

Picture = dict[str, Tensor]
"""What a part holds of one picture, float16: `pictures` [C, f, H, W] and perhaps `vision` [T, D]."""


def picture_shapes(latent: LatentSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of what a part holds of one picture, by name; empty: nothing."""
    spec = latent.picture
    if spec is None:
        return {}
    return {"pictures": latent.picture_shape} | (
        {"vision": (spec.vision_tokens, spec.vision_width)} if spec.vision_tokens else {}
    )


class PartMetadata(Frozen):
    """The metadata of a part."""

    format: Literal["lutetia-part-1"] = Field(default="lutetia-part-1", description="version of this format")
    captions: tuple[str, ...] = Field(default=(), description="caption of each text")
    kinds: tuple[str, ...] = Field(default=(), description="label of each clip by the user, empty without one")
    sources: tuple[str, ...] = Field(default=(), description="SHA-256 (hex) of the file of each clip; empty: not from files")


@dataclass(frozen=True)
class Text:
    """A caption and its embedding in float16: tokens [length, D] and pooled vector [P]."""

    caption: str
    tokens: Tensor
    pooled: Tensor

    @property
    def bytes(self) -> int:
        return 2 * (self.tokens.numel() + self.pooled.numel()) + len(self.caption.encode())


def true_length(tokens: Tensor) -> int:
    """How many of the rows [L, D] there are before the zeros at the end."""
    used = tokens.ne(0).any(1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def write_part(
    path: Path,
    latents: Sequence[Tensor],
    texts: Sequence[Text],
    metadata: PartMetadata,
    widths: tuple[int, int],
    pictures: Sequence[Picture] = (),
) -> None:
    """Write a part atomically. The same content gives the same bytes.

    Args:
        path: the file.
        latents: of its clips, float16 [C, F, H, W] each.
        texts: those that no earlier part holds.
        metadata: kinds and sources of the clips.
        widths: of tokens and pooled vectors.
        pictures: of its clips.
    """
    complete = metadata.model_copy(update={"captions": tuple(text.caption for text in texts)})
    tensors = {
        "latents": torch.stack(list(latents)),
        "tokens": torch.cat([text.tokens for text in texts]) if texts else torch.zeros(0, widths[0], dtype=torch.float16),
        "lengths": torch.tensor([len(text.tokens) for text in texts], dtype=torch.int32),
        "pooled": torch.stack([text.pooled for text in texts]) if texts else torch.zeros(0, widths[1], dtype=torch.float16),
    }
    if pictures:
        tensors |= {name: torch.stack([picture[name] for picture in pictures]) for name in pictures[0]}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={METADATA: canonical(complete).decode()}))


@dataclass
class OpenPart:
    """A part that is mapped into memory: only what is read is loaded. `close` gives the mapping back.

    Raises DataError (no such file) or IntegrityError (not the part that the index describes).
    """

    path: Path
    part: PartSpec
    latent: LatentSpec
    starts: Tensor = field(init=False)
    """The first row of each text, and the number of rows [texts + 1]."""

    def __post_init__(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
        except FileNotFoundError as error:
            raise DataError(f"part {self.path} does not exist; fetch or build it again") from error
        except SafetensorError as error:
            raise IntegrityError(f"part {self.path} is not a complete safetensors file ({error}); fetch it again") from error
        problem = self._problem()
        if problem:
            raise IntegrityError(f"part {self.path.name} does not fit its index: {problem}; build the data again")

    def _problem(self) -> str | None:
        names, clips, texts, latent = set(self._file.keys()), self.part.clips, self.part.texts, self.latent
        pictures = picture_shapes(latent)
        wanted = {"latents", "tokens", "lengths", "pooled", *pictures}
        if names != wanted:
            return f"it holds the tensors {sorted(names)} instead of {sorted(wanted)}"
        views = {name: self._file.get_slice(name) for name in names}
        rows = views["tokens"].get_shape()[0]
        expected: dict[str, tuple[list[int], str]] = {
            "latents": ([clips, *latent.shape], "F16"), "tokens": ([rows, latent.text_width], "F16"),
            "lengths": ([texts], "I32"), "pooled": ([texts, latent.pooled_width], "F16"),
            **{name: ([clips, *shape], "F16") for name, shape in pictures.items()},
        }  # fmt: skip
        for name, (shape, dtype) in expected.items():
            if views[name].get_shape() != shape or views[name].get_dtype() != dtype:
                found = f"{views[name].get_dtype()} {views[name].get_shape()}"
                return f"{name} are {found} instead of {dtype} {shape}"
        lengths = self._file.get_tensor("lengths").long()
        if len(lengths) and (lengths.min() < 0 or lengths.max() > latent.text_tokens):
            return f"a text has more than {latent.text_tokens} tokens, or fewer than none"
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        if int(self.starts[-1]) != rows:
            return f"its texts have {int(self.starts[-1])} tokens, but {rows} are there"
        return None

    def latents(self, clip: int) -> Tensor:
        """Latents [C, F, H, W] of one of its clips, float16."""
        return self._file.get_slice("latents")[clip]

    def picture(self, clip: int) -> Picture:
        """What it holds of the picture of one of its clips."""
        return {name: self._file.get_slice(name)[clip] for name in picture_shapes(self.latent)}

    def text(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens [length, D] and pooled vector [P] of one of its texts, float16."""
        first, last = self.starts[number : number + 2].tolist()
        return self._file.get_slice("tokens")[first:last], self._file.get_slice("pooled")[number]

    def pooled(self) -> Tensor:
        """Pooled vectors [texts, P] of all its texts, float16."""
        return self._file.get_tensor("pooled")

    def metadata(self) -> PartMetadata:
        """Raises IntegrityError if it is malformed or does not fit."""
        try:
            metadata = PartMetadata.model_validate(json.loads((self._file.metadata() or {}).get(METADATA, "null")))
        except (ValueError, RecursionError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
            raise IntegrityError(
                f"the metadata of part {self.path.name} are malformed ({reason}); build the data again"
            ) from error
        if len(metadata.captions) != self.part.texts or len(metadata.kinds) != self.part.clips:
            raise IntegrityError(f"part {self.path.name} does not name its captions and kinds; build the data again")
        return metadata
