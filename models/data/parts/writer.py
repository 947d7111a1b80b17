"""Write a shard as an index and its parts, clip by clip, so that it never has to be in memory as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lutetia.models.data.parts.index import (
    MAX_PART_BYTES,
    MAX_PARTS,
    MOST_TEXTS,
    IndexDocument,
    PartSpec,
    ShardIndex,
    Split,
    part_path,
    write_index,
)
from lutetia.models.data.parts.part_file import PartMetadata, Picture, Text, picture_shapes, true_length, write_part
from lutetia.models.data.shards import ShardData, shape_problem
from lutetia.models.experts.pictures import Pictures
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError

_USUAL_PARTS = 1024
_SMALLEST_PART = 4 << 20
_HEADER = 1 << 20
"""Bytes that the metadata of a part may take beside what is counted."""


def part_bytes(total: int) -> int:
    """How large the parts of a shard of `total` bytes are: about a thousand, so that few bytes precede the first step."""
    return min(max(_SMALLEST_PART, total // _USUAL_PARTS), MAX_PART_BYTES - _HEADER)


@dataclass(frozen=True)
class WrittenShard:
    """The index that was written, and the bytes of index and parts."""

    blob: BlobRef
    clips: int
    bytes: int
    captions: int = 1
    """Captions of the clip that has most of them."""


@dataclass
class ShardWriter:
    """Writes a shard. Call `add` for every clip, then `finish`.

    Args:
        path: the index; parts go into the folder of the same name without suffix.
        latent: shapes of latents and texts.
        name: of the cluster.
        split: use of the clips.
        part_bytes: size at which a part is full (`part_bytes`).
        null: the null condition of the texts; None: zeros.
    """

    path: Path
    latent: LatentSpec
    name: str
    split: Split
    part_bytes: int
    null: Text | None = None
    _bucket: int = 0
    _latents: list[Tensor] = field(default_factory=list)
    _pictures: list[Picture] = field(default_factory=list)
    _texts: list[Text] = field(default_factory=list)
    _kinds: list[str] = field(default_factory=list)
    _sources: list[str] = field(default_factory=list)
    _bytes: int = 0
    _parts: list[PartSpec] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict)
    _of_clips: list[list[int]] = field(default_factory=list)

    def add(
        self,
        latents: Tensor,
        text: Text,
        kind: str = "",
        source: str = "",
        bucket: int = 0,
        more: Sequence[Text] = (),
        picture: Picture | None = None,
    ) -> None:
        """Add a clip. All clips of a bucket come before those of the next.

        Args:
            latents: [C, F, H, W], normalised.
            text: caption and embedding.
            kind: label of the user.
            source: SHA-256 (hex) of its file.
            bucket: the bucket that it is of.
            more: its further captions, of which each step draws one; MOST_TEXTS with the first.
            picture: of its first picture what the shard is to hold, of any data type.

        Raises DataError if it does not have the shapes of the shard or is not finite in float16, or DiskError.
        """
        half = latents.detach().to("cpu", torch.float16)
        if bucket < self._bucket:
            raise self._error(f"a clip of bucket {bucket} comes after clips of bucket {self._bucket}")
        if self._latents and bucket != self._bucket:
            self._flush()
        self._bucket = bucket
        texts = {_key_of(each): each for each in (text, *more)}
        held = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in (picture or {}).items()}
        self._check(half, list(texts.values()), held)
        new = {key: each for key, each in texts.items() if key not in self._known}
        size = (
            2 * (half.numel() + sum(tensor.numel() for tensor in held.values()))
            + sum(each.bytes for each in new.values())
            + len(kind.encode())
            + 80
        )
        if self._latents and self._bytes + size > self.part_bytes:
            self._flush()
        for key, each in new.items():
            self._known[key] = len(self._known)
            self._texts.append(each)
        self._of_clips.append([self._known[key] for key in texts])
        self._latents.append(half)
        if held:
            self._pictures.append(held)
        self._kinds.append(kind)
        self._sources.append(source)
        self._bytes += size

    def finish(self) -> WrittenShard:
        """Write the last part and the index. Raises DataError (no clips, too many parts) or DiskError."""
        if not self._of_clips:
            raise self._error("it has no clips")
        self._flush()
        if len(self._parts) > MAX_PARTS:
            raise self._error(f"it has {len(self._parts)} parts, more than {MAX_PARTS}; split the data into more experts")
        document = IndexDocument(latent=self.latent, name=self.name, split=self.split, parts=tuple(self._parts))
        null = (self.null.tokens.numpy(), self.null.pooled.numpy()) if self.null else None
        most = max(map(len, self._of_clips))
        texts = np.array([each + [-1] * (most - len(each)) for each in self._of_clips], dtype=np.int32)
        index = ShardIndex(document, texts[:, 0], null, texts[:, 1:] if most > 1 else None)
        write_index(self.path, index)
        ref = ChunkTable.of_file(self.path).ref
        return WrittenShard(ref, len(index), ref.size + index.bytes, most)

    def _check(self, half: Tensor, texts: Sequence[Text], picture: Picture) -> None:
        latent = self.latent.in_bucket(self._bucket)
        shape = latent.shape
        if {name: tuple(tensor.shape) for name, tensor in picture.items()} != picture_shapes(latent):
            found = {name: list(tensor.shape) for name, tensor in picture.items()}
            raise self._error(f"a clip's picture has the shapes {found} instead of {picture_shapes(latent)}")
        if half.shape != shape:
            raise self._error(f"latents are {list(half.shape)} instead of {list(shape)}")
        if len(texts) > MOST_TEXTS:
            raise self._error(f"a clip has {len(texts)} captions, more than {MOST_TEXTS}")
        for text in texts:
            rows, widths = len(text.tokens), (text.tokens.shape[1], len(text.pooled))
            if rows > self.latent.text_tokens or widths != (self.latent.text_width, self.latent.pooled_width):
                raise self._error(f"tokens are {list(text.tokens.shape)} and pooled vectors {list(text.pooled.shape)}")
        named = [("tokens", text.tokens) for text in texts] + [("pooled", text.pooled) for text in texts]
        for name, tensor in [("latents", half), *picture.items(), *named]:
            if not torch.isfinite(tensor).all():
                raise self._error(f"{name} are not finite in half precision; normalise them")

    def _error(self, problem: str) -> DataError:
        return DataError(f"cannot write shard {self.path.name}: {problem}")

    def _flush(self) -> None:
        number = len(self._parts)
        path = part_path(self.path, number, BlobRef(digest="0" * 64, size=0))
        metadata = PartMetadata(kinds=tuple(self._kinds), sources=tuple(self._sources) if any(self._sources) else ())
        widths = self.latent.text_width, self.latent.pooled_width
        write_part(path, self._latents, self._texts, metadata, widths, self._pictures)
        self._parts.append(
            PartSpec(blob=ChunkTable.of_file(path).ref, clips=len(self._latents), texts=len(self._texts), bucket=self._bucket)
        )
        for pending in (self._latents, self._pictures, self._texts, self._kinds, self._sources):
            pending.clear()
        self._bytes = 0


def text_of(caption: str, tokens: Tensor, pooled: Tensor) -> Text:
    """The text of a caption from its padded tokens [L, D] and its pooled vector [P]."""
    half = tokens.detach().to("cpu", torch.float16)
    return Text(caption, half[: true_length(half)].contiguous(), pooled.detach().to("cpu", torch.float16))


def write_shard(
    path: Path, data: ShardData, latent: LatentSpec, *, name: str = "", split: Split = "train", size: int | None = None
) -> WrittenShard:
    """Write clips that are in memory.

    Args:
        path: the index.
        data: the clips.
        latent: shapes of latents and texts.
        name: of the cluster.
        split: use of the clips.
        size: bytes of a part. None: by the size of the shard.

    Raises DataError (`data` do not have the shapes, are not finite in float16, or have no clips) or DiskError.
    """
    if problem := shape_problem(data, latent):
        raise DataError(f"cannot write shard {path.name}: {problem}; build the data again")
    total = 2 * (data.latents.numel() + data.tokens.numel())
    null = text_of("", *data.null) if data.null else None
    writer = ShardWriter(path, latent, name, split, size or part_bytes(total), null)
    for row, (caption, kind) in enumerate(zip(data.captions, data.kinds, strict=True)):
        text = text_of(caption, data.tokens[row], data.pooled[row])
        writer.add(data.latents[row], text, kind, picture=picture_of(data.pictures, row))
    return writer.finish()


def picture_of(pictures: Pictures | None, row: int) -> Picture:
    """What a shard holds of the picture of one row."""
    if pictures is None:
        return {}
    return {"pictures": pictures.latents[row]} | ({} if pictures.vision is None else {"vision": pictures.vision[row]})


def _key_of(text: Text) -> bytes:
    """Equal for equal texts."""
    return hashlib.sha256(text.caption.encode() + b"\0" + _bytes_of(text.tokens) + _bytes_of(text.pooled)).digest()


def _bytes_of(half: Tensor) -> bytes:
    return half.contiguous().view(torch.uint8).numpy().tobytes()
